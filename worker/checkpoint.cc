#include "worker/checkpoint.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "worker/prefill.h"
#include "worker/ring_attention.h"

namespace headwater {
namespace {

// Of rows that come from another rank, at once.
constexpr uint64_t kBounceBytes = uint64_t{64} << 20;
// Memory of earlier checkpoints over so many times what the next ones need is given back.
constexpr uint64_t kMostOversize = 4;

}  // namespace

void CheckpointStore::Begin(const std::string& request_id, uint32_t epoch, int rank,
                            std::vector<RankTokens> partition, int64_t hidden_size) {
  Forget();
  request_id_ = request_id;
  epoch_ = epoch;
  rank_ = rank;
  partition_ = std::move(partition);
  hidden_size_ = hidden_size;
  next_ = 0;
  for (Slot& slot : slots_) {
    if (slot.memory.capacity() < SlotBytes() || slot.memory.capacity() / kMostOversize > SlotBytes())
      slot.memory.Free();
  }
}

size_t CheckpointStore::NumValues(int rank) const {
  return static_cast<size_t>(NumTokens(partition_[static_cast<size_t>(rank)]) * hidden_size_);
}

uint64_t CheckpointStore::SlotBytes() const {
  // Either part begins at an aligned place.
  return (NumValues(rank_) + NumValues(left())) * sizeof(float) + 2 * MemoryPlan::kAlignment;
}

absl::StatusOr<CheckpointStore::Rows> CheckpointStore::Start(int32_t layer) {
  Slot& slot = slots_[next_];
  slot.layer = -1;
  started_ = layer;
  const size_t own = NumValues(rank_), neighbours = NumValues(left());
  HW_RETURN_IF_ERROR(slot.memory.Reset(SlotBytes()));
  const auto take = [&slot](size_t count) {
    return absl::MakeSpan(reinterpret_cast<float*>(slot.memory.Take(count * sizeof(float))), count);
  };
  slot.rows.own = take(own);
  slot.rows.left = take(neighbours);
  return slot.rows;
}

void CheckpointStore::Finish() {
  HW_CHECK(started_ >= 0);
  slots_[next_].layer = std::exchange(started_, -1);
  next_ = 1 - next_;
}

const float* CheckpointStore::Find(const std::string& request_id, uint32_t epoch, int32_t layer,
                                   int rank) const {
  if (request_id != request_id_ || epoch != epoch_ || layer < 0) return nullptr;
  for (const Slot& slot : slots_) {
    if (slot.layer != layer) continue;
    if (rank == rank_) return slot.rows.own.data();
    if (rank == left()) return slot.rows.left.data();
  }
  return nullptr;
}

void CheckpointStore::KeepOnly(const std::string& request_id, uint32_t epoch, int32_t layer) {
  const bool same = request_id == request_id_ && epoch == epoch_ && layer >= 0;
  for (Slot& slot : slots_) {
    if (same && slot.layer == layer) continue;
    slot.layer = -1;
    slot.memory.Free();
  }
  started_ = -1;
  if (!same) request_id_.clear();
}

void CheckpointStore::Forget() {
  for (Slot& slot : slots_) slot.layer = -1;
  started_ = -1;
  request_id_.clear();
}

uint64_t CheckpointStore::bytes() const { return slots_[0].memory.capacity() + slots_[1].memory.capacity(); }

std::vector<CheckpointMove> PlanMoves(const ResumePoint& resume, const std::vector<RankTokens>& partition) {
  std::vector<CheckpointMove> moves;
  for (size_t owner = 0; owner < resume.partition.size(); ++owner) {
    int64_t from_row = 0;
    for (const TokenRange& have : resume.partition[owner]) {
      for (size_t to = 0; to < partition.size(); ++to) {
        int64_t to_row = 0;
        for (const TokenRange& want : partition[to]) {
          const int64_t begin = std::max(have.begin, want.begin), end = std::min(have.end, want.end);
          if (begin < end) {
            moves.push_back({static_cast<int>(owner), resume.providers[owner], static_cast<int>(to),
                             from_row + begin - have.begin, to_row + begin - want.begin, end - begin});
          }
          to_row += want.size();
        }
      }
      from_row += have.size();
    }
  }
  return moves;
}

absl::Status CheckProvides(const PrefillJob& job, const CheckpointStore& store) {
  const ResumePoint& resume = *job.resume;
  for (size_t owner = 0; owner < resume.providers.size(); ++owner) {
    const int rank = static_cast<int>(owner);
    if (resume.providers[owner] != job.rank ||
        store.Find(job.request_id, resume.epoch, resume.layer, rank) != nullptr) {
      continue;
    }
    return MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_CHECKPOINT_LOST,
                     absl::StrCat("this worker has no checkpoint of layer ", resume.layer, " of rank ", rank,
                                  " in epoch ", resume.epoch, " of request ", job.request_id));
  }
  return absl::OkStatus();
}

