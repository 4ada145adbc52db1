#include <cuda_bf16.h>

#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/sm90/recall_threshold_launch.h"
#include "kernels/cuda/sm90/search_params.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kMostPack = 8;
constexpr int kCounts = kRecallSteps + 1;  // of steps; one more counts what no threshold lists
constexpr float kStepsPerOctave = kRecallStepsPerOctave;
// Masses are added as whole numbers of 2^-40, in any order.
constexpr double kMassUnit = 1.0 / (int64_t{1} << 40);

struct CurveParams {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k_means;
  int64_t num_tokens, table_rows, first_query, end_query;
  int num_q_heads, num_kv_heads, positions, first_dense_tile;
  float scale_log2;
  int sink_blocks;
  int window_blocks[kSearchHeads];
  CudaSampledRows rows;
  const float* mass;
  float* curve;
};

struct Shared {
  float probe[kMostPack][128];
  float of_warp[2][kMostPack][kWarps];
  float lse[kMostPack];
  unsigned long long held[kCounts + 1];
};

__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}

// Scores of one block by each head's probe, log2 units: one thread's.
template <int kDim, int kPack>
__device__ __forceinline__ void Scores(const Shared& shared, const __nv_bfloat16* mean, float scale_log2,
                                       float (&score)[kPack]) {
#pragma unroll
  for (int h = 0; h < kPack; ++h) score[h] = 0;
#pragma unroll 4
  for (int i = 0; i < kDim; i += 8) {
    const uint4 bits = *reinterpret_cast<const uint4*>(mean + i);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float low = __uint_as_float(words[w] << 16), high = __uint_as_float(words[w] & 0xFFFF0000u);
#pragma unroll
      for (int h = 0; h < kPack; ++h) {
        score[h] = fmaf(shared.probe[h][i + 2 * w], low, score[h]);
        score[h] = fmaf(shared.probe[h][i + 2 * w + 1], high, score[h]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kPack; ++h) score[h] *= scale_log2;
}

// A CTA per sampled row and KV head. The rule is that of search_kernel.cuh, by sums in another order.
template <int kDim, int kPack>
__global__ void __launch_bounds__(kThreads) CurveKernel(const __grid_constant__ CurveParams p) {
  __shared__ Shared shared;
  const int row = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), warp = thread >> 5;
  const int64_t position = p.rows.positions != nullptr ? p.rows.positions[row] : p.rows.positions_i32[row];
  float* const curve = p.curve + (static_cast<int64_t>(row) * p.num_kv_heads + kv_head) * kCounts;
  if (position < p.first_query || position >= p.end_query) {
    for (int step = thread; step < kCounts; step += kThreads) curve[step] = 0;
    return;
  }
  const int64_t tile = (position - p.first_query) / p.positions, first = p.first_query + tile * p.positions;
  const int64_t end = first + p.positions < p.end_query ? first + p.positions : p.end_query;
  const int complete = static_cast<int>((first + 1) / 128), total = static_cast<int>((end + 127) / 128);
  const int window = min(total - p.window_blocks[kv_head], complete);
  const int own = static_cast<int>(position / 128), blocks = static_cast<int>((p.num_tokens + 127) / 128);
  const __nv_bfloat16* const means = p.k_means + kv_head * p.table_rows * kDim;

  for (int i = thread; i <= kCounts; i += kThreads) shared.held[i] = 0;
  for (int i = thread; i < kPack * kDim; i += kThreads) {
    const __nv_bfloat16* const x = p.q + kv_head * kPack * kDim + i;
    float sum = 0;
    for (int64_t token = first; token < end; ++token) {
      sum += __bfloat162float(x[(token - p.first_query) * p.num_q_heads * kDim]);
    }
    shared.probe[i / kDim][i % kDim] =
        __bfloat162float(__float2bfloat16(sum / static_cast<float>(end - first)));
  }
  __syncthreads();

  float score[kPack], top[kPack], sum[kPack];
#pragma unroll
  for (int h = 0; h < kPack; ++h) {
    top[h] = -INFINITY;
    sum[h] = 0;
  }
  for (int block = thread; block < complete; block += kThreads) {
    Scores<kDim>(shared, means + static_cast<int64_t>(block) * kDim, p.scale_log2, score);
#pragma unroll
    for (int h = 0; h < kPack; ++h) {
      const float higher = fmaxf(top[h], score[h]), base = higher == -INFINITY ? 0 : higher;
      sum[h] = sum[h] * exp2f(top[h] - base) + exp2f(score[h] - base);
      top[h] = higher;
    }
  }
#pragma unroll
  for (int h = 0; h < kPack; ++h) {
    const float most = WarpMax(top[h]), base = most == -INFINITY ? 0 : most;
    const float all = WarpSum(sum[h] * exp2f(top[h] - base));
    if ((thread & 31) == 0) {
      shared.of_warp[0][h][warp] = most;
      shared.of_warp[1][h][warp] = all;
    }
  }
  __syncthreads();
  float best = -INFINITY;
#pragma unroll
  for (int h = 0; h < kPack; ++h) {
    float most = -INFINITY, all = 0;
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared.of_warp[0][h][w]);
    for (int w = 0; w < kWarps; ++w) {
      if (shared.of_warp[0][h][w] != -INFINITY)
        all += shared.of_warp[1][h][w] * exp2f(shared.of_warp[0][h][w] - most);
    }
    const float lse = most + log2f(all);
    if (thread == 0) shared.lse[h] = lse;
    best = fmaxf(best, most - lse);
  }
  __syncthreads();

  const bool dense = tile >= p.first_dense_tile;
  const float* const mass = p.mass + (static_cast<int64_t>(row) * p.num_q_heads + kv_head * kPack) * blocks;
  for (int block = thread; block <= own; block += kThreads) {
    float step = 0;
    if (!dense && block >= p.sink_blocks && block < window) {
      Scores<kDim>(shared, means + static_cast<int64_t>(block) * kDim, p.scale_log2, score);
      float of_tile = -INFINITY;
#pragma unroll
      for (int h = 0; h < kPack; ++h) of_tile = fmaxf(of_tile, score[h] - shared.lse[h]);
      step = ceilf((best - of_tile) * kStepsPerOctave);
      if (!(step <= kRecallSteps)) step = kCounts;
    }
    float held = 0;
#pragma unroll
    for (int h = 0; h < kPack; ++h) held += mass[static_cast<int64_t>(h) * blocks + block];
    if (held > 0 && held < 2 * kPack) {  // else not a number, or nothing
      atomicAdd(&shared.held[max(0, static_cast<int>(step))],
                static_cast<unsigned long long>(static_cast<double>(held) / kMassUnit));
    }
  }
  __syncthreads();
  for (int step = thread; step < kCounts; step += kThreads) {
    unsigned long long held = 0;
    for (int i = 0; i <= step; ++i) held += shared.held[i];
    curve[step] = static_cast<float>(static_cast<double>(held) * kMassUnit / kPack);
  }
}

