// Where an OpenMP parallel region begins and ends. GCC's libgomp is not instrumented, so without this
// whatever a region's threads get from their caller, and it from them, would look raced for. The project's
// loops share nothing else between threads.
#include "cmake/tsan/next_definition.h"

extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);

namespace {

struct Region {
  void (*function)(void*);
  void* data;
};

void Run(void* argument) {
  auto* region = static_cast<Region*>(argument);
  __tsan_acquire(region);
  region->function(region->data);
  __tsan_release(region);
}

}  // namespace

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags) {
  static std::atomic<void*> cache{nullptr};
  const auto real = headwater::tsan::NextDefinition<decltype(&GOMP_parallel)>("GOMP_parallel", &cache);
  Region region{function, data};
  __tsan_release(&region);
  real(Run, &region, threads, flags);
  __tsan_acquire(&region);
}
