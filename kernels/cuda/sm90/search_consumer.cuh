// Shared memory, tiles and consumers of the pattern search; search_kernel.cuh has the rule and the kernel.
#pragma once

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/sm90/attention_params.h"
#include "kernels/cuda/sm90/search_params.h"

namespace headwater::kernels::sm90 {

using namespace headwater::kernels::device;  // NOLINT: the kernel is written in these

template <int kHeadDim_>
struct SearchTraits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kStages = 3;
  static constexpr int kThreads = 384;
  static constexpr uint32_t kTileBytes = 128 * kHeadDim * 2;

  struct Shared {
    alignas(1024) uint8_t probes[kTileBytes];
    alignas(1024) uint8_t means[kStages][kTileBytes];
    uint32_t bitmap[kSearchBitmapWords];  // of the CTA's tiles, tile_words each
    float row_max[kSearchRows];
    float row_lse[kSearchRows];
    // Of a tile: DensitySearch.
    uint32_t bin_begin[kSearchRows], wanted[kSearchRows];
    uint64_t list_end[kSearchRows];  // of what is still to be written of its list
    uint64_t probes_full, means_full[kStages], means_empty[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

// --- tiles ---

// Blocks of a tile: [0, complete) are visible to all its rows, [0, total) to its last.
struct TileBlocks {
  int complete;
  int total;
};

__device__ __forceinline__ TileBlocks BlocksOfTile(const SearchParams& p, int tile) {
  const int first = tile * p.tile_positions, last = min(first + p.tile_positions, p.q_len) - 1;
  const int first_key = min(p.kv_len, first + p.q_position + 1),
            last_key = min(p.kv_len, last + p.q_position + 1);
  return {max(0, first_key) / kBlockKeys, (max(0, last_key) + kBlockKeys - 1) / kBlockKeys};
}

__device__ __forceinline__ int HeadOfCta(const SearchParams& p) {
  return static_cast<int>(blockIdx.x) % p.num_heads;
}

// First of a tile's last blocks that are always listed: the window, and what is not visible to all rows.
__device__ __forceinline__ int WindowBegin(const SearchParams& p, const TileBlocks& blocks) {
  return max(0, min(blocks.total - p.window_blocks[HeadOfCta(p)], blocks.complete));
}

// Sum over the lower lanes, and over all.
__device__ __forceinline__ uint32_t SumOfLowerLanes(uint32_t value, uint32_t* total) {
  uint32_t sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, sum, step);
    if (static_cast<int>(threadIdx.x & 31) >= step) sum += other;
  }
  *total = __shfl_sync(~0u, sum, 31);
  return sum - value;
}

// --- consumer ---

template <class Traits>
struct SearchConsumer {
  typename Traits::Shared& shared;
  const SearchParams& p;
  int first_tile;
  int tiles;               // of this CTA
  int warpgroup;           // 0 or 1
  int thread;              // within it
  uint32_t probes, means;  // descriptors
  int uses = 0;            // of the ring of means
  float top[2] = {-INFINITY, -INFINITY},
        sum[2] = {0, 0};  // of the rows so far: raw score; log2 units under it
  int limit[2];           // complete blocks of the row's tile
  int row[2];

