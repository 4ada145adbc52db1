// For the files of this folder, which are linked into every executable of the tsan build and stand before
// packaged libraries that are not instrumented: each definition calls the library's own and tells the
// sanitizer which memory accesses that call puts in order.
#ifndef HW_CMAKE_TSAN_NEXT_DEFINITION_H_
#define HW_CMAKE_TSAN_NEXT_DEFINITION_H_

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include <dlfcn.h>

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}

namespace headwater::tsan {

// The library's definition of `name`. `cache` keeps it.
template <typename Function>
Function NextDefinition(const char* name, std::atomic<void*>* cache) {
  void* found = cache->load(std::memory_order_relaxed);
  if (found == nullptr) {
    found = dlsym(RTLD_NEXT, name);
    if (found == nullptr) {
      std::fprintf(stderr, "cmake/tsan: no library has %s\n", name);
      std::abort();
    }
    cache->store(found, std::memory_order_relaxed);
  }
  return reinterpret_cast<Function>(found);
}

}  // namespace headwater::tsan

#endif  // HW_CMAKE_TSAN_NEXT_DEFINITION_H_
