#include "kernels/cuda/sm90/search_kernel.cuh"
#include "kernels/cuda/sm90/search_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kLanes = 64;  // of a token's row, 8 elements each
constexpr int kGroups = 4;  // that share a window's tokens

// Grid: windows x pieces of 512 elements of a token's row. Thread (lane, group) sums its 8 elements over
// every fourth token, 16 bytes a load; groups meet in shared memory. Reads x once.
__global__ void __launch_bounds__(kLanes* kGroups) WindowMeanKernel(const WindowMeanParams p) {
  __shared__ float sums[kGroups][kLanes][9];
  const int64_t row = static_cast<int64_t>(p.heads) * p.head_dim, window = blockIdx.x;
  const int64_t element = (static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x) * 8;
  const int64_t begin = window * p.window;
  const int tokens = static_cast<int>(p.tokens - begin < p.window ? p.tokens - begin : p.window);
  float sum[8] = {};
  if (element < row) {
    const auto* const x = static_cast<const __nv_bfloat16*>(p.x) + begin * row + element;
#pragma unroll 8
    for (int token = threadIdx.y; token < tokens; token += kGroups) {
      const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(x + token * row));
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] += __uint_as_float(words[i] << 16);
        sum[2 * i + 1] += __uint_as_float(words[i] & 0xFFFF0000u);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[threadIdx.y][threadIdx.x][i] = sum[i];
  __syncthreads();
  if (threadIdx.y != 0 || element >= row) return;
  const int head = static_cast<int>(element / p.head_dim), dim = static_cast<int>(element % p.head_dim);
  const int64_t at =
      ((static_cast<int64_t>(head / p.pack) * gridDim.x + window) * p.pack + head % p.pack) * p.head_dim;
  uint32_t mean[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float pair[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = 0;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) total += sums[group][threadIdx.x][2 * i + e];
      pair[e] = total / static_cast<float>(tokens);
    }
    mean[i] = PackBf16(pair[0], pair[1]);
  }
  *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + at + dim) =
      make_uint4(mean[0], mean[1], mean[2], mean[3]);
}

template <class Traits, int kForcedRows>
cudaError_t Launch(const CUtensorMap& probes, const CUtensorMap& means, const SearchParams& p,
                   cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(typename Traits::Shared));
  auto* const kernel = SearchKernel<Traits, kForcedRows>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int groups = (p.end_tile - p.begin_tile + p.tiles_per_cta - 1) / p.tiles_per_cta;
  kernel<<<static_cast<unsigned>(groups * p.num_heads), Traits::kThreads, kBytes, stream>>>(probes, means, p);
  return cudaGetLastError();
}

template <class Traits>
cudaError_t LaunchFor(const CUtensorMap& probes, const CUtensorMap& means, const SearchParams& p,
                      cudaStream_t stream) {
  if (p.forced_density == 0) return Launch<Traits, 0>(probes, means, p, stream);
  switch (p.row_pack) {
    case 1:
      return Launch<Traits, 1>(probes, means, p, stream);
    case 2:
      return Launch<Traits, 2>(probes, means, p, stream);
    case 4:
      return Launch<Traits, 4>(probes, means, p, stream);
    case 8:
      return Launch<Traits, 8>(probes, means, p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LaunchWindowMeans(const WindowMeanParams& p, cudaStream_t stream) {
  const int64_t windows = (p.tokens + p.window - 1) / p.window;
  const int64_t pieces = (static_cast<int64_t>(p.heads) * p.head_dim + kLanes * 8 - 1) / (kLanes * 8);
  WindowMeanKernel<<<dim3(static_cast<unsigned>(windows), static_cast<unsigned>(pieces)),
                     dim3(kLanes, kGroups), 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchSearch(const CUtensorMap& probes, const CUtensorMap& means, const SearchParams& params,
                         int head_dim, cudaStream_t stream) {
  return head_dim == 128 ? LaunchFor<SearchTraits<128>>(probes, means, params, stream)
                         : LaunchFor<SearchTraits<64>>(probes, means, params, stream);
}

}  // namespace headwater::kernels::sm90
