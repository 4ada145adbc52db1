// Budgets, choice of columns and offsets, and their masks.
#include <cmath>

#include <cuda_bf16.h>

#include "kernels/cuda/device/distributions.cuh"
#include "kernels/cuda/device/radix.cuh"
#include "kernels/cuda/device/vectors.cuh"
#include "kernels/cuda/sm90/flex_launch.h"

namespace headwater::kernels::sm90 {
namespace {

using namespace headwater::kernels::device;  // NOLINT: the kernels are written in these

constexpr int kWarps = kRadixThreads / 32;

// probe = the mean of the last queries of a head.
template <int kDim>
__device__ void MeanOfTail(const CudaFlexBudgetsArgs& p, int head, float* probe) {
  constexpr int kPieces = kDim / 8, kGroups = kRadixThreads / kPieces;
  __shared__ float parts[kGroups][kDim];
  const int piece = static_cast<int>(threadIdx.x) % kPieces, group = static_cast<int>(threadIdx.x) / kPieces;
  const int64_t first = p.num_tokens > 128 ? p.num_tokens - 128 : 0;
  const auto* const q = static_cast<const __nv_bfloat16*>(p.q);
  float sum[8] = {};
  for (int64_t token = first + group; token < p.num_tokens; token += kGroups) {
    float x[8];
    Load8(q, (token * p.num_q_heads + head) * kDim + piece * 8, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += x[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) parts[group][piece * 8 + i] = sum[i];
  __syncthreads();
  if (threadIdx.x < kDim) {
    float total = 0;
    for (int i = 0; i < kGroups; ++i) total += parts[i][threadIdx.x];
    probe[threadIdx.x] = total / static_cast<float>(p.num_tokens - first);
  }
  __syncthreads();
}

// logits[J] = softmax_scale * probe . k_mean[J]: a warp per block.
template <int kDim>
__device__ void PooledLogits(const CudaFlexBudgetsArgs& p, int head, int64_t blocks, const float* probe,
                             float* logits) {
  constexpr int kEach = kDim / 32;
  const int lane = static_cast<int>(threadIdx.x & 31);
  const float* const k_mean =
      p.k_mean + head / (p.num_q_heads / p.num_kv_heads) * kDim + static_cast<int64_t>(lane) * kEach;
  float mine[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) mine[i] = probe[lane * kEach + i];
#pragma unroll 4
  for (int64_t block = threadIdx.x / 32; block < blocks; block += kWarps) {
    const float* const row = k_mean + block * p.num_kv_heads * kDim;
    float dot = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) dot += mine[i] * __ldg(row + i);
    dot = SumLanes(dot, 1, 32);
    if (lane == 0) logits[block] = dot * p.softmax_scale;
  }
  __syncthreads();
}

template <int kDim>
__global__ void __launch_bounds__(kRadixThreads)
    FlexBudgetsKernel(const __grid_constant__ CudaFlexBudgetsArgs p, int64_t blocks) {
  __shared__ float probe[kDim];
  __shared__ double shared[32];
  const int head = static_cast<int>(blockIdx.x);
  float* const pooled = p.pooled + head * blocks;
  const float* const columns = p.column_scores + head * blocks;
  MeanOfTail<kDim>(p, head, probe);
  PooledLogits<kDim>(p, head, blocks, probe, pooled);

  double top = -INFINITY;
  for (int64_t i = threadIdx.x; i < blocks; i += kRadixThreads)
    top = fmax(top, static_cast<double>(pooled[i]));
  top = ReduceThreads(top, MaxDoubles(), shared);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kRadixThreads) sum += exp(pooled[i] - top);
  sum = ReduceThreads(sum, AddDoubles(), shared);
  double distance = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kRadixThreads) {
    const double share = exp(pooled[i] - top) / sum;
    distance += JsTerm(share, columns[i], p.nan_rule);
    pooled[i] = static_cast<float>(share);
  }
  distance = JsDistanceOf(ReduceThreads(distance, AddDoubles(), shared));
  if (threadIdx.x != 0) return;
  const bool query_aware = distance < p.tau;
  p.js_distance[head] = static_cast<float>(distance);
  p.query_aware[head] = query_aware ? 1 : 0;
  for (int kind = 0; kind < 2; ++kind) {
    const int at = kind * p.num_q_heads + head;
    int64_t budget = p.covers[at] / 128 + 1;
    budget = budget < p.min_blocks ? p.min_blocks : budget;
    budget = budget > p.max_blocks ? p.max_blocks : budget;
    if (query_aware) budget = p.min_blocks;
    p.budgets[at] = static_cast<int32_t>(budget < blocks ? budget : blocks);
  }
}

// --- columns and offsets ---

// Of a row's entries but `forced`: those with a key above `key`, and the first `take` that have it.
struct Threshold {
  uint32_t key;
  uint32_t take;
};

template <int kPass>
__device__ void Narrow(const float* scores, int64_t blocks, int64_t forced, uint32_t* bins, uint64_t* scratch,
                       Threshold* shared) {
  using Digit = RadixDigit<kPass>;
  constexpr int kEach = Digit::kBins / kRadixThreads;
  for (int i = static_cast<int>(threadIdx.x); i < Digit::kBins; i += kRadixThreads) bins[i] = 0;
  const Threshold now = *shared;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < blocks; i += kRadixThreads) {
    const uint32_t key = RadixKey(scores[i]);
    if (i != forced && Digit::Above(key) == now.key) atomicAdd(&bins[Digit::Of(key)], 1u);
  }
  __syncthreads();
  const int top = Digit::kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint64_t mine = 0, all = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) mine += bins[top - i];
  uint64_t before = ScanThreads(mine, SaturatingAdd(), scratch, &all);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint64_t after = before + bins[top - i];
    if (before < now.take && now.take <= after) {
      *shared = {now.key << Digit::kBits | static_cast<uint32_t>(top - i),
                 now.take - static_cast<uint32_t>(before)};
    }
    before = after;
  }
  __syncthreads();
}