// A CTA per KV head; steps by threads in turn.
__global__ void __launch_bounds__(kThreads)
    FirstStepKernel(const float* curve, int rows, float min_recall, float errors, float* thresholds) {
  __shared__ int first;
  const int thread = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.x);
  const int heads = static_cast<int>(gridDim.x);
  if (thread == 0) first = kCounts;
  __syncthreads();
  for (int step = thread; step < kCounts; step += kThreads) {
    double sum = 0, squares = 0;
    for (int row = 0; row < rows; ++row) {
      const double x = curve[(static_cast<int64_t>(row) * heads + head) * kCounts + step];
      sum += x;
      squares += x * x;
    }
    const double mean = sum / rows;
    const double variance = rows > 1 ? fmax(0.0, (squares - sum * mean) / (rows - 1)) : 0;
    if (mean - errors * sqrt(variance / rows) >= min_recall) atomicMin(&first, step);
  }
  __syncthreads();
  if (thread == 0) {
    thresholds[head] = first == kCounts ? 0.0f : exp2f(-static_cast<float>(first) / kStepsPerOctave);
  }
}

template <int kDim, int kPack>
void LaunchCurve(const CurveParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.rows.num_rows), static_cast<unsigned>(p.num_kv_heads));
  CurveKernel<kDim, kPack><<<grid, kThreads, 0, stream>>>(p);
}

template <int kDim>
void LaunchCurveOf(const CurveParams& p, cudaStream_t stream) {
  switch (p.num_q_heads / p.num_kv_heads) {
    case 1:
      return LaunchCurve<kDim, 1>(p, stream);
    case 2:
      return LaunchCurve<kDim, 2>(p, stream);
    case 3:
      return LaunchCurve<kDim, 3>(p, stream);
    case 4:
      return LaunchCurve<kDim, 4>(p, stream);
    case 5:
      return LaunchCurve<kDim, 5>(p, stream);
    case 6:
      return LaunchCurve<kDim, 6>(p, stream);
    case 7:
      return LaunchCurve<kDim, 7>(p, stream);
    default:
      return LaunchCurve<kDim, 8>(p, stream);
  }
}

}  // namespace

cudaError_t LaunchRecallCurves(const CudaRecallThresholdArgs& a, cudaStream_t stream) {
  CurveParams p{};
  p.q = static_cast<const __nv_bfloat16*>(a.q);
  p.k_means = static_cast<const __nv_bfloat16*>(a.k_means);
  p.num_tokens = a.num_tokens;
  p.table_rows = CudaMeanTableRows(a.num_tokens);
  p.num_q_heads = a.num_q_heads;
  p.num_kv_heads = a.num_kv_heads;
  p.positions = kSearchRows / (a.num_q_heads / a.num_kv_heads);
  const int64_t count = a.queries.count > 0 ? a.queries.count : a.num_tokens;
  p.first_query = a.queries.first;
  p.end_query = a.queries.first + count;
  const int64_t sparse = count - a.dense_last_tokens;
  p.first_dense_tile =
      a.dense_last_tokens == 0 ? INT32_MAX : static_cast<int>((sparse > 0 ? sparse : 0) / p.positions);
  p.scale_log2 = static_cast<float>(a.softmax_scale * kLog2E);
  p.sink_blocks = a.sink_blocks;
  for (int head = 0; head < a.num_kv_heads; ++head) {
    p.window_blocks[head] = a.windows == nullptr ? a.window_blocks : a.windows[head];
  }
  p.rows = a.goal.rows;
  p.mass = a.goal.mass;
  p.curve = a.goal.curve;
  a.head_dim == 128 ? LaunchCurveOf<128>(p, stream) : LaunchCurveOf<64>(p, stream);
  return cudaGetLastError();
}

cudaError_t LaunchThresholdsOfCurves(const CudaRecallGoal& goal, int32_t num_kv_heads, cudaStream_t stream) {
  FirstStepKernel<<<static_cast<unsigned>(num_kv_heads), kThreads, 0, stream>>>(
      goal.curve, goal.rows.num_rows, goal.min_recall, goal.errors, goal.thresholds);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