  __device__ __forceinline__ void Prepare() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = warpgroup * 64 + (thread >> 5) * 16 + ((thread & 31) >> 2) + 8 * r;
      const int tile = row[r] / p.row_pack;
      limit[r] = tile < tiles ? BlocksOfTile(p, first_tile + tile).complete : 0;
    }
  }

  // Issues the scores of the next stage.
  __device__ __forceinline__ void Issue(float (&s)[64]) {
    constexpr uint32_t kPanel = 128 * 128 / 16;
    const int stage = uses % Traits::kStages;
    BarrierWait(SharedAddress(&shared.means_full[stage]), uses / Traits::kStages & 1);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      const uint32_t at = (k >> 2) * kPanel + (k & 3) * 2;
      Wgmma<128>::SsKMajor(s, probes + at, means + stage * (Traits::kTileBytes / 16) + at, k > 0);
    }
    WgmmaCommit();
    ++uses;
  }

  // Every step of one pass: take(scores, first block). Two sets of scores, one in flight.
  template <typename Function>
  __device__ __forceinline__ void Pass(int steps, Function take) {
    if (steps == 0) return;
    float a[64], b[64];
    Issue(a);
    int step = 0;
    for (; step + 2 < steps; step += 2) {
      Issue(b);
      Await<1>(2);
      take(a, (steps - 1 - step) * 128);
      Issue(a);
      Await<1>(2);
      take(b, (steps - 2 - step) * 128);
    }
    if (step + 2 == steps) {
      Issue(b);
      Await<1>(2);
      take(a, 128);
      Await<0>(1);
      take(b, 0);
    } else {
      Await<0>(1);
      take(a, 0);
    }
  }

  // Until the scores issued `back` uses ago are there: all but kInFlight.
  template <int kInFlight>
  __device__ __forceinline__ void Await(int back) {
    WgmmaWait<kInFlight>();
    if (thread == 0) BarrierArrive(SharedAddress(&shared.means_empty[(uses - back) % Traits::kStages]));
  }

  // Blocks that are not visible to a whole tile count for nothing.
  __device__ __forceinline__ void MaskBlocks(float (&s)[64], int first_block) const {
    if (first_block + 128 <= limit[0] && first_block + 128 <= limit[1]) return;
    const int column = first_block + 2 * (thread & 3);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (column + 8 * (i >> 2) + (i & 1) >= limit[i >> 1 & 1]) s[i] = -INFINITY;
    }
  }

  // Largest score of each row among this thread's.
  __device__ __forceinline__ void Largest(const float (&s)[64], float (&largest)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
      for (int j = 1; j < 16; ++j) {
        even = fmaxf(even, s[4 * j + 2 * r]);
        odd = fmaxf(odd, s[4 * j + 2 * r + 1]);
      }
      largest[r] = fmaxf(even, odd);
    }
  }

  // First pass: maximum and sum of each row.
  __device__ __forceinline__ void Gather(float (&s)[64], int first_block) {
    MaskBlocks(s, first_block);
    float largest[2], shift[2];
    Largest(s, largest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = largest[r];
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      m = fmaxf(m, top[r]);
      shift[r] = m == -INFINITY ? 0.0f : m * p.scale_log2;
      sum[r] *= Exp2(fmaf(top[r], p.scale_log2, -shift[r]));
      top[r] = m;
    }
    float part[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 64; ++i) part[i & 3] += Exp2(fmaf(s[i], p.scale_log2, -shift[i >> 1 & 1]));
    sum[0] += part[0] + part[1];
    sum[1] += part[2] + part[3];
  }

  // Second pass: a bit for each score that reaches the row's threshold.
  __device__ __forceinline__ void Mark(float (&s)[64], int first_block, const float (&threshold)[2]) {
    float largest[2];
    Largest(s, largest);
    const bool hit = largest[0] >= threshold[0] || largest[1] >= threshold[1];
    if (!__any_sync(~0u, hit)) return;
    const int column = first_block + 2 * (thread & 3);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int r = i >> 1 & 1, block = column + 8 * (i >> 2) + (i & 1);
      if (s[i] >= threshold[r] && block < limit[r]) {
        atomicOr(&shared.bitmap[row[r] / p.row_pack * p.tile_words + (block >> 5)], 1u << (block & 31));
      }
    }
  }

  // Rows between the probes of two tiles are zeros, and have no say.
  __device__ __forceinline__ void StoreRows() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      if ((thread & 3) == 0) {
        shared.row_max[row[r]] = top[r] * p.scale_log2;
        const bool is_probe = row[r] % p.row_pack < p.pack;
        shared.row_lse[row[r]] = is_probe && sum[r] > 0 ? top[r] * p.scale_log2 + log2f(sum[r]) : -INFINITY;
      }
    }
  }

  // The best score of the row's tile under its head's softmax, after StoreRows() of all rows; log2 units.
  __device__ __forceinline__ float Best(int r) const {
    const int tile = row[r] / p.row_pack;
    float best = -INFINITY;
    for (int h = 0; h < p.pack && tile < tiles; ++h) {
      const int other = tile * p.row_pack + h;
      if (shared.row_lse[other] > -INFINITY)
        best = fmaxf(best, shared.row_max[other] - shared.row_lse[other]);
    }
    return best;
  }

  // Raw score from which on a block is listed; infinity: none is.
  __device__ __forceinline__ float Threshold(int r, float threshold_log2) const {
    const float threshold = (shared.row_lse[row[r]] + threshold_log2 + Best(r)) / p.scale_log2;
    return threshold > -INFINITY ? threshold : INFINITY;
  }

  // The list of one tile, by one warp.
  __device__ __forceinline__ void WriteList(int local, int head, bool dense_head) {
    const int lane = thread & 31, tile = first_tile + local;
    uint32_t* const bitmap = shared.bitmap + local * p.tile_words;
    const TileBlocks blocks = BlocksOfTile(p, tile);
    const int64_t segment = static_cast<int64_t>(head) * p.num_tiles + tile;
    const int words = (blocks.total + 31) / 32;
    bool dense = dense_head || tile >= p.first_dense_tile;
    uint32_t total = 0;
    if (!dense) {
      for (int i = lane; i < min(p.sink_blocks, blocks.total); i += 32) {
        atomicOr(&bitmap[i >> 5], 1u << (i & 31));
      }
      for (int i = WindowBegin(p, blocks) + lane; i < blocks.total; i += 32) {
        atomicOr(&bitmap[i >> 5], 1u << (i & 31));
      }
      __syncwarp();
      for (int i = lane; i < words; i += 32) total += __popc(bitmap[i]);
      total = __reduce_add_sync(~0u, total);
    }
    uint64_t begin = 0;
    if (lane == 0 && total > 0) begin = atomicAdd(reinterpret_cast<unsigned long long*>(p.cursor), total);
    begin = __shfl_sync(~0u, begin, 0);
    if (!dense && begin + total > p.capacity) {
      dense = true;
      if (lane == 0) atomicAdd(p.overflows, 1u);
    }
    if (lane == 0) {
      p.counts[segment] = dense ? kDenseSegment : static_cast<int32_t>(total);
      p.offsets[segment] = static_cast<int64_t>(dense ? 0 : begin);
    }
    if (dense) return;
    for (int base = 0; base < words; base += 32) {
      uint32_t word = base + lane < words ? bitmap[base + lane] : 0;
      uint32_t in_words = 0;
      uint64_t at = begin + SumOfLowerLanes(__popc(word), &in_words);
      begin += in_words;
      for (; word != 0; word &= word - 1) p.blocks[at++] = (base + lane) * 32 + __ffs(word) - 1;
    }
  }
};

}  // namespace headwater::kernels::sm90
