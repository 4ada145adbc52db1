// Parts of selections by the bits of f32 numbers, which order as the numbers do.
#pragma once

#include <cstdint>

namespace headwater::kernels::device {

inline constexpr int kRadixThreads = 1024;

// 31 bits; what is not positive (NaN too) counts as 0, what is over 128 as 128.
__device__ __forceinline__ uint32_t RadixKey(float x) {
  return x > 0 ? __float_as_uint(fminf(x, 128.0f)) : 0u;
}

// The digit of a key in pass 0 (11 bits, the exponent among them), 1 or 2 (10 bits), and what lies above it.
template <int kPass>
struct RadixDigit {
  static constexpr int kBits = kPass == 0 ? 11 : 10, kShift = kPass == 0 ? 20 : kPass == 1 ? 10 : 0;
  static constexpr int kBins = 1 << kBits;
  __device__ static __forceinline__ uint32_t Of(uint32_t key) { return key >> kShift & (kBins - 1); }
  __device__ static __forceinline__ uint32_t Above(uint32_t key) {
    return kPass == 0 ? 0u : key >> (kShift + kBits);
  }
};

// Sums that stop at 2^62: still associative.
struct SaturatingAdd {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const {
    constexpr uint64_t kMost = uint64_t{1} << 62;
    return a + b < kMost ? a + b : kMost;
  }
};

// The sum over threads below this one, of kRadixThreads, each at most 2^62; *total: over all. `shared` has 33
// elements and may be used again after the call.
template <class Add>
__device__ __forceinline__ uint64_t ScanThreads(uint64_t x, Add add, uint64_t* shared, uint64_t* total) {
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x / 32);
  uint64_t sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum = add(sum, before);
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    const uint64_t mine = shared[lane];
    uint64_t all = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t before = __shfl_up_sync(~0u, all, step);
      if (lane >= step) all = add(all, before);
    }
    const uint64_t below = __shfl_up_sync(~0u, all, 1);
    shared[lane] = lane == 0 ? 0 : below;
    if (lane == 31) shared[32] = all;
  }
  __syncthreads();
  const uint64_t before = __shfl_up_sync(~0u, sum, 1);
  const uint64_t exclusive = add(shared[warp], lane == 0 ? 0 : before);
  *total = shared[32];
  __syncthreads();
  return exclusive;
}

}  // namespace headwater::kernels::device
