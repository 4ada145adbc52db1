#include "model/scratch.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/log.h"

namespace headwater {

void* ScratchPool::Loan::Part(uint64_t bytes) {
  HW_CHECK(AlignedBytes(bytes) <= buffer_.bytes - used_);
  uint8_t* const part = buffer_.memory.get() + used_;
  used_ += AlignedBytes(bytes);
  return part;
}

absl::StatusOr<ScratchPool::Loan> ScratchPool::Acquire(uint64_t bytes) {
  bytes = std::max<uint64_t>(AlignedBytes(bytes), kScratchAlignment);
  {
    absl::MutexLock lock(&mutex_);
    if (idle_.bytes >= bytes) return Loan(this, std::exchange(idle_, Buffer()));
  }
  Buffer buffer;
  buffer.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(kScratchAlignment, bytes)));
  if (buffer.memory == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes of scratch"));
  }
  buffer.bytes = bytes;
  return Loan(this, std::move(buffer));
}

void ScratchPool::Return(Buffer buffer) {
  // The larger one stays; the other is freed outside the lock.
  absl::MutexLock lock(&mutex_);
  if (buffer.bytes > idle_.bytes) std::swap(buffer, idle_);
}

}  // namespace headwater
