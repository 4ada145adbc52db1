// operator new that fails on demand. For one file of a test program.
#ifndef HW_TESTS_KERNELS_FAILING_NEW_H_
#define HW_TESTS_KERNELS_FAILING_NEW_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace headwater::testing {

// Of this thread; below 0: as many as there is memory for.
inline thread_local int64_t allocations_left = -1;

// While it lives, this thread's allocations after the first `allowed` fail.
class FailingNew {
 public:
  explicit FailingNew(int64_t allowed) { allocations_left = allowed; }
  ~FailingNew() { allocations_left = -1; }
};

inline void* AllocateOrFail(std::size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  void* const memory = std::malloc(size > 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace headwater::testing

void* operator new(std::size_t size) { return headwater::testing::AllocateOrFail(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

#endif  // HW_TESTS_KERNELS_FAILING_NEW_H_
