// Energies of one query tile over block means, and the blocks that they select. One CTA of kFlashThreads.
#pragma once

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/sm90/flash_launch.h"

namespace headwater::kernels::sm90 {

using namespace headwater::kernels::device;  // NOLINT: the kernel is written in these

inline constexpr int kFlashThreads = 256;
inline constexpr int kFlashWarps = kFlashThreads / 32;

template <int kHeadDim>
struct FlashShared {
  static constexpr int kStages = 2;
  static constexpr uint32_t kChunkBytes = kFlashChunk * kHeadDim * 2;
  alignas(1024) uint8_t q[kFlashRows * kHeadDim * 2];
  alignas(1024) uint8_t means[2][kStages][kChunkBytes];  // of each warpgroup
  uint64_t q_full, means_full[2][kStages], means_free[2][kStages];
  float best[kFlashWarps];
  int counts[kFlashWarps];
  // float energies[]: log2, of all scored blocks.
};

struct FlashTileShape {
  int list, tile;
  int first_block;  // of its first position
  int first, rows;  // first position; packed rows
  int visible;      // blocks that its last row sees
  int scored;
  int own;  // block that the last of 128 rows alone scores; -1: none
};

__device__ __forceinline__ FlashTileShape FlashTileOf(const FlashParams& p, int list, int tile) {
  FlashTileShape t{};
  t.list = list;
  t.tile = tile;
  t.first = tile * p.tile_positions;
  t.first_block = t.first / 128;
  const int end = min(t.first + p.tile_positions, p.num_tokens);
  t.rows = (end - t.first) * p.pack;
  t.visible = (end + 127) / 128;
  t.scored = p.own_block ? t.visible : end / 128;
  t.own = p.own_block ? t.visible - 1 : -1;
  return t;
}

// s: raw scores of 64 blocks (rows of the product) and the tile's rows (columns), one warpgroup's. This
// thread has two blocks, `block` and the eighth after it, and every fourth pair of columns.
__device__ __forceinline__ void StoreEnergies(float (&s)[64], const FlashParams& p, const FlashTileShape& t,
                                              int block, float* energies) {
  const int column = 2 * static_cast<int>(threadIdx.x & 3);
  if (t.rows < 120) {
#pragma unroll
    for (int i = 0; i < 60; ++i) {
      if (column + 8 * (i >> 2) + (i & 1) >= t.rows) s[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 60; i < 64; ++i) {
    if (column + 120 + (i & 1) >= t.rows) s[i] = -INFINITY;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (block + 8 * r != t.own) continue;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if ((i >> 1 & 1) == r && column + 8 * (i >> 2) + (i & 1) != kFlashRows - 1) s[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
    for (int j = 1; j < 16; ++j) {
      even = fmaxf(even, s[4 * j + 2 * r]);
      odd = fmaxf(odd, s[4 * j + 2 * r + 1]);
    }
    float top = fmaxf(even, odd);
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float shift = top == -INFINITY ? 0.0f : top * p.scale_log2;
    float sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      sum[0] += Exp2(fmaf(s[4 * j + 2 * r], p.scale_log2, -shift));
      sum[1] += Exp2(fmaf(s[4 * j + 2 * r + 1], p.scale_log2, -shift));
    }
    sum[0] += sum[1];
    sum[0] += __shfl_xor_sync(~0u, sum[0], 1);
    sum[0] += __shfl_xor_sync(~0u, sum[0], 2);
    // -0 and 0 are one energy.
    if (column == 0 && block + 8 * r < t.scored) energies[block + 8 * r] = shift + __log2f(sum[0]) + 0.0f;
  }
}

// Energies of all scored blocks; the warpgroups take chunks in turn, each with a ring of its own. The caller
// has initialised the barriers, and synchronises.
template <int kHeadDim>
__device__ __forceinline__ void ScoreTile(const CUtensorMap& q_map, const CUtensorMap& mean_map,
                                          const FlashParams& p, const FlashTileShape& t,
                                          FlashShared<kHeadDim>& shared, float* energies) {
  using Shared = FlashShared<kHeadDim>;
  constexpr int kStages = Shared::kStages;
  constexpr uint32_t kPanel = kFlashRows * 128, kMeanPanel = kFlashChunk * 128;
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 7), 0);
  const int thread = static_cast<int>(threadIdx.x & 127);
  const int chunks = (t.scored + kFlashChunk - 1) / kFlashChunk, mine = (chunks - warpgroup + 1) / 2;
  const uint32_t q_full = SharedAddress(&shared.q_full);
  if (threadIdx.x == 0) {
    BarrierExpect(q_full, p.tile_positions * p.pack * kHeadDim * 2);
    for (int panel = 0; panel < kHeadDim / 64; ++panel) {
      LoadTensor5(SharedAddress(shared.q) + panel * kPanel, &q_map, q_full, 0, 0, t.first, panel, t.list,
                  PolicyEvictFirst());
    }
  }
  const auto load = [&](int i) {
    const uint32_t full = SharedAddress(&shared.means_full[warpgroup][i % kStages]);
    BarrierExpect(full, Shared::kChunkBytes);
    LoadTensor4(SharedAddress(shared.means[warpgroup][i % kStages]), &mean_map, full, 0,
                (warpgroup + 2 * i) * kFlashChunk, 0, t.list / p.lists_per_kv_head, PolicyEvictLast());
  };
  if (thread == 0) {
    for (int i = 0; i < min(kStages, mine); ++i) load(i);
  }
  const uint32_t q = DescriptorLow(SharedAddress(shared.q), 16);
  const uint32_t means = DescriptorLow(SharedAddress(shared.means[warpgroup][0]), 16);
  const int row = (thread >> 5) * 16 + ((thread & 31) >> 2);
  BarrierWait(q_full, 0);
#pragma unroll 1
  for (int i = 0; i < mine; ++i) {
    const int stage = i % kStages;
    float s[64];
    BarrierWait(SharedAddress(&shared.means_full[warpgroup][stage]), i / kStages & 1);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      Wgmma<128>::SsKMajor(
          s, means + stage * (Shared::kChunkBytes / 16) + (k >> 2) * (kMeanPanel / 16) + (k & 3) * 2,
          q + (k >> 2) * (kPanel / 16) + (k & 3) * 2, k > 0);
    }
    WgmmaCommit();
    WgmmaWait<0>();
    const uint32_t read = SharedAddress(&shared.means_free[warpgroup][stage]);
    if ((thread & 31) == 0) BarrierArrive(read);
    if (thread == 0 && i + kStages < mine) {
      BarrierWait(read, i / kStages & 1);  // all four warps have read the stage
      load(i + kStages);
    }
    StoreEnergies(s, p, t, (warpgroup + 2 * i) * kFlashChunk + row, energies);
  }
}

