// 16-byte accesses of bf16 and f32 rows, and conversions in registers.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/ptx.cuh"

namespace headwater::kernels::device {

__device__ __forceinline__ float Bf16Low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float Bf16High(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ void Widen(const uint4& bits, float (&x)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = Bf16Low(words[i]);
    x[2 * i + 1] = Bf16High(words[i]);
  }
}
__device__ __forceinline__ uint4 Narrow(const float (&x)[8]) {
  return make_uint4(PackBf16(x[0], x[1]), PackBf16(x[2], x[3]), PackBf16(x[4], x[5]), PackBf16(x[6], x[7]));
}

// Elements [at, at + 8) of a row of bf16 or f32; at % 8 == 0, the row 16-byte aligned.
__device__ __forceinline__ void Load8(const __nv_bfloat16* row, int64_t at, float (&x)[8]) {
  Widen(*reinterpret_cast<const uint4*>(row + at), x);
}
__device__ __forceinline__ void Load8(const float* row, int64_t at, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 four = *reinterpret_cast<const float4*>(row + at + 4 * i);
    x[4 * i] = four.x;
    x[4 * i + 1] = four.y;
    x[4 * i + 2] = four.z;
    x[4 * i + 3] = four.w;
  }
}
__device__ __forceinline__ void Store8(__nv_bfloat16* row, int64_t at, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(row + at) = Narrow(x);
}
__device__ __forceinline__ void Store8(float* row, int64_t at, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<float4*>(row + at + 4 * i) =
        make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  }
}

// What Store8() would leave for Load8() to find.
__device__ __forceinline__ void RoundAs(const __nv_bfloat16*, float (&x)[8]) { Widen(Narrow(x), x); }
__device__ __forceinline__ void RoundAs(const float*, float (&)[8]) {}

// A NaN on either side wins, unlike fminf and fmaxf.
__device__ __forceinline__ float MinOrNan(float a, float b) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
  return least;
}
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// Sums over lanes that differ in the bits of [from, to), powers of two: every lane gets the same bits.
__device__ __forceinline__ float SumLanes(float x, int from, int to) {
#pragma unroll
  for (int bit = from; bit < to; bit *= 2) x = __fadd_rn(x, __shfl_xor_sync(0xFFFFFFFFu, x, bit));
  return x;
}

}  // namespace headwater::kernels::device
