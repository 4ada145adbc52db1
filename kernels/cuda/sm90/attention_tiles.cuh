// Which tile a CTA works on next, and what there is to do in it.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/sm90/attention_traits.cuh"

namespace headwater::kernels::sm90 {

using namespace headwater::kernels::device;  // NOLINT: the kernel is written in these

__device__ __forceinline__ int TileCount(const AttentionParams& p) { return p.tile_begin[p.num_sequences]; }

// Where a tile number lies. Sections of heads whose K and V fit L2 together; within one, late (long) tiles
// first and heads fastest, so that tiles in flight share keys.
struct TilePlace {
  int head;
  int tile;
};

__device__ __forceinline__ TilePlace PlaceOf(const AttentionParams& p, int64_t number, int tiles) {
  const int64_t per_section = static_cast<int64_t>(p.section_heads) * tiles;
  const int section = static_cast<int>(number / per_section);
  const int rest = static_cast<int>(number - section * per_section);
  return {section * p.section_heads + rest % p.section_heads, tiles - 1 - rest / p.section_heads};
}

__device__ __forceinline__ int64_t SegmentOf(const TilePlace& place, int tiles) {
  return static_cast<int64_t>(place.head) * tiles + place.tile;
}

// Many times the mean: such a tile is drawn before all others.
__device__ __forceinline__ bool IsLong(int64_t blocks, int64_t total_blocks, int64_t segments) {
  return blocks > 32 && blocks * segments > 8 * total_blocks;
}

template <int kKeys>
__device__ inline TileInfo DescribeTile(const AttentionParams& p, const TilePlace& place, int tiles,
                                        int head_panels) {
  TileInfo info;
  info.head = place.head;
  info.kv_panel = info.head / p.heads_per_kv_head * head_panels;
  int low = 0, high = p.num_sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.tile_begin[middle] <= place.tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  info.q_begin = p.cu_q[low];
  info.q_len = p.cu_q[low + 1] - info.q_begin;
  info.k_begin = p.cu_k[low];
  info.kv_len = p.cu_k[low + 1] - info.k_begin;
  info.position = (place.tile - p.tile_begin[low]) * p.tile_positions;
  info.key_of_row = p.q_position == kBottomRight ? info.kv_len - info.q_len : p.q_position;
  const int last_row = min(info.position + p.tile_positions, info.q_len) - 1;
  const int visible = min(info.kv_len, last_row + info.key_of_row + 1);
  info.num_blocks = visible <= 0 ? 0 : (visible + kKeys - 1) / kKeys;
  info.complete = max(0, min(info.kv_len, info.position + info.key_of_row + 1)) / kBlockKeys;
  info.corrections = 0;
  info.blocks = nullptr;
  if (p.list_counts != nullptr) {
    const int64_t segment = SegmentOf(place, tiles);
    const int count = p.list_counts[segment];
    if (count != kDenseSegment) {
      info.blocks = p.list_blocks + p.list_offsets[segment];
      info.num_blocks = info.num_blocks == 0 ? 0 : count;
    }
  }
#pragma unroll
  for (int i = 0; i < TileInfo::kMaskedBlocks; ++i) {
    info.masked_block[i] = i < info.num_blocks ? info.Block(i) : 0;
  }
  return info;
}

// Steps over means, which stand for what a tile does not list: of every superblock that is listed in part or
// visible in part, its blocks; of the others, one each. Eight blocks or superblocks are a group, kGroups
// groups a step; superblocks fill whole steps as far as they can. Producer::Correct() makes them.
template <int kGroups>
__device__ inline int CountMeanSteps(const TileInfo& info) {
  if (info.blocks == nullptr || info.num_blocks <= 0) return 0;
  const int superblocks = info.complete / kSuperblock, coarse = (superblocks + 7) / 8;
  int fine = 0, last = -1;
  for (int i = 0; i < info.num_blocks; ++i) {
    const int block = __ldg(info.blocks + i);
    if (static_cast<uint32_t>(block) >= static_cast<uint32_t>(info.complete)) break;
    fine += block / kSuperblock != last;
    last = block / kSuperblock;
  }
  fine += info.complete % kSuperblock != 0 && last != superblocks;
  return coarse / kGroups + (coarse % kGroups + fine + kGroups - 1) / kGroups;
}

// Draws tiles and describes them, up to kTileSlots ahead, so that nobody waits for the lists' latency.
template <class Traits>
__device__ inline void Schedule(typename Traits::Shared& shared, const AttentionParams& p) {
  const int tiles = TileCount(p);
  const int64_t count = static_cast<int64_t>(tiles) * p.num_heads;
  const int long_tiles = p.long_tiles == nullptr ? 0 : *p.long_tile_count;
  for (int n = 0;;) {
    const int64_t drawn = atomicAdd(p.next_tile, 1);
    const bool is_long = drawn < long_tiles;
    const int64_t number = is_long ? p.long_tiles[drawn] : drawn - long_tiles;
    TileInfo info;
    info.num_blocks = kNoMoreTiles;
    if (number < count) {
      info = DescribeTile<Traits::kKeys>(p, PlaceOf(p, number, tiles), tiles, Traits::kPanels);
      if (long_tiles > 0 && !is_long && IsLong(info.num_blocks, *p.total_blocks, count))
        continue;  // done already
      if constexpr (Traits::kCorrected) {
        info.corrections = CountMeanSteps<Traits::kGroups>(info);
      }
    }
    const int slot = n % Traits::kTileSlots;
    if (n >= Traits::kTileSlots) {
      BarrierWait(SharedAddress(&shared.tile_empty[slot]), (n / Traits::kTileSlots & 1) ^ 1);
    }
    shared.tiles[slot] = info;
    BarrierArrive(SharedAddress(&shared.tile_full[slot]));
    if (number >= count) return;
    ++n;
  }
}

}  // namespace headwater::kernels::sm90
