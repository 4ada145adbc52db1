#include <cuda_bf16.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/sm90/last_rows_launch.h"
#include "kernels/cuda/sm90/online_softmax.cuh"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kTileStride = kLastRowsKeys + 8;  // floats of a row of probabilities: no bank conflicts
constexpr int kSumThreads = 256;

// log2 of a row's sum of 2^score, from its parts.
__device__ float RowNorm(const float2* stats, int splits, int tile_rows, int row) {
  float top = -INFINITY, sum = 0;
  for (int split = 0; split < splits; ++split) top = fmaxf(top, stats[split * tile_rows + row].x);
  for (int split = 0; split < splits; ++split) {
    const float2 part = stats[split * tile_rows + row];
    sum += part.y * Exp2(part.x - top);
  }
  return top + log2f(sum);
}

__device__ __forceinline__ void WriteStats(float2* stats, int warp_row, const RowState& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r] + __shfl_xor_sync(~0u, state.sum[r], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if ((threadIdx.x & 3) == 0) {
      stats[warp_row + 8 * r] = make_float2(state.limit[r] == -INFINITY ? -INFINITY : state.shift[r], sum);
    }
  }
}

// Columns and diagonals of a tile of probabilities, each summed by one thread in the order of rows. Diagonal
// l has the keys that lie l - 63 before their rows' numbers.
template <int kRows>
__device__ __forceinline__ void SumTile(const float* tile, float* columns, int num_columns,
                                        float* diagonals) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kLastRowsKeys) {
    float sum = 0;
#pragma unroll 16
    for (int row = 0; row < kRows; ++row) sum += tile[row * kTileStride + thread];
    if (thread < num_columns) columns[thread] = sum;
    return;
  }
  for (int l = thread - kLastRowsKeys; l < kRows + kLastRowsKeys - 1; l += 2 * kRows - kLastRowsKeys) {
    const int first = l < kLastRowsKeys ? 0 : l - (kLastRowsKeys - 1), last = l < kRows ? l : kRows - 1;
    float sum = 0;
#pragma unroll 8
    for (int row = first; row <= last; ++row) sum += tile[row * kTileStride + row - l + kLastRowsKeys - 1];
    diagonals[l] = sum;
  }
}

// One CTA per split of the keys and query head, 16 rows a warp. First kSums false: shift and sum of each row
// over the split; then true: sums of probabilities.
template <int kDim, int kRows, bool kSums>
__global__ void __launch_bounds__(2 * kRows) LastRowsKernel(const LastRowsParams p, float scale_log2) {
  using Rows = device::MmaRows<kDim>;
  constexpr int kThreads = 2 * kRows;
  constexpr uint32_t kStageBytes = kLastRowsKeys * kDim * 2;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t shared = SharedAddress(memory);
  auto* const tile = reinterpret_cast<float*>(memory + 2 * kStageBytes);
  const CudaLastRowsArgs& a = p.args;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread / 32;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / (a.num_q_heads / a.num_kv_heads);
  const auto* const q = static_cast<const __nv_bfloat16*>(a.q);
  const auto* const k = static_cast<const __nv_bfloat16*>(a.k);
  const int64_t first_token = a.num_tokens - a.last_rows;
  const int64_t begin = blockIdx.x * p.split_blocks;
  const int64_t end = begin + p.split_blocks < p.blocks ? begin + p.split_blocks : p.blocks;

  Rows::template Load<kRows, kThreads>(shared, thread, q, [&](int row) -> const __nv_bfloat16* {
    return row < a.last_rows ? q + ((first_token + row) * a.num_q_heads + head) * kDim : nullptr;
  });
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  __syncthreads();
  uint32_t queries[kDim / 16][4];
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    LoadMatrix4(queries[i], Rows::At(shared, warp * 16 + (lane & 15), 2 * i + (lane >> 4)));
  }
  __syncthreads();
  const auto load = [&](int64_t block, uint32_t stage) {
    Rows::template Load<kLastRowsKeys, kThreads>(stage, thread, k, [&](int row) -> const __nv_bfloat16* {
      const int64_t key = block * kLastRowsKeys + row;
      return key < a.num_tokens ? k + (key * a.num_kv_heads + kv_head) * kDim : nullptr;
    });
  };
  load(begin, shared);
  CopyAsyncCommit();

  const int row = warp * 16 + lane / 4;
  float2* const stats = p.stats + static_cast<int64_t>(head) * p.splits * kRows;
  RowLimits limits;
  limits.first_row = static_cast<int>(first_token);
  float norm[2] = {0, 0};
  for (int r = 0; r < 2; ++r) {
    const bool real = row + 8 * r < a.last_rows;
    limits.last_key[r] = real ? static_cast<int>(first_token) + row + 8 * r : -1;
    if (kSums && real) norm[r] = RowNorm(stats, p.splits, kRows, row + 8 * r);
  }
  RowState state;
  state.Reset();
  for (int64_t block = begin; block < end; ++block) {
    const uint32_t odd = static_cast<uint32_t>(block - begin) & 1, stage = shared + odd * kStageBytes;
    CopyAsyncWait<0>();
    __syncthreads();
    if (block + 1 < end) load(block + 1, shared + (odd ^ 1) * kStageBytes);
    CopyAsyncCommit();
    float s[kLastRowsKeys / 2];
    Rows::template Scores<kLastRowsKeys>(s, queries, stage, 0);
    Mask(s, static_cast<int>(block * kLastRowsKeys), limits);
    if constexpr (kSums) {
#pragma unroll
      for (int i = 0; i < kLastRowsKeys / 2; i += 2) {
        const int r = i >> 1 & 1;
        *reinterpret_cast<float2*>(tile + (row + 8 * r) * kTileStride + i / 4 * 8 + 2 * (lane & 3)) =
            make_float2(Exp2(fmaf(s[i], scale_log2, -norm[r])), Exp2(fmaf(s[i + 1], scale_log2, -norm[r])));
      }
      __syncthreads();
      const int64_t key = block * kLastRowsKeys, left = a.num_tokens - key;
      SumTile<kRows>(tile, a.vertical + head * a.num_tokens + key,
                     static_cast<int>(left < kLastRowsKeys ? left : kLastRowsKeys),
                     p.parts + (head * p.blocks + block) * (kRows + kLastRowsKeys));
    } else {
      float factor[2];
      uint32_t weights[kLastRowsKeys / 4];
      MoveShift(s, scale_log2, &state, factor);
      Weigh(s, scale_log2, &state, weights);
    }
  }
  if (!kSums) WriteStats(stats + static_cast<int64_t>(blockIdx.x) * kRows, row, state);
}

