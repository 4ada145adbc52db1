#include "worker/arena.h"

#include "absl/strings/str_cat.h"
#include <sys/mman.h>

#include "base/log.h"
#include "worker/memory_plan.h"

namespace headwater {
namespace {

constexpr uint64_t Rounded(uint64_t bytes) {
  return (bytes + MemoryPlan::kAlignment - 1) / MemoryPlan::kAlignment * MemoryPlan::kAlignment;
}

}  // namespace

absl::Status Arena::Reset(uint64_t wanted) {
  used_ = 0;
  const uint64_t bytes = wanted > ~uint64_t{MemoryPlan::kAlignment} ? wanted : Rounded(wanted);
  if (bytes <= capacity_) return absl::OkStatus();
  Free();
  // Mapped, not taken from the heap: Free() really gives it back, and pages that no job touches cost nothing.
  void* const data = bytes >> 47 != 0
                         ? MAP_FAILED
                         : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("the system has no ", bytes, " bytes for a prefill"));
  }
  // Advice only; without huge pages it is slower, not wrong.
  (void)madvise(data, bytes, MADV_HUGEPAGE);
  data_ = static_cast<char*>(data);
  capacity_ = bytes;
  return absl::OkStatus();
}

char* Arena::Take(uint64_t bytes) {
  const uint64_t rounded = Rounded(bytes);
  HW_CHECK(rounded <= capacity_ - used_);
  char* const taken = data_ + used_;
  used_ += rounded;
  return taken;
}

void Arena::Free() {
  if (data_ != nullptr) munmap(data_, capacity_);
  data_ = nullptr;
  capacity_ = 0;
  used_ = 0;
}

}  // namespace headwater
