// Rows that a CTA holds in registers, written as e4m3 with a scale (the rule: cuda/quantize.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/device/vectors.cuh"
#include "kernels/cuda/quantize.h"

namespace headwater::kernels::device {

// The CTA's largest value, NaN if there is one; every thread gets it. One use of `shared`, a float for each
// warp, per launch.
__device__ __forceinline__ float MaxThreads(float x, float* shared) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) x = MaxOrNan(x, __shfl_xor_sync(0xFFFFFFFFu, x, bit));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x = MaxOrNan(x, shared[warp]);
  return x;
}

__device__ __forceinline__ uint2 NarrowE4m3(const float (&x)[8], float inverse) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = PackE4m3(__fmul_rn(x[2 * i], inverse), __fmul_rn(x[2 * i + 1], inverse));
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// x[chunk] holds elements from (chunk * blockDim.x + threadIdx.x) * 8 on; those past `width` are left out.
// All threads call.
template <int kChunks>
__device__ __forceinline__ void StoreQuantized(const float (&x)[kChunks][8], int64_t width, uint8_t* out,
                                               float* scale, float* shared) {
  float most = kLeastRowMaximum;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if ((chunk * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 8 >= width) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = MaxOrNan(most, fabsf(x[chunk][i]));
  }
  most = MaxThreads(most, shared);
  const bool finite = isfinite(most);
  const float inverse = finite ? __fdiv_rn(kMostE4m3, most) : NAN;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t at = (chunk * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 8;
    if (at < width) *reinterpret_cast<uint2*>(out + at) = NarrowE4m3(x[chunk], inverse);
  }
  if (threadIdx.x == 0) *scale = finite ? __fdiv_rn(most, kMostE4m3) : NAN;
}

}  // namespace headwater::kernels::device
