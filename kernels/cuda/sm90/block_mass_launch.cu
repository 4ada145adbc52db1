#include "kernels/cuda/check.h"
#include "kernels/cuda/sm90/block_mass_launch.h"
#include "kernels/cuda/sm90/row_products.cuh"

namespace headwater::kernels::sm90 {
namespace {

using device::Exp2;

constexpr int kChunkBlocks = 16;  // key blocks of one CTA of RowMassKernel
constexpr int kShareThreads = 256;

struct Problem {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k;
  int64_t num_tokens, first_query;
  int num_q_heads, num_kv_heads;
  float scale_log2;

  explicit Problem(const CudaMassProblem& p)
      : q(static_cast<const __nv_bfloat16*>(p.q)),
        k(static_cast<const __nv_bfloat16*>(p.k)),
        num_tokens(p.num_tokens),
        first_query(p.first_query),
        num_q_heads(p.num_q_heads),
        num_kv_heads(p.num_kv_heads),
        scale_log2(static_cast<float>(p.softmax_scale * kLog2E)) {}

  __host__ __device__ int Group() const { return num_q_heads / num_kv_heads; }
  __host__ __device__ int Blocks() const { return static_cast<int>((num_tokens + 127) / 128); }
  template <int kDim>
  __device__ __forceinline__ const __nv_bfloat16* Query(int64_t token, int head) const {
    return q + ((token - first_query) * num_q_heads + head) * kDim;
  }
  template <int kDim>
  __device__ __forceinline__ KeyRows Keys(int kv_head) const {
    return {k + int64_t{kv_head} * kDim, int64_t{num_kv_heads} * kDim, num_tokens};
  }
};

// --- maps of heads: a CTA per query block and head, the longest rows first ---

struct MapParams {
  Problem problem;
  const float* lse_ln;
  const int32_t* heads;
  const uint8_t* flags;
  float* average;
};

template <int kDim>
__global__ void __launch_bounds__(RowTile<kDim>::kThreads, 2) BlockMassKernel(const MapParams p) {
  __shared__ float warp_sums[2][8];
  const Problem& problem = p.problem;
  const int head = p.heads == nullptr ? static_cast<int>(blockIdx.y) : p.heads[blockIdx.y];
  if (head < 0 || head >= problem.num_q_heads || (p.flags != nullptr && p.flags[head] == 0)) return;
  const int blocks = problem.Blocks(), own = blocks - 1 - static_cast<int>(blockIdx.x);
  const int64_t begin = int64_t{own} * 128;
  const int tokens = static_cast<int>(problem.num_tokens - begin < 128 ? problem.num_tokens - begin : 128);
  float* const out = p.average + (static_cast<int64_t>(blockIdx.y) * blocks + own) * blocks;
  const int thread = static_cast<int>(threadIdx.x), column = 2 * (thread & 3);

  float lse_log2[2];  // infinity: no query
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = RowOfThread(r);
    lse_log2[r] = INFINITY;
    if (row < tokens) {
      lse_log2[r] = p.lse_ln[(begin + row) * problem.num_q_heads + head] * static_cast<float>(kLog2E);
    }
  }
  const auto write = [&](int block) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += warp_sums[block & 1][i];
    out[block] = sum / static_cast<float>(tokens);
  };
  RowTile<kDim>::Run(
      problem.Keys<kDim>(head / problem.Group()), 0, own + 1,
      [&](int row) { return row < tokens ? problem.Query<kDim>(begin + row, head) : nullptr; },
      [&](float(&s)[64], int block) {
        if (thread == 0 && block > 0) write(block - 1);  // its sums came before the last barrier
        float sum[2] = {};
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          const int r = i >> 1 & 1;
          float e = Exp2(fmaf(s[i], problem.scale_log2, -lse_log2[r]));
          if (block == own && column + 8 * (i >> 2) + (i & 1) > RowOfThread(r)) e = 0;
          sum[r] += e;
        }
        float both = sum[0] + sum[1];
#pragma unroll
        for (int bit = 1; bit < 32; bit *= 2) both += __shfl_xor_sync(~0u, both, bit);
        if ((thread & 31) == 0) warp_sums[block & 1][thread >> 5] = both;
      });
  if (thread == 0) write(own);
  for (int block = own + 1 + thread; block < blocks; block += RowTile<kDim>::kThreads) out[block] = 0;
}

