// The pooled map of query-aware heads, and its best blocks.
#include <cmath>

#include <cuda_bf16.h>

#include "kernels/cuda/device/radix.cuh"
#include "kernels/cuda/device/vectors.cuh"
#include "kernels/cuda/sm90/flex_launch.h"

namespace headwater::kernels::sm90 {
namespace {

using namespace headwater::kernels::device;  // NOLINT: the kernels are written in these

constexpr int kThreads = 256;
constexpr unsigned kMostCtas = 256;     // a slot, for means of q
constexpr int kTile = 64, kDepth = 32;  // of the map's products

__global__ void __launch_bounds__(32) ListHeadsKernel(const __grid_constant__ FlexPooledParams p) {
  int count = 0;
  for (int first = 0; first < p.args.num_q_heads; first += 32) {
    const int head = first + static_cast<int>(threadIdx.x);
    const bool aware = head < p.args.num_q_heads && p.args.query_aware[head] != 0;
    const uint32_t lanes = __ballot_sync(~0u, aware);
    if (aware) p.heads[count + __popc(lanes & ((1u << threadIdx.x) - 1))] = head;
    count += __popc(lanes);
  }
  if (threadIdx.x == 0) *p.num_heads = count;
}

// The head in a slot of the group that starts at `first`; -1: none.
__device__ __forceinline__ int HeadOf(const FlexPooledParams& p, int first, int slot) {
  return first + slot < *p.num_heads ? p.heads[first + slot] : -1;
}

template <int kDim>
__device__ void MeanOfBlock(const FlexPooledParams& p, int head, int64_t block, float* out) {
  constexpr int kPieces = kDim / 8, kGroups = kThreads / kPieces;
  __shared__ alignas(16) float parts[kGroups][kDim];
  const int piece = static_cast<int>(threadIdx.x) % kPieces, group = static_cast<int>(threadIdx.x) / kPieces;
  const int64_t begin = block * 128;
  const int tokens = static_cast<int>(p.args.num_tokens - begin < 128 ? p.args.num_tokens - begin : 128);
  const auto* const q = static_cast<const __nv_bfloat16*>(p.args.q);
  float sum[8] = {};
#pragma unroll
  for (int row = group; row < 128; row += kGroups) {
    if (row >= tokens) continue;
    float x[8];
    Load8(q, ((begin + row) * p.args.num_q_heads + head) * kDim + piece * 8, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += x[i];
  }
  Store8(&parts[group][0], piece * 8, sum);
  __syncthreads();
  if (threadIdx.x < kDim) {
    float total = 0;
    for (int i = 0; i < kGroups; ++i) total += parts[i][threadIdx.x];
    out[threadIdx.x] = total / static_cast<float>(tokens);
  }
  __syncthreads();
}

// Few CTAs, for most heads leave at once.
template <int kDim>
__global__ void __launch_bounds__(kThreads)
    QueryMeansKernel(const __grid_constant__ FlexPooledParams p, int first) {
  const int slot = static_cast<int>(blockIdx.y), head = HeadOf(p, first, slot);
  if (head < 0) return;
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    MeanOfBlock<kDim>(p, head, block, p.q_mean + (slot * p.blocks + block) * kDim);
  }
}

// Scaled products of 64 rows and 64 columns of a slot's map, 4 by 4 a thread.
template <int kDim>
__global__ void __launch_bounds__(kThreads)
    PooledProductsKernel(const __grid_constant__ FlexPooledParams p, int first) {
  __shared__ alignas(16) float a[kDepth][kTile + 4], b[kDepth][kTile + 4];
  const int slot = static_cast<int>(blockIdx.z), head = HeadOf(p, first, slot);
  if (head < 0 || blockIdx.x > blockIdx.y) return;
  const int64_t row0 = int64_t{blockIdx.y} * kTile, column0 = int64_t{blockIdx.x} * kTile;
  const int kv_heads = p.args.num_kv_heads, kv_head = head / (p.args.num_q_heads / kv_heads);
  const int thread = static_cast<int>(threadIdx.x), y = thread / 16 * 4, x = thread % 16 * 4;
  float s[4][4] = {};
  for (int depth = 0; depth < kDim; depth += kDepth) {
    for (int i = thread; i < kTile * kDepth; i += kThreads) {
      const int r = i / kDepth, k = i % kDepth;
      const int64_t row = row0 + r, column = column0 + r;
      a[k][r] = row < p.blocks ? p.q_mean[(slot * p.blocks + row) * kDim + depth + k] : 0.0f;
      b[k][r] = column < p.blocks ? p.args.k_mean[(column * kv_heads + kv_head) * kDim + depth + k] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const float4 av = *reinterpret_cast<const float4*>(&a[k][y]);
      const float4 bv = *reinterpret_cast<const float4*>(&b[k][x]);
      const float as[4] = {av.x, av.y, av.z, av.w}, bs[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][j] = __fmaf_rn(as[i], bs[j], s[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + y + i;
    if (row >= p.blocks) continue;
    float* const out = p.maps + slot * p.map + row * (row + 1) / 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column0 + x + j <= row) out[column0 + x + j] = s[i][j] * p.args.softmax_scale;
    }
  }
}

// What a warp works on: a row of a slot's map.
struct MapRow {
  int64_t row;
  float* map;

  __device__ explicit MapRow(const FlexPooledParams& p) {
    row = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
    map = p.maps + blockIdx.y * p.map + row * (row + 1) / 2;
  }
};

__global__ void __launch_bounds__(kThreads)
    PooledSoftmaxKernel(const __grid_constant__ FlexPooledParams p, int first) {
  const MapRow at(p);
  if (HeadOf(p, first, static_cast<int>(blockIdx.y)) < 0 || at.row >= p.blocks) return;
  const int lane = static_cast<int>(threadIdx.x & 31);
  float top = -INFINITY;
  for (int64_t i = lane; i <= at.row; i += 32) top = fmaxf(top, at.map[i]);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
  float sum = 0;
  for (int64_t i = lane; i <= at.row; i += 32) sum += expf(at.map[i] - top);
  sum = SumLanes(sum, 1, 32);
  for (int64_t i = lane; i <= at.row; i += 32) at.map[i] = expf(at.map[i] - top) / sum;
}

// Whether only some of the entries at the threshold are taken, so that their order matters.
__device__ __forceinline__ bool SomeTies(const CoverState& state) {
  return state.done == 0 && state.take > 0;
}

__global__ void __launch_bounds__(kThreads)
    CountTiesKernel(const __grid_constant__ FlexPooledParams p, int first) {
  const MapRow at(p);
  const int slot = static_cast<int>(blockIdx.y);
  if (HeadOf(p, first, slot) < 0 || at.row >= p.blocks) return;
  const CoverState state = p.share.states[slot];
  if (!SomeTies(state)) return;
  uint32_t ties = 0;
  for (int64_t i = threadIdx.x & 31; i <= at.row; i += 32) ties += RadixKey(at.map[i]) == state.key ? 1 : 0;
  ties = __reduce_add_sync(~0u, ties);
  if (threadIdx.x % 32 == 0) p.ties[slot * p.blocks + at.row] = ties;
}

// Ties of the rows above each row, in place.
__global__ void __launch_bounds__(kRadixThreads)
    ScanTiesKernel(const __grid_constant__ FlexPooledParams p, int first) {
  __shared__ uint64_t shared[33];
  const int slot = static_cast<int>(blockIdx.x);
  if (HeadOf(p, first, slot) < 0 || !SomeTies(p.share.states[slot])) return;
  uint64_t above = 0;
  for (int64_t begin = 0; begin < p.blocks; begin += kRadixThreads) {
    const int64_t row = begin + threadIdx.x;
    uint64_t* const ties = p.ties + slot * p.blocks + row;
    uint64_t total = 0;
    const uint64_t before = ScanThreads(row < p.blocks ? *ties : 0, SaturatingAdd(), shared, &total);
    if (row < p.blocks) *ties = above + before;
    above += total;
  }
}

__global__ void __launch_bounds__(kThreads)
    AddPooledKernel(const __grid_constant__ FlexPooledParams p, int first) {
  const MapRow at(p);
  const int slot = static_cast<int>(blockIdx.y), head = HeadOf(p, first, slot);
  if (head < 0 || at.row >= p.blocks) return;
  const int lane = static_cast<int>(threadIdx.x & 31);
  const CoverState state = p.share.states[slot];
  uint64_t rank = SomeTies(state) ? p.ties[slot * p.blocks + at.row] : 0;
  uint32_t* const words = p.args.masks.words + (head * p.blocks + at.row) * ((p.blocks + 31) / 32);
  for (int64_t word = 0; word <= at.row / 32; ++word) {
    const int64_t column = 32 * word + lane;
    const bool visible = column <= at.row;
    const uint32_t key = visible ? RadixKey(at.map[column]) : 0;
    const bool tie = visible && state.done == 0 && key == state.key;
    const uint32_t ties = __ballot_sync(~0u, tie);
    const uint64_t mine = rank + static_cast<uint64_t>(__popc(ties & ((1u << lane) - 1)));
    const bool chosen = visible && (state.done != 0 || key > state.key || (tie && mine < state.take));
    const uint32_t bits = __ballot_sync(~0u, chosen);
    if (lane == 0 && bits != 0) words[word] |= bits;
    rank += static_cast<uint64_t>(__popc(ties));
  }
}

template <int kDim>
cudaError_t Launch(FlexPooledParams p, cudaStream_t stream) {
  const auto slots = static_cast<unsigned>(p.slots), blocks = static_cast<unsigned>(p.blocks);
  const unsigned tiles = (blocks + kTile - 1) / kTile, rows = (blocks + kThreads / 32 - 1) / (kThreads / 32);
  ListHeadsKernel<<<1, 32, 0, stream>>>(p);
  for (int first = 0; first < p.args.num_q_heads; first += p.slots) {
    p.share.first_active = first;
    QueryMeansKernel<kDim>
        <<<dim3(blocks < kMostCtas ? blocks : kMostCtas, slots), kThreads, 0, stream>>>(p, first);
    PooledProductsKernel<kDim><<<dim3(tiles, tiles, slots), kThreads, 0, stream>>>(p, first);
    PooledSoftmaxKernel<<<dim3(rows, slots), kThreads, 0, stream>>>(p, first);
    if (const cudaError_t error = LaunchCover(p.share, stream); error != cudaSuccess) return error;
    CountTiesKernel<<<dim3(rows, slots), kThreads, 0, stream>>>(p, first);
    ScanTiesKernel<<<slots, kRadixThreads, 0, stream>>>(p, first);
    AddPooledKernel<<<dim3(rows, slots), kThreads, 0, stream>>>(p, first);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchFlexPooled(const FlexPooledParams& params, cudaStream_t stream) {
  return params.args.head_dim == 128 ? Launch<128>(params, stream) : Launch<64>(params, stream);
}

}  // namespace headwater::kernels::sm90
