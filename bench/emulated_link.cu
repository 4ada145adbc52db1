#include "bench/emulated_link.h"

namespace headwater {
namespace {

__device__ uint64_t Clock() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

__global__ void Mark(uint64_t* began) { *began = Clock(); }

__global__ void Wait(const uint64_t* began, uint64_t ns) {
  while (Clock() - *began < ns) __nanosleep(500);
}

}  // namespace

cudaError_t MarkTime(uint64_t* began, cudaStream_t stream) {
  Mark<<<1, 1, 0, stream>>>(began);
  return cudaGetLastError();
}

cudaError_t WaitSince(const uint64_t* began, uint64_t ns, cudaStream_t stream) {
  Wait<<<1, 1, 0, stream>>>(began, ns);
  return cudaGetLastError();
}

}  // namespace headwater
