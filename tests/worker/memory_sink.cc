#include "tests/worker/memory_sink.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/clock.h"
#include "worker/layer_kv.h"

namespace headwater::testing {

void KvCapture::Store(const KvBlockId& id, const void* data) {
  absl::MutexLock lock(&mutex_);
  std::memcpy(bytes_.data() + geometry_.OffsetOf(id), data, geometry_.BytesOf(id));
  ++times_[geometry_.IndexOf(id)];
}

std::vector<float> KvCapture::Tensor(uint32_t layer, KvKind kind) const {
  const uint64_t offset = (2 * layer + static_cast<uint64_t>(kind)) * geometry_.tensor_bytes();
  std::vector<float> values(geometry_.tensor_bytes() / geometry_.element_bytes());
  kernels::Convert(bytes_.data() + offset, WireType(geometry_.layout().dtype()), values.data(),
                   kernels::DType::kF32, values.size());
  return values;
}

MemorySink::MemorySink(KvCapture* capture, Mode mode)
    : capture_(capture),
      mode_(mode),
      shares_(capture->geometry().layout().num_layers()),
      thread_([this] { Deliver(); }) {}

MemorySink::~MemorySink() {
  Cancel();
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

absl::Status MemorySink::Submit(const KvBlockId& block, const void* data, std::function<void()> done) {
  const uint32_t crc32c = Crc32c(data, capture_->geometry().BytesOf(block));
  absl::MutexLock lock(&mutex_);
  ++submitted_;
  shares_.Submitted(block.layer, SteadyNow());
  items_.push_back({block, data, crc32c, std::move(done)});
  most_ = std::max(most_, submitted_ - acked_);
  stats_.bytes_submitted += capture_->geometry().BytesOf(block);
  stats_.digest.Add(capture_->geometry().IndexOf(block), capture_->geometry().BytesOf(block), crc32c);
  if (cancelled_) return absl::CancelledError("sink cancelled");
  return absl::OkStatus();
}

absl::Status MemorySink::Finish() {
  absl::MutexLock lock(&mutex_);
  const auto over = [this]()
                        ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return cancelled_ || acked_ == submitted_; };
  mutex_.Await(absl::Condition(&over));
  return cancelled_ ? absl::CancelledError("sink cancelled") : absl::OkStatus();
}

void MemorySink::Cancel() {
  absl::MutexLock lock(&mutex_);
  cancelled_ = true;
}

absl::Status MemorySink::status() const {
  absl::MutexLock lock(&mutex_);
  return cancelled_ ? absl::CancelledError("sink cancelled") : absl::OkStatus();
}

KvSenderStats MemorySink::Stats() const {
  absl::MutexLock lock(&mutex_);
  return stats_;
}

std::optional<KvShare> MemorySink::AckedBelow(uint32_t layer) const {
  absl::MutexLock lock(&mutex_);
  return shares_.Below(layer);
}

uint64_t MemorySink::most_outstanding() const {
  absl::MutexLock lock(&mutex_);
  return most_;
}

void MemorySink::WaitSubmitted(uint64_t count) const {
  absl::MutexLock lock(&mutex_);
  const auto reached = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return submitted_ >= count; };
  mutex_.Await(absl::Condition(&reached));
}

void MemorySink::Deliver() {
  while (true) {
    Item item;
    bool store = false;
    {
      absl::MutexLock lock(&mutex_);
      const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return stopping_ || (!items_.empty() && (mode_ == Mode::kAcknowledge || cancelled_));
      };
      mutex_.Await(absl::Condition(&ready));
      if (items_.empty()) return;
      item = std::move(items_.front());
      items_.pop_front();
      store = !cancelled_;
    }
    if (store) capture_->Store(item.id, item.data);
    item.done();
    absl::MutexLock lock(&mutex_);
    ++acked_;
    ++stats_.blocks_acked;
    const uint64_t bytes = capture_->geometry().BytesOf(item.id);
    stats_.bytes_acked += bytes;
    if (store)
      shares_.Acked(item.id.layer, capture_->geometry().IndexOf(item.id), bytes, item.crc32c, SteadyNow());
  }
}

}  // namespace headwater::testing