// --- selection, by the CTA together ---

// Floats in the order of their bits; NaN below all.
__device__ __forceinline__ uint32_t OrderedBits(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// The largest energies: those over `bits`, and of those equal to it the ones before block `end`.
struct LargestEnergies {
  uint32_t bits;
  int end;
  __device__ __forceinline__ bool Has(float energy, int block) const {
    const uint32_t own = OrderedBits(energy);
    return own > bits || (own == bits && block < end);
  }
};

__device__ __forceinline__ int CountOf(const float* energies, int scored, uint32_t least, int* counts) {
  int count = 0;
  for (int i = threadIdx.x; i < scored; i += kFlashThreads) count += OrderedBits(energies[i]) >= least;
  count = __reduce_add_sync(~0u, count);
  __syncthreads();  // the last call's counts have been read
  if ((threadIdx.x & 31) == 0) counts[threadIdx.x >> 5] = count;
  __syncthreads();
  int total = 0;
  for (int i = 0; i < kFlashWarps; ++i) total += counts[i];
  return total;
}

// Bit by bit: the largest value that `wanted` energies reach. wanted is 1 to scored.
__device__ inline LargestEnergies FindLargest(const float* energies, int scored, int wanted, int* counts) {
  LargestEnergies largest{0, 0};
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = largest.bits | 1u << bit;
    if (CountOf(energies, scored, candidate, counts) >= wanted) largest.bits = candidate;
  }
  // bits is an energy's, so that one above it is no overflow: NaN is 0, infinity 0xFF800000.
  int equal = wanted - CountOf(energies, scored, largest.bits + 1, counts);
  const int lane = static_cast<int>(threadIdx.x & 31);
  for (int base = 0; base < scored && equal > 0; base += 32) {
    const bool same = base + lane < scored && OrderedBits(energies[base + lane]) == largest.bits;
    const uint32_t bits = __ballot_sync(~0u, same);
    largest.end = equal > __popc(bits) ? base + 32 : base + __fns(bits, 0, equal) + 1;
    equal -= __popc(bits);
  }
  return largest;
}

__device__ __forceinline__ void SelectBlocks(const FlashParams& p, const FlashTileShape& t,
                                             const float* energies, float* best_of_warps, int* counts,
                                             uint32_t* words) {
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5);
  float best = -INFINITY;
  for (int i = threadIdx.x; i < t.scored; i += kFlashThreads) best = fmaxf(best, energies[i]);
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, bit));
  if (lane == 0) best_of_warps[warp] = best;
  __syncthreads();
  for (int i = 0; i < kFlashWarps; ++i) best = fmaxf(best, best_of_warps[i]);
  const float threshold = best + p.alpha_log2;
  LargestEnergies largest{~0u, 0};
  const int wanted = min(p.min_blocks, t.scored);
  if (wanted > 0) largest = FindLargest(energies, t.scored, wanted, counts);
  for (int word = warp; word * 32 < t.visible; word += kFlashWarps) {
    const int block = word * 32 + lane;
    bool kept = block < p.sink_blocks || block > t.first_block - p.window_blocks;
    if (block < t.scored) {
      kept = kept || energies[block] >= threshold || largest.Has(energies[block], block);
    }
    const uint32_t bits = __ballot_sync(~0u, kept && block < t.visible);
    if (lane == 0) words[word] = bits;
  }
}

}  // namespace headwater::kernels::sm90