// A distance's diagonals of neighbouring blocks, in the order of keys.
__global__ void __launch_bounds__(kSumThreads) SumDiagonalsKernel(const LastRowsParams p) {
  const int64_t tokens = p.args.num_tokens, head = blockIdx.y;
  const int64_t distance = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (distance >= tokens) return;
  const int64_t stride = p.tile_rows + kLastRowsKeys, diagonals = stride - 1;
  // Diagonal of this distance in block 0.
  const int64_t zero = distance - (tokens - p.args.last_rows) + kLastRowsKeys - 1;
  int64_t block = (-zero + kLastRowsKeys - 1) >> 6;  // rounded up
  block = block < 0 ? 0 : block;
  const float* const parts = p.parts + head * p.blocks * stride;
  float sum = 0;
  for (; block < p.blocks && zero + block * kLastRowsKeys < diagonals; ++block) {
    sum += parts[block * stride + zero + block * kLastRowsKeys];
  }
  p.args.slash[head * tokens + distance] = sum;
}

template <int kDim, int kRows>
cudaError_t Launch(const LastRowsParams& p, cudaStream_t stream) {
  constexpr int kKeyBytes = 2 * kLastRowsKeys * kDim * 2, kSumBytes = kKeyBytes + kRows * kTileStride * 4;
  const cudaError_t error = cudaFuncSetAttribute(LastRowsKernel<kDim, kRows, true>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kSumBytes);
  if (error != cudaSuccess) return error;
  const auto heads = static_cast<unsigned>(p.args.num_q_heads);
  const dim3 grid(static_cast<unsigned>(p.splits), heads);
  const auto scale_log2 = static_cast<float>(p.args.softmax_scale * kLog2E);
  LastRowsKernel<kDim, kRows, false><<<grid, 2 * kRows, kKeyBytes, stream>>>(p, scale_log2);
  LastRowsKernel<kDim, kRows, true><<<grid, 2 * kRows, kSumBytes, stream>>>(p, scale_log2);
  const auto ctas = static_cast<unsigned>((p.args.num_tokens + kSumThreads - 1) / kSumThreads);
  SumDiagonalsKernel<<<dim3(ctas, heads), kSumThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchLastRows(const LastRowsParams& p, cudaStream_t stream) {
  if (p.args.head_dim == 128) {
    return p.tile_rows == 64 ? Launch<128, 64>(p, stream) : Launch<128, 128>(p, stream);
  }
  return p.tile_rows == 64 ? Launch<64, 64>(p, stream) : Launch<64, 128>(p, stream);
}

}  // namespace headwater::kernels::sm90