absl::Status LoadCheckpoint(const PrefillJob& job, int64_t hidden_size, const CheckpointStore& store,
                            Collectives* group, JobControl* control, const PutRows& put) {
  const ResumePoint& resume = *job.resume;
  const int world = job.world_size();
  const auto row_bytes = static_cast<uint64_t>(hidden_size) * sizeof(float);
  const auto most_rows = static_cast<int64_t>(std::max<uint64_t>(1, kBounceBytes / row_bytes));
  std::vector<float> bounce;
  const auto move_some = [&](const CheckpointMove& move, int64_t done, int64_t count) -> absl::Status {
    HW_RETURN_IF_ERROR(control->Step());
    const bool sends = move.from == job.rank, receives = move.to == job.rank;
    const float* from = nullptr;
    if (sends) {
      from = store.Find(job.request_id, resume.epoch, resume.layer, move.owner);
      HW_CHECK(from != nullptr);
      from += (move.from_row + done) * hidden_size;
    }
    if (sends && receives) HW_RETURN_IF_ERROR(put(move.to_row + done, from, count));
    if (world == 1) return absl::OkStatus();
    // Every rank makes every call: operations pair by their order.
    const uint64_t bytes = static_cast<uint64_t>(count) * row_bytes;
    int peer = (job.rank + 1) % world;
    absl::Span<const char> send;
    absl::Span<char> receive;
    if (sends && !receives) {
      peer = move.to;
      send = absl::MakeSpan(reinterpret_cast<const char*>(from), bytes);
    } else if (receives && !sends) {
      peer = move.from;
      bounce.resize(static_cast<size_t>(count * hidden_size));
      receive = absl::MakeSpan(reinterpret_cast<char*>(bounce.data()), bytes);
    }
    {
      const std::unique_ptr<PendingExchange> exchange = group->StartExchange(peer, send, peer, receive);
      const JobControl::Waiting waiting(control);
      if (const absl::Status status = exchange->Wait(); !status.ok())
        return CollectiveError(status, *control);
    }
    return receive.empty() ? absl::OkStatus() : put(move.to_row + done, bounce.data(), count);
  };
  for (const CheckpointMove& move : PlanMoves(resume, job.partition)) {
    for (int64_t done = 0; done < move.count; done += most_rows) {
      HW_RETURN_IF_ERROR(move_some(move, done, std::min(most_rows, move.count - done)));
    }
  }
  return absl::OkStatus();
}

void ReportCheckpoint(const std::vector<uint32_t>& taken, const KvSender& sender, PrefillProgress* progress) {
  for (size_t back = 1; back <= std::min<size_t>(2, taken.size()); ++back) {
    const uint32_t layer = taken[taken.size() - back];
    if (progress->checkpoint.has_value() && layer <= progress->checkpoint->layer) return;
    const std::optional<KvShare> share = sender.AckedBelow(layer);
    if (!share.has_value()) continue;
    progress->checkpoint = {layer, *share};
    return;
  }
}

}  // namespace headwater
