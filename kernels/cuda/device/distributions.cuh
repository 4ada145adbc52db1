// Comparison of two distributions by one CTA of 1024 threads.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/radix.cuh"

namespace headwater::kernels::device {

struct AddDoubles {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
struct MaxDoubles {  // of a NaN and a number: the number
  __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};

// Over all kRadixThreads, in a fixed order; every thread gets the result. `shared` has 32 elements and may be
// used again after the call.
template <class Merge>
__device__ __forceinline__ double ReduceThreads(double x, Merge merge, double* shared) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) x = merge(x, __shfl_xor_sync(~0u, x, bit));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double all = shared[0];
  for (int warp = 1; warp < kRadixThreads / 32; ++warp) all = merge(all, shared[warp]);
  __syncthreads();
  return all;
}

// A term of sum p ln(p / m) / 2 + q ln(q / m) / 2, m = (p + q) / 2; NaN where one of both is not 0 or more,
// or, by nan_rule, where one is 0 in f32.
__device__ __forceinline__ double JsTerm(double p, double q, bool nan_rule) {
  if (!(p >= 0) || !(q >= 0)) return NAN;
  if (nan_rule && (static_cast<float>(p) == 0 || static_cast<float>(q) == 0)) return NAN;
  const double m = (p + q) / 2;
  return (p > 0 ? 0.5 * p * log(p / m) : 0.0) + (q > 0 ? 0.5 * q * log(q / m) : 0.0);
}
// From the sum of all terms.
__device__ __forceinline__ double JsDistanceOf(double sum) { return sqrt(sum < 0 ? 0 : sum); }

}  // namespace headwater::kernels::device