// Writes the words of 1024 entries at a time, going the way in which equal scores are taken.
__device__ void StoreChosen(const float* scores, int64_t blocks, bool from_end, const Threshold& threshold,
                            uint32_t* counts, uint32_t* words) {
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t forced = from_end ? blocks - 1 : 0, steps = (blocks + kRadixThreads - 1) / kRadixThreads;
  uint32_t taken = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t i = (from_end ? steps - 1 - step : step) * kRadixThreads + threadIdx.x;
    const bool candidate = i < blocks && i != forced;
    const uint32_t key = candidate ? RadixKey(scores[i]) : 0;
    const bool tie = candidate && key == threshold.key;
    const uint32_t ties = __ballot_sync(~0u, tie);
    if (lane == 0) counts[warp] = static_cast<uint32_t>(__popc(ties));
    __syncthreads();
    const uint32_t nearer = from_end ? ~(~0u >> (31 - lane)) : (1u << lane) - 1;
    uint32_t rank = taken + static_cast<uint32_t>(__popc(ties & nearer));
    for (int other = 0; other < kWarps; ++other) {
      if (from_end ? other > warp : other < warp) rank += counts[other];
      taken += counts[other];
    }
    const bool chosen = i == forced || (candidate && key > threshold.key) || (tie && rank < threshold.take);
    const uint32_t word = __ballot_sync(~0u, chosen);
    if (lane == 0 && i < blocks) words[i / 32] = word;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kRadixThreads) FlexTopKernel(const __grid_constant__ CudaFlexTopArgs p) {
  __shared__ uint32_t bins[kCoverBins];
  __shared__ uint64_t scratch[33];
  __shared__ uint32_t counts[kWarps];
  __shared__ Threshold threshold;
  const int64_t row = blockIdx.x, blocks = p.num_blocks;
  const bool from_end = row >= p.num_heads;
  const int64_t forced = from_end ? blocks - 1 : 0;
  const float* const scores = p.scores + row * blocks;
  const int64_t budget = p.budgets[row] < blocks ? p.budgets[row] : blocks;
  const bool others = budget > 1;
  if (threadIdx.x == 0) {
    threshold = others ? Threshold{0, static_cast<uint32_t>(budget - 1)} : Threshold{~0u, 0};
  }
  __syncthreads();
  if (others) {
    Narrow<0>(scores, blocks, forced, bins, scratch, &threshold);
    Narrow<1>(scores, blocks, forced, bins, scratch, &threshold);
    Narrow<2>(scores, blocks, forced, bins, scratch, &threshold);
  }
  StoreChosen(scores, blocks, from_end, threshold, counts, p.bits + row * ((blocks + 31) / 32));
}

// --- masks ---

// A thread per word. Offset o of tile t is block t - o, bit nb - 1 - o of its row: the row, shifted.
__global__ void __launch_bounds__(256)
    FlexMasksKernel(const uint32_t* bits, const __grid_constant__ CudaBlockMasks masks) {
  const int64_t blocks = (masks.num_tokens + 127) / 128, words = (blocks + 31) / 32;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (at >= blocks * words) return;
  const int64_t head = blockIdx.y, tile = at / words, word = at % words;
  const uint32_t* const columns = bits + head * words;
  const uint32_t* const offsets = bits + (masks.num_lists + head) * words;
  const int64_t visible = tile + 1 - 32 * word;
  uint32_t mask = 0;
  if (visible > 0) mask = columns[word] & (visible >= 32 ? ~0u : (1u << visible) - 1);
  const int64_t shift = blocks - 1 - tile + 32 * word, from = shift / 32;
  const uint32_t low = from < words ? offsets[from] : 0, high = from + 1 < words ? offsets[from + 1] : 0;
  mask |= __funnelshift_r(low, high, static_cast<uint32_t>(shift % 32));
  masks.words[head * blocks * words + at] = mask;
}

}  // namespace

cudaError_t LaunchFlexBudgets(const CudaFlexBudgetsArgs& args, cudaStream_t stream) {
  const int64_t blocks = (args.num_tokens + 127) / 128;
  const auto heads = static_cast<unsigned>(args.num_q_heads);
  if (args.head_dim == 128) {
    FlexBudgetsKernel<128><<<heads, kRadixThreads, 0, stream>>>(args, blocks);
  } else {
    FlexBudgetsKernel<64><<<heads, kRadixThreads, 0, stream>>>(args, blocks);
  }
  return cudaGetLastError();
}

cudaError_t LaunchFlexTop(const CudaFlexTopArgs& args, cudaStream_t stream) {
  FlexTopKernel<<<2 * static_cast<unsigned>(args.num_heads), kRadixThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchFlexMasks(const uint32_t* bits, const CudaBlockMasks& masks, cudaStream_t stream) {
  const int64_t ctas = (masks.blocks() * masks.tile_words() + 255) / 256;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(masks.num_lists));
  FlexMasksKernel<<<grid, 256, 0, stream>>>(bits, masks);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