// --- lse of heads: a CTA per query block and head, the longest rows first ---

struct LseParams {
  Problem problem;
  const int32_t* heads;
  float* lse_ln;
};

template <int kDim>
__global__ void __launch_bounds__(RowTile<kDim>::kThreads, 2) LogSumExpKernel(const LseParams p) {
  const Problem& problem = p.problem;
  const int head = p.heads == nullptr ? static_cast<int>(blockIdx.y) : p.heads[blockIdx.y];
  if (head < 0 || head >= problem.num_q_heads) return;
  const int own = problem.Blocks() - 1 - static_cast<int>(blockIdx.x);
  const int64_t begin = int64_t{own} * 128;
  const int tokens = static_cast<int>(problem.num_tokens - begin < 128 ? problem.num_tokens - begin : 128);
  const int column = 2 * (static_cast<int>(threadIdx.x) & 3);
  // Of the columns that this thread holds.
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  RowTile<kDim>::Run(
      problem.Keys<kDim>(head / problem.Group()), 0, own + 1,
      [&](int row) { return row < tokens ? problem.Query<kDim>(begin + row, head) : nullptr; },
      [&](float(&s)[64], int block) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int last = block == own ? RowOfThread(r) - column : 128;
          float most = top[r];
#pragma unroll
          for (int n = 0; n < 16; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& x = s[4 * n + 2 * r + c];
              x = 8 * n + c <= last ? x * problem.scale_log2 : -INFINITY;
              most = fmaxf(most, x);
            }
          }
          const float base = most == -INFINITY ? 0 : most;
          sum[r] *= Exp2(top[r] - base);
          top[r] = most;
#pragma unroll
          for (int n = 0; n < 16; ++n) {
            sum[r] += Exp2(s[4 * n + 2 * r] - base) + Exp2(s[4 * n + 2 * r + 1] - base);
          }
        }
      });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float most = QuadMax(top[r]), all = QuadSum(sum[r] * Exp2(top[r] - most));
    const int row = RowOfThread(r);
    if (column == 0 && row < tokens) {
      p.lse_ln[(begin + row) * problem.num_q_heads + head] =
          (most + log2f(all)) * static_cast<float>(1 / kLog2E);
    }
  }
}

// --- masses of sampled rows ---

struct RowParams {
  Problem problem;
  CudaSampledRows rows;
  float* mass;
};

// -1: no query.
__device__ __forceinline__ int PositionOf(const CudaSampledRows& rows, int row, int64_t first, int64_t end) {
  const int64_t position = rows.positions != nullptr ? rows.positions[row] : rows.positions_i32[row];
  return position >= first && position < end ? static_cast<int>(position) : -1;
}

