#include "kvtransfer/send_ledger.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

// The longest wait without a look at the clock.
constexpr absl::Duration kTick = absl::Seconds(1);

bool Bit(const std::string& bits, uint64_t i) {
  return i / 8 < bits.size() && (static_cast<unsigned char>(bits[i / 8]) >> (i % 8) & 1u) != 0;
}

absl::Status ProtocolError(absl::string_view what) {
  return MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL,
                   absl::StrCat("KV receiver: ", what));
}

}  // namespace

struct SendLedger::Instruments {
  explicit Instruments(Metrics* metrics)
      : bytes(metrics->Counter("headwater_kv_egress_bytes_total",
                               "KV payload bytes acknowledged by receivers.")),
        acked(Blocks(metrics, "acked")),
        resent(Blocks(metrics, "resent")),
        corrupt(Blocks(metrics, "corrupt")),
        unacked(metrics->Gauge("headwater_kv_unacked_bytes", "KV payload bytes sent and not acknowledged.")),
        resumes(metrics->Counter("headwater_kv_stream_resumes_total",
                                 "KV streams connected again after a loss.")),
        ack_seconds(
            metrics->Seconds("headwater_kv_egress_ack_seconds", "From sending a KV block to its ACK.")) {}
  static prometheus::Counter& Blocks(Metrics* metrics, const char* result) {
    return metrics->Counter("headwater_kv_egress_blocks_total", "KV blocks by what became of them.",
                            {{"result", result}});
  }
  prometheus::Counter& bytes;
  prometheus::Counter& acked;
  prometheus::Counter& resent;
  prometheus::Counter& corrupt;
  prometheus::Gauge& unacked;
  prometheus::Counter& resumes;
  prometheus::Histogram& ack_seconds;
};

SendLedger::SendLedger(const KvSenderOptions& options, const KvGeometry& geometry, const Clock* clock,
                       std::function<void(bool all)> wake)
    : options_(options),
      geometry_(geometry),
      clock_(clock),
      wake_(std::move(wake)),
      last_progress_(clock->Now()),
      submitted_(geometry.num_blocks()),
      acked_(geometry.num_blocks()),
      shares_(geometry.layout().num_layers()),
      acked_at_hello_(static_cast<size_t>(options.num_channels)),
      connected_(static_cast<size_t>(options.num_channels)),
      instruments_(options.metrics == nullptr ? nullptr : std::make_unique<Instruments>(options.metrics)) {}

SendLedger::~SendLedger() = default;

absl::Status SendLedger::Submit(const KvBlockId& block, const void* data, std::function<void()> done) {
  absl::Status refused;
  {
    Lock lock(mutex_);
    refused = status_;
    if (refused.ok() && finished_) refused = absl::FailedPreconditionError("the KV sender has finished");
    if (refused.ok() && !geometry_.Contains(block)) {
      refused = absl::InvalidArgumentError(absl::StrCat(BlockName(block), " is no block of this cache"));
    }
    if (refused.ok() && submitted_[geometry_.IndexOf(block)]) {
      refused = absl::InvalidArgumentError(absl::StrCat(BlockName(block), " was submitted before"));
    }
    if (!refused.ok()) {
      ready_.push_back(std::move(done));
    } else {
      auto entry = std::make_unique<SendBlock>();
      entry->id = block;
      entry->index = geometry_.IndexOf(block);
      entry->data = data;
      entry->bytes = geometry_.BytesOf(block);
      entry->done = std::move(done);
      submitted_[entry->index] = true;
      const absl::Time now = clock_->Now();
      shares_.Submitted(block.layer, now);
      stats_.bytes_submitted += entry->bytes;
      if (open_blocks_ == 0) last_progress_ = now;
      ++open_blocks_;
      queue_.push_back(entry.get());
      blocks_.emplace(entry->index, std::move(entry));
    }
    changed_.notify_all();
  }
  if (refused.ok()) wake_(false);
  return refused;
}

absl::Status SendLedger::Finish() {
  {
    Lock lock(mutex_);
    // The stall watch in RunCompletions ends this wait at the latest.
    while (status_.ok() && !(blocks_.empty() && ready_.empty() && running_done_ == 0)) {
      changed_.wait_for(lock, absl::ToChronoMilliseconds(kTick));
    }
    if (!status_.ok()) return status_;
    finished_ = true;
  }
  wake_(true);
  return absl::OkStatus();
}

absl::Status SendLedger::status() const {
  Lock lock(mutex_);
  return status_;
}

void SendLedger::Fail(const absl::Status& status) {
  bool first = false;
  {
    Lock lock(mutex_);
    first = FailLocked(status);
  }
  if (first) wake_(true);
}

bool SendLedger::running() const {
  Lock lock(mutex_);
  return status_.ok() && !finished_;
}

bool SendLedger::finished() const {
  Lock lock(mutex_);
  return finished_;
}

