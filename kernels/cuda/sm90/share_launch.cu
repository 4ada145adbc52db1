#include <cmath>

#include "kernels/cuda/device/distributions.cuh"
#include "kernels/cuda/device/radix.cuh"
#include "kernels/cuda/sm90/share_launch.h"

namespace headwater::kernels::sm90 {
namespace {

using namespace headwater::kernels::device;  // NOLINT: the kernels are written in these

constexpr int kWarps = kRadixThreads / 32;

// The slot of which `head` becomes the pivot, or -1. By cluster: the layer's first head of it that is not
// query aware, which alone looks at the slot.
__device__ int SlotAsPivot(const ShareParams& p, int head) {
  if (p.query_aware[head] != 0) return -1;
  const int other = static_cast<int>(threadIdx.x), slot = p.slots[head];
  const bool by_cluster = p.pivots_per_layer == 0;
  bool earlier = other < head && p.query_aware[other] == 0;
  if (by_cluster && earlier) earlier = p.slots[other] == slot;
  const int before = __syncthreads_count(earlier);
  if (!by_cluster) return before < p.pivots_per_layer ? before : -1;
  return slot >= 0 && before == 0 && p.pivots.layers[slot] < 0 ? slot : -1;
}

// A CTA per head.
__global__ void __launch_bounds__(kMostShareHeads) PivotsKernel(const __grid_constant__ ShareParams p) {
  const int head = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int slot = SlotAsPivot(p, head);
  if (slot >= 0) {
    for (int kind = 0; kind < 2; ++kind) {
      const float* const from = p.scores + (int64_t{kind} * p.num_heads + head) * p.num_blocks;
      float* const to = p.pivots.scores + (int64_t{slot} * 2 + kind) * p.num_blocks;
      for (int64_t i = thread; i < p.num_blocks; i += kMostShareHeads) to[i] = from[i];
    }
  }
  __syncthreads();  // all have read the slot's layer
  if (thread != 0) return;
  const ShareRole role = slot >= 0                  ? ShareRole::kPivot
                         : p.query_aware[head] != 0 ? ShareRole::kQueryAware
                                                    : ShareRole::kOwn;
  p.heads[head] = {role, slot, 0, 0};
  p.dense[head] = slot >= 0 ? 1 : 0;
  if (slot < 0) return;
  p.pivots.layers[slot] = p.layer;
  p.pivots.fresh[slot] = head;
  p.pivots.fresh_flags[slot] = 1;
}

__device__ double Distance(const float* a, const float* b, int64_t blocks, bool nan_rule, double* shared) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kRadixThreads) sum += JsTerm(a[i], b[i], nan_rule);
  return JsDistanceOf(ReduceThreads(sum, AddDoubles(), shared));
}

// A CTA per head.
__global__ void __launch_bounds__(kRadixThreads) SharersKernel(const __grid_constant__ ShareParams p) {
  __shared__ double shared[32];
  const int head = static_cast<int>(blockIdx.x);
  if (p.heads[head].role != ShareRole::kOwn) return;
  const bool by_cluster = p.pivots_per_layer == 0;
  const int own = p.slots[head];
  const int first = by_cluster ? own : 0, end = by_cluster ? own + 1 : p.pivots.count;
  ShareHead nearest{ShareRole::kOwn, -1, 0, 0};
  double least = INFINITY;
  for (int slot = first < 0 ? end : first; slot < end; ++slot) {
    const int since = p.pivots.layers[slot];
    const bool ready = by_cluster ? since >= 0 && since < p.layer : p.pivots.fresh_flags[slot] != 0;
    if (!ready) continue;
    const float* const pivot = p.pivots.scores + int64_t{slot} * 2 * p.num_blocks;
    const float* const mine = p.scores + head * p.num_blocks;
    const double vertical = Distance(pivot, mine, p.num_blocks, p.nan_rule, shared);
    const double slash =
        Distance(pivot + p.num_blocks, mine + p.num_heads * p.num_blocks, p.num_blocks, p.nan_rule, shared);
    const double sum = isnan(vertical + slash) ? INFINITY : vertical + slash;
    if (nearest.slot >= 0 && !(sum < least)) continue;
    nearest = {ShareRole::kOwn, slot, vertical, slash};
    least = sum;
  }
  if (threadIdx.x != 0 || nearest.slot < 0) return;
  if (nearest.vertical_distance < p.similarity && nearest.slash_distance < p.similarity &&
      p.pivots.ratios[nearest.slot] < p.fallback) {
    nearest.role = ShareRole::kShared;
    p.budgets[head] = p.budgets[p.num_heads + head] = p.least_budget;
  }
  p.heads[head] = nearest;
}

