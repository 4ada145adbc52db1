#include <cuda_bf16.h>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/sm90/merge_launch.h"

namespace headwater::kernels::sm90 {
namespace {

// What a partial result weighs. A row without keys may hold anything: it is not read.
__device__ __forceinline__ float4 Weighed(const float* row, int at, float weight) {
  if (weight == 0) return make_float4(0, 0, 0, 0);
  const float4 x = *reinterpret_cast<const float4*>(row + at);
  return make_float4(weight * x.x, weight * x.y, weight * x.z, weight * x.w);
}

// kHeadDim / 4 threads a row, four elements each.
template <int kHeadDim>
__global__ void __launch_bounds__(256) MergeKernel(const MergeParams p) {
  constexpr int kThreads = kHeadDim / 4, kRows = 256 / kThreads;
  const int lane = static_cast<int>(threadIdx.x) % kThreads, at = 4 * lane;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
  for (int64_t row = first; row < p.num_rows; row += static_cast<int64_t>(gridDim.x) * kRows) {
    const float lse_a = p.a_lse_ln[row], lse_b = p.b_lse_ln[row];
    const float top = fmaxf(lse_a, lse_b);  // of a NaN and a number: the number
    const bool none = lse_a == -INFINITY && lse_b == -INFINITY;
    const float weight_a = none ? 0.0f : expf(lse_a - top), weight_b = none ? 0.0f : expf(lse_b - top);
    const float sum = weight_a + weight_b, inverse = none ? 0.0f : 1.0f / sum;
    const float4 a = Weighed(p.a + row * kHeadDim, at, weight_a * inverse),
                 b = Weighed(p.b + row * kHeadDim, at, weight_b * inverse);
    const float4 merged = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    if (p.out_f32 != nullptr) *reinterpret_cast<float4*>(p.out_f32 + row * kHeadDim + at) = merged;
    if (p.out != nullptr) {
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.out) + row * kHeadDim + at) =
          make_uint2(device::PackBf16(merged.x, merged.y), device::PackBf16(merged.z, merged.w));
    }
    // lse_ln may be that of a or b: the row's threads, all of one warp, have read by now.
    __syncwarp(kThreads == 32 ? ~0u : 0xFFFFu << (threadIdx.x & 16));
    if (lane == 0 && p.lse_ln != nullptr) p.lse_ln[row] = none ? -INFINITY : top + logf(sum);
  }
}

}  // namespace

cudaError_t LaunchMerge(const MergeParams& params, int head_dim, int num_sms, cudaStream_t stream) {
  const int rows = 256 / (head_dim / 4);
  const int64_t blocks = (params.num_rows + rows - 1) / rows, most = int64_t{16} * num_sms;
  const auto grid = static_cast<unsigned>(blocks < most ? blocks : most);
  if (head_dim == 128) {
    MergeKernel<128><<<grid, 256, 0, stream>>>(params);
  } else {
    MergeKernel<64><<<grid, 256, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