SendBlock* SendLedger::Take(int channel) {
  Lock lock(mutex_);
  if (!status_.ok() || queue_.empty()) return nullptr;
  SendBlock* block = queue_.front();
  // A block larger than the whole window goes alone.
  if (in_flight_bytes_ > 0 && in_flight_bytes_ + block->bytes > options_.max_inflight_bytes) return nullptr;
  queue_.pop_front();
  block->state = SendBlock::State::kInFlight;
  block->channel = channel;
  block->sent_at = clock_->Now();
  ++block->slices;
  SetInFlightLocked(in_flight_bytes_ + block->bytes);
  if (++block->sends > 1) {
    ++stats_.blocks_resent;
    if (instruments_ != nullptr) instruments_->resent.Increment();
  }
  return block;
}

void SendLedger::SetCrc(SendBlock* block, uint32_t crc32c) {
  Lock lock(mutex_);
  block->crc32c = crc32c;
  block->has_crc = true;
  stats_.digest.Add(block->index, block->bytes, crc32c);
}

void SendLedger::SliceReleased(SendBlock* block) {
  Lock lock(mutex_);
  --block->slices;
  if (block->slices == 0 && block->state == SendBlock::State::kOver) HandOutLocked(block);
}

void SendLedger::HelloSent(int channel) {
  Lock lock(mutex_);
  acked_at_hello_[static_cast<size_t>(channel)] = acked_;
}

absl::Status SendLedger::Resume(int channel, const v1::KvSessionState& state) {
  absl::Status status;
  {
    Lock lock(mutex_);
    status = ResumeLocked(channel, state);
    changed_.notify_all();
  }
  wake_(false);
  return status;
}

absl::Status SendLedger::ResumeLocked(int channel, const v1::KvSessionState& state) {
  const std::string& stored = state.stored_blocks();
  const uint64_t blocks = geometry_.num_blocks();
  if (state.epoch() != options_.epoch || (!stored.empty() && stored.size() != (blocks + 7) / 8)) {
    return ProtocolError(absl::StrCat("its state is of epoch ", state.epoch(), " with ", stored.size(),
                                      " bytes of bitmap; asked was epoch ", options_.epoch, " of ", blocks,
                                      " blocks"));
  }
  std::vector<bool>& acked_before = acked_at_hello_[static_cast<size_t>(channel)];
  for (uint64_t i = 0; i < acked_before.size(); ++i) {
    if (!acked_before[i] || Bit(stored, i)) continue;
    const std::string name = BlockName(geometry_.BlockAt(i));
    return MakeError(absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT,
                     absl::StrCat("the receiver acknowledged ", name, " and has lost it"), {{"block", name}});
  }
  acked_before.clear();
  if (connected_[static_cast<size_t>(channel)]) {
    ++stats_.stream_resumes;
    if (instruments_ != nullptr) instruments_->resumes.Increment();
  }
  connected_[static_cast<size_t>(channel)] = true;
  std::vector<SendBlock*> held;
  for (const auto& [index, block] : blocks_) {
    if (block->channel == channel && block->state == SendBlock::State::kHeld) held.push_back(block.get());
  }
  // From the back, so that the queue's front is in order.
  for (auto it = held.rbegin(); it != held.rend(); ++it) {
    if (Bit(stored, (*it)->index)) {
      AckedLocked(*it);
    } else {
      RequeueLocked(*it);
    }
  }
  return absl::OkStatus();
}

absl::Status SendLedger::Acknowledge(int channel, const v1::KvAck& ack) {
  absl::Status status;
  {
    Lock lock(mutex_);
    status = AcknowledgeLocked(channel, ack);
    changed_.notify_all();
  }
  wake_(false);
  return status;
}