// log2 of the sum of exp over the keys of each block, at the place of its mass. A CTA: 128 (sampled row, head
// of the KV head's group) pairs and kChunkBlocks blocks.
template <int kDim>
__global__ void __launch_bounds__(RowTile<kDim>::kThreads, 2) RowMassKernel(const RowParams p) {
  __shared__ int position_of[128];
  __shared__ int furthest;
  const Problem& problem = p.problem;
  const int group = problem.Group(), kv_head = static_cast<int>(blockIdx.z), blocks = problem.Blocks();
  const int64_t first = static_cast<int64_t>(blockIdx.y) * 128, pairs = int64_t{p.rows.num_rows} * group;
  const int thread = static_cast<int>(threadIdx.x), column = 2 * (thread & 3);
  if (thread == 0) furthest = -1;
  __syncthreads();
  if (thread < 128) {
    int position = -1;
    if (first + thread < pairs) {
      position = PositionOf(p.rows, static_cast<int>((first + thread) / group), problem.first_query,
                            problem.num_tokens);
    }
    position_of[thread] = position;
    atomicMax(&furthest, position);
  }
  __syncthreads();
  const auto head_of = [&](int row) { return kv_head * group + static_cast<int>((first + row) % group); };
  const int begin = static_cast<int>(blockIdx.x) * kChunkBlocks;
  const int end = min(begin + kChunkBlocks, furthest < 0 ? 0 : furthest / 128 + 1);
  int position[2];
  float* out[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = RowOfThread(r);
    position[r] = position_of[row];
    out[r] = p.mass + ((first + row) / group * problem.num_q_heads + head_of(row)) * blocks;
  }
  RowTile<kDim>::Run(
      problem.Keys<kDim>(kv_head), begin, end,
      [&](int row) {
        const int at = position_of[row];
        return at < 0 ? nullptr : problem.Query<kDim>(at, head_of(row));
      },
      [&](float(&s)[64], int block) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int last = position[r] - block * 128 - column;  // columns past it are not seen
          float top = -INFINITY, sum = 0;
#pragma unroll
          for (int n = 0; n < 16; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& x = s[4 * n + 2 * r + c];
              x = 8 * n + c <= last ? x * problem.scale_log2 : -INFINITY;
              top = fmaxf(top, x);
            }
          }
          top = QuadMax(top);
          const float base = top == -INFINITY ? 0 : top;
#pragma unroll
          for (int n = 0; n < 16; ++n)
            sum += Exp2(s[4 * n + 2 * r] - base) + Exp2(s[4 * n + 2 * r + 1] - base);
          sum = QuadSum(sum);
          if ((thread & 3) == 0 && position[r] / 128 >= block && position[r] >= 0) {
            out[r][block] = base + log2f(sum);
          }
        }
      });
}

// A CTA per sampled row and head: from log2 of the blocks' sums to their shares.
__global__ void __launch_bounds__(kShareThreads) ShareKernel(const RowParams p) {
  __shared__ float warps[2][kShareThreads / 32];
  const int blocks = p.problem.Blocks(), thread = static_cast<int>(threadIdx.x);
  const int position =
      PositionOf(p.rows, static_cast<int>(blockIdx.x), p.problem.first_query, p.problem.num_tokens);
  float* const row =
      p.mass + (static_cast<int64_t>(blockIdx.x) * p.problem.num_q_heads + blockIdx.y) * blocks;
  const int seen = position < 0 ? 0 : position / 128 + 1;
  float top = -INFINITY;
  for (int block = thread; block < seen; block += kShareThreads) top = fmaxf(top, row[block]);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
  if ((thread & 31) == 0) warps[0][thread >> 5] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kShareThreads / 32; ++i) top = fmaxf(top, warps[0][i]);
  float sum = 0;
  for (int block = thread; block < seen; block += kShareThreads) sum += Exp2(row[block] - top);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  if ((thread & 31) == 0) warps[1][thread >> 5] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int i = 0; i < kShareThreads / 32; ++i) sum += warps[1][i];
  const float inverse = 1 / sum;
  for (int block = thread; block < blocks; block += kShareThreads) {
    row[block] = block < seen ? Exp2(row[block] - top) * inverse : 0;
  }
}

// --- recall: a warp per row and head ---

