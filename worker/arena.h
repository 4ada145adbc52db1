// Arena: one allocation per job, kept for the next.
#ifndef HW_WORKER_ARENA_H_
#define HW_WORKER_ARENA_H_

#include <cstdint>

#include "absl/status/status.h"

namespace headwater {

class Arena {
 public:
  Arena() = default;
  ~Arena() { Free(); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Takes back everything that Take() has given and makes room for `bytes`. Keeps the memory of an earlier
  // job if it is large enough. RESOURCE_EXHAUSTED: the system has no such address space.
  absl::Status Reset(uint64_t bytes);

  // The next `bytes` bytes, aligned to MemoryPlan::kAlignment; not initialised. More than Reset() has made
  // room for is a bug (HW_CHECK).
  char* Take(uint64_t bytes);

  uint64_t capacity() const { return capacity_; }
  // Gives the memory back to the system.
  void Free();

 private:
  char* data_ = nullptr;
  uint64_t capacity_ = 0;
  uint64_t used_ = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_ARENA_H_