absl::Status SendLedger::AcknowledgeLocked(int channel, const v1::KvAck& ack) {
  switch (ack.status()) {
    case v1::KV_ACK_STATUS_STALE_EPOCH:
      return MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_STALE_EPOCH,
                       absl::StrCat("KV receiver: ", ack.message()),
                       {{"epoch", absl::StrCat(options_.epoch)}});
    case v1::KV_ACK_STATUS_REFUSED:
      return ProtocolError(absl::StrCat("it refused a block: ", ack.message()));
    case v1::KV_ACK_STATUS_STORED:
    case v1::KV_ACK_STATUS_CORRUPT:
      break;
    default:
      return ProtocolError(
          absl::StrCat("acknowledgement status ", static_cast<int>(ack.status()), " is unknown"));
  }
  for (const uint64_t index : ack.block_indices()) {
    const absl::Status status =
        AcknowledgeBlockLocked(channel, index, ack.status() == v1::KV_ACK_STATUS_STORED);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status SendLedger::AcknowledgeBlockLocked(int channel, uint64_t index, bool stored) {
  const auto it = blocks_.find(index);
  SendBlock* block = it == blocks_.end() ? nullptr : it->second.get();
  // Already failed: the rest is of no interest.
  if (!status_.ok()) return absl::OkStatus();
  if (block == nullptr || block->state != SendBlock::State::kInFlight || block->channel != channel) {
    return ProtocolError(
        absl::StrCat("it acknowledged block ", index, ", which was not sent on this stream"));
  }
  if (stored) {
    AckedLocked(block);
    return absl::OkStatus();
  }
  if (instruments_ != nullptr) instruments_->corrupt.Increment();
  if (++block->corrupt > options_.max_corrupt_retries) {
    const std::string name = BlockName(block->id);
    return MakeError(absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT,
                     absl::StrCat(name, " arrived corrupt ", block->corrupt, " times"), {{"block", name}});
  }
  RequeueLocked(block);
  return absl::OkStatus();
}

void SendLedger::StreamLost(int channel) {
  Lock lock(mutex_);
  for (const auto& [index, block] : blocks_) {
    if (block->channel == channel && block->state == SendBlock::State::kInFlight) {
      block->state = SendBlock::State::kHeld;
    }
  }
}

void SendLedger::AckedLocked(SendBlock* block) {
  const absl::Time now = clock_->Now();
  acked_[block->index] = true;
  shares_.Acked(block->id.layer, block->index, block->bytes, block->crc32c, now);
  ++stats_.blocks_acked;
  stats_.bytes_acked += block->bytes;
  last_progress_ = now;
  if (instruments_ != nullptr) {
    instruments_->acked.Increment();
    instruments_->bytes.Increment(static_cast<double>(block->bytes));
    instruments_->ack_seconds.Observe(absl::ToDoubleSeconds(now - block->sent_at));
  }
  SetInFlightLocked(in_flight_bytes_ - block->bytes);
  OverLocked(block);
}

void SendLedger::RequeueLocked(SendBlock* block) {
  SetInFlightLocked(in_flight_bytes_ - block->bytes);
  block->state = SendBlock::State::kQueued;
  block->channel = -1;
  queue_.push_front(block);
}

void SendLedger::SetInFlightLocked(uint64_t bytes) {
  if (instruments_ != nullptr) {
    instruments_->unacked.Increment(static_cast<double>(bytes) - static_cast<double>(in_flight_bytes_));
  }
  in_flight_bytes_ = bytes;
}

void SendLedger::OverLocked(SendBlock* block) {
  block->state = SendBlock::State::kOver;
  --open_blocks_;
  if (block->slices == 0) HandOutLocked(block);
}

void SendLedger::HandOutLocked(SendBlock* block) {
  ready_.push_back(std::move(block->done));
  const uint64_t index = block->index;
  blocks_.erase(index);
  changed_.notify_all();
}

bool SendLedger::FailLocked(const absl::Status& status) {
  if (!status_.ok() || finished_) return false;
  status_ = status;
  SetInFlightLocked(0);
  queue_.clear();
  std::vector<SendBlock*> open;
  for (const auto& [index, block] : blocks_) {
    if (block->state != SendBlock::State::kOver) open.push_back(block.get());
  }
  for (SendBlock* block : open) OverLocked(block);
  changed_.notify_all();
  return true;
}

bool SendLedger::StalledLocked(absl::Time* deadline) const {
  const absl::Time now = clock_->Now();
  *deadline = now + kTick;
  if (!status_.ok() || open_blocks_ == 0) return false;
  *deadline = std::min(*deadline, last_progress_ + options_.stall_timeout);
  return now >= last_progress_ + options_.stall_timeout;
}

void SendLedger::RunCompletions() {
  Lock lock(mutex_);
  while (!(stopped_ && blocks_.empty() && ready_.empty())) {
    if (!ready_.empty()) {
      std::vector<std::function<void()>> batch = std::move(ready_);
      ready_.clear();
      running_done_ = batch.size();
      lock.unlock();
      for (const std::function<void()>& done : batch) {
        if (done) done();
      }
      // Their captures go before anybody is told that they are done.
      batch.clear();
      lock.lock();
      running_done_ = 0;
      changed_.notify_all();
      continue;
    }
    absl::Time deadline;
    if (StalledLocked(&deadline)) {
      const absl::Status stalled =
          MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_KV_STREAM_STALLED,
                    absl::StrCat(open_blocks_, " KV blocks wait and none was acknowledged by ",
                                 options_.address, " for ", absl::FormatDuration(options_.stall_timeout)),
                    {{"address", options_.address}, {"blocks", absl::StrCat(open_blocks_)}});
      FailLocked(stalled);
      lock.unlock();
      wake_(true);
      lock.lock();
      continue;
    }
    const absl::Duration wait = std::max(deadline - clock_->Now(), absl::Milliseconds(1));
    changed_.wait_for(lock, absl::ToChronoMicroseconds(wait));
  }
}

void SendLedger::Stop() {
  Lock lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

}  // namespace headwater