__global__ void __launch_bounds__(kShareThreads) RecallKernel(const CudaRecallArgs p) {
  const int lane = static_cast<int>(threadIdx.x & 31), blocks = static_cast<int>((p.num_tokens + 127) / 128);
  const int64_t pair = (static_cast<int64_t>(blockIdx.x) * kShareThreads + threadIdx.x) / 32;
  if (pair >= int64_t{p.rows.num_rows} * p.num_q_heads) return;
  const int head = static_cast<int>(pair % p.num_q_heads);
  const int64_t first = p.queries.first, count = p.queries.count > 0 ? p.queries.count : p.num_tokens;
  const int position = PositionOf(p.rows, static_cast<int>(pair / p.num_q_heads), first, first + count);
  const CudaBlockLists& lists = p.lists;
  float held = position < 0 ? 0 : 1;
  if (position >= 0 && lists.num_lists > 0) {
    const int pack = p.num_q_heads / lists.num_lists, positions = 128 / pack;
    const int64_t tiles = (count + positions - 1) / positions;
    const int64_t segment = head / pack * tiles + (position - first) / positions;
    const int count = lists.counts[segment];
    if (count >= 0) {
      const int32_t* const list = lists.blocks + lists.offsets[segment];
      held = 0;
      for (int i = lane; i < count; i += 32) {
        const int block = list[i];
        if (block >= 0 && block <= position / 128) held += p.mass[pair * blocks + block];
      }
#pragma unroll
      for (int bit = 1; bit < 32; bit *= 2) held += __shfl_xor_sync(~0u, held, bit);
    }
  }
  if (lane == 0) p.recall[pair] = held;
}

template <typename Kernel, typename Params>
cudaError_t Launch(Kernel kernel, int shared_bytes, dim3 grid, int threads, const Params& params,
                   cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchBlockMass(const CudaBlockMassArgs& a, cudaStream_t stream) {
  const MapParams params{Problem(a.problem), a.lse_ln, a.heads, a.flags, a.average};
  const dim3 grid(static_cast<unsigned>(params.problem.Blocks()), static_cast<unsigned>(a.num_heads));
  if (a.problem.head_dim == 128) {
    return Launch(BlockMassKernel<128>, RowTile<128>::kSharedBytes, grid, RowTile<128>::kThreads, params,
                  stream);
  }
  return Launch(BlockMassKernel<64>, RowTile<64>::kSharedBytes, grid, RowTile<64>::kThreads, params, stream);
}

cudaError_t LaunchLogSumExp(const CudaLogSumExpArgs& a, cudaStream_t stream) {
  const LseParams params{Problem(a.problem), a.heads, a.lse_ln};
  const dim3 grid(static_cast<unsigned>(params.problem.Blocks()), static_cast<unsigned>(a.num_heads));
  if (a.problem.head_dim == 128) {
    return Launch(LogSumExpKernel<128>, RowTile<128>::kSharedBytes, grid, RowTile<128>::kThreads, params,
                  stream);
  }
  return Launch(LogSumExpKernel<64>, RowTile<64>::kSharedBytes, grid, RowTile<64>::kThreads, params, stream);
}

cudaError_t LaunchRowMass(const CudaRowMassArgs& a, cudaStream_t stream) {
  const RowParams params{Problem(a.problem), a.rows, a.mass};
  const Problem& problem = params.problem;
  const int64_t pairs = int64_t{a.rows.num_rows} * problem.Group();
  const dim3 grid(static_cast<unsigned>((problem.Blocks() + kChunkBlocks - 1) / kChunkBlocks),
                  static_cast<unsigned>((pairs + 127) / 128), static_cast<unsigned>(problem.num_kv_heads));
  cudaError_t error;
  if (a.problem.head_dim == 128) {
    error =
        Launch(RowMassKernel<128>, RowTile<128>::kSharedBytes, grid, RowTile<128>::kThreads, params, stream);
  } else {
    error = Launch(RowMassKernel<64>, RowTile<64>::kSharedBytes, grid, RowTile<64>::kThreads, params, stream);
  }
  if (error != cudaSuccess) return error;
  ShareKernel<<<dim3(static_cast<unsigned>(a.rows.num_rows), static_cast<unsigned>(problem.num_q_heads)),
                kShareThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchRecall(const CudaRecallArgs& a, cudaStream_t stream) {
  const int64_t pairs = int64_t{a.rows.num_rows} * a.num_q_heads;
  RecallKernel<<<static_cast<unsigned>((pairs * 32 + kShareThreads - 1) / kShareThreads), kShareThreads, 0,
                 stream>>>(a);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