// One CTA, a warp per row.
__global__ void __launch_bounds__(kRadixThreads)
    RatioKernel(const SharePivots pivots, int slot, const float* average, const CudaBlockMasks masks) {
  __shared__ double shared[32];
  const int head = pivots.fresh[slot];
  if (head < 0) return;
  const int lane = static_cast<int>(threadIdx.x & 31);
  const int64_t blocks = (masks.num_tokens + 127) / 128, words = (blocks + 31) / 32;
  double all = 0, held = 0;
  for (int64_t row = threadIdx.x / 32; row < blocks; row += kWarps) {
    const uint32_t* const mask = masks.words + (head * blocks + row) * words;
#pragma unroll 4
    for (int64_t word = 0; word <= row / 32; ++word) {
      const int64_t column = 32 * word + lane;
      const double x = column <= row ? average[row * blocks + column] : 0;
      all += x;
      if ((mask[word] >> lane & 1) != 0) held += x;
    }
  }
  all = ReduceThreads(all, AddDoubles(), shared);
  held = ReduceThreads(held, AddDoubles(), shared);
  if (threadIdx.x == 0) pivots.ratios[slot] = held / all;
}

// A thread per word of a head's mask.
__global__ void __launch_bounds__(256)
    PatternsKernel(const ShareHead* heads, const CudaBlockMasks patterns, const CudaBlockMasks masks) {
  const ShareHead& head = heads[blockIdx.y];
  if (head.role != ShareRole::kShared) return;
  const int64_t blocks = (masks.num_tokens + 127) / 128, words = blocks * ((blocks + 31) / 32);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (at < words) masks.words[blockIdx.y * words + at] |= patterns.words[head.slot * words + at];
}

}  // namespace

cudaError_t LaunchSharePivots(const ShareParams& params, cudaStream_t stream) {
  const auto slots = static_cast<size_t>(params.pivots.count);
  if (slots > 0) {
    cudaError_t error = cudaMemsetAsync(params.pivots.fresh, 0xFF, slots * sizeof(int32_t), stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(params.pivots.fresh_flags, 0, slots, stream);
    if (error != cudaSuccess) return error;
  }
  PivotsKernel<<<static_cast<unsigned>(params.num_heads), kMostShareHeads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchShareSharers(const ShareParams& params, cudaStream_t stream) {
  SharersKernel<<<static_cast<unsigned>(params.num_heads), kRadixThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchShareRatio(const SharePivots& pivots, int32_t slot, const float* average,
                             const CudaBlockMasks& masks, cudaStream_t stream) {
  RatioKernel<<<1, kRadixThreads, 0, stream>>>(pivots, slot, average, masks);
  return cudaGetLastError();
}

cudaError_t LaunchSharePatterns(const ShareHead* heads, const CudaBlockMasks& patterns,
                                const CudaBlockMasks& masks, cudaStream_t stream) {
  const int64_t ctas = (masks.blocks() * masks.tile_words() + 255) / 256;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(masks.num_lists));
  PatternsKernel<<<grid, 256, 0, stream>>>(heads, patterns, masks);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
