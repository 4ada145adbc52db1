// Forced density of the pattern search: per tile the `wanted` best blocks are marked in place of those over a
// threshold. wanted is ceil(forced_density * total) less the blocks that are always listed.
//
// A block's margin is how far it lies under the tile's best one: the least over the tile's heads of lse_h + M
// - scale * probe_h . kbar_J, log2 units. Floats that are not negative are ordered like their bits, so that a
// radix select finds the wanted-th margin: two passes over the means make a histogram per tile, of the
// margins' first and next nine bits from the exponent on, and a third marks what lies below the last bin, and
// in it. Margins in one last bin differ by 2^-12 of themselves; of these the list takes the highest numbers.
// So every list has its exact length, and equal calls give equal lists. As the length is known before, lists
// are marked and written a section of the blocks at a time, from the last one on: what a tile takes of shared
// memory does not grow with the prompt.
#pragma once

#include "kernels/cuda/sm90/search_consumer.cuh"

namespace headwater::kernels::sm90 {

// The blocks [sink, end) of a tile compete for `wanted` places.
struct Candidates {
  int end;
  int wanted;
};

__device__ __forceinline__ Candidates CandidatesOfTile(const SearchParams& p, int tile) {
  if (tile >= p.first_dense_tile) return {0, 0};
  const TileBlocks blocks = BlocksOfTile(p, tile);
  const int end = WindowBegin(p, blocks), always = blocks.total - max(0, end - p.sink_blocks);
  const int wanted = static_cast<int>(ceil(p.forced_density * blocks.total)) - always;
  return wanted > 0 ? Candidates{end, wanted} : Candidates{0, 0};
}

// By the consumers together, after StoreRows() of all rows. A tile's words of `bitmap` are a histogram, then
// two bitmaps of a section: listed blocks, and those of the last bin.
template <class Traits, int kRowPack>
struct DensitySearch {
  static constexpr int kPasses = 4;  // over the means, that of Gather() counted
  static constexpr int kDigitBits = 9;
  static constexpr int kFirstShift = 20, kLastShift = kFirstShift - kDigitBits;
  static_assert(1 << kDigitBits == kSearchBins);
  // Bits of 2^-32, and of the last float under 2^32: smaller margins are equal, larger ones too.
  static constexpr int kLeast = 95 << 23, kMost = (159 << 23) - 1;
  static_assert((kMost - kLeast) >> kFirstShift == kSearchBins - 1);
  static constexpr uint64_t kNoList = ~uint64_t{0};

  SearchConsumer<Traits>& consumer;
  float offset[2];        // lse_h + M of the row; infinity: it has no say
  int end[2];             // of the candidates of the row's tile
  uint32_t bin_begin[2];  // key at which the tile's last bin begins
  int words[2];           // where those of the row's tile begin

  // Finds and writes the lists of the CTA's tiles.
  __device__ __forceinline__ void Write(int steps, int head) {
    auto& shared = consumer.shared;
    EachTile([&](int tile) {
      if ((consumer.thread & 31) != 0) return;
      shared.bin_begin[tile] = 0;
      shared.wanted[tile] = CandidatesOfTile(consumer.p, consumer.first_tile + tile).wanted;
      DrawRoom(tile, head);
    });
    Prepare();
    NamedSync(1, 256);
#pragma unroll 1
    for (int shift = kFirstShift; shift >= kLastShift; shift -= kDigitBits) {
      ReadBins();
      consumer.Pass(steps, [&](float(&s)[64], int first_block) { Count(s, first_block, shift); });
      NamedSync(1, 256);
      EachTile([&](int tile) { Narrow(tile, shift); });
      NamedSync(1, 256);
    }
    ReadBins();
    const int section_steps = consumer.p.section_words / 4;
#pragma unroll 1
    for (int section = (consumer.p.bitmap_words - 1) / consumer.p.section_words; section >= 0; --section) {
      const int first_step = section * section_steps, first = first_step * 128;
      consumer.Pass(min(max(steps - first_step, 0), section_steps),
                    [&](float(&s)[64], int first_block) { MarkBest(s, first, first_block); });
      NamedSync(1, 256);
      EachTile([&](int tile) { WriteSection(tile, first); });
      NamedSync(1, 256);
    }
  }

  // The tiles of this warp.
  template <typename Function>
  __device__ __forceinline__ void EachTile(Function take) {
    for (int tile = consumer.warpgroup * 4 + (consumer.thread >> 5); tile < consumer.tiles; tile += 8) {
      take(tile);
    }
  }

  __device__ __forceinline__ void Prepare() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int tile = consumer.row[r] / kRowPack;
      const float lse = consumer.shared.row_lse[consumer.row[r]];
      offset[r] = lse > -INFINITY ? lse + consumer.Best(r) : INFINITY;
      end[r] = tile < consumer.tiles ? CandidatesOfTile(consumer.p, consumer.first_tile + tile).end : 0;
      words[r] = tile * consumer.p.tile_words;
    }
  }

  __device__ __forceinline__ void ReadBins() {
#pragma unroll
    for (int r = 0; r < 2; ++r) bin_begin[r] = consumer.shared.bin_begin[consumer.row[r] / kRowPack];
  }

  // take(r, block, key) for each candidate of the thread's two tiles in one step. Rows of a tile lie in lanes
  // 4, 8 and 16 apart; every exchange leaves a thread half the columns, of twice the rows. NaN and infinity
  // have the largest key. The scores stay as they are: copies of accumulators would serialise the matrix
  // units.
  template <typename Function>
  __device__ __forceinline__ void EachCandidate(const float (&s)[64], int first_block, Function take) const {
    const int thread = consumer.thread;
    int column = first_block + 2 * (thread & 3);
    float margin[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) margin[i] = fmaf(-s[i], consumer.p.scale_log2, offset[i >> 1 & 1]);
#pragma unroll
    for (int rows = 1; rows < kRowPack; rows *= 2) {
      const int half = 32 / rows;
      const bool upper = (thread & 4 * rows) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float other = __shfl_xor_sync(~0u, upper ? margin[i] : margin[i + half], 4 * rows);
        margin[i] = fminf(upper ? margin[i + half] : margin[i], other);
      }
      column += upper ? 2 * half : 0;
    }
#pragma unroll
    for (int i = 0; i < 64 / kRowPack; ++i) {
      const int r = i >> 1 & 1, block = column + 8 * (i >> 2) + (i & 1);
      if (block < consumer.p.sink_blocks || block >= end[r]) continue;
      const int bits = min(max(__float_as_int(margin[i]), kLeast), kMost);
      take(r, block, static_cast<uint32_t>(bits - kLeast));
    }
  }

  __device__ __forceinline__ void Count(const float (&s)[64], int first_block, int shift) const {
    EachCandidate(s, first_block, [&](int r, int, uint32_t key) {
      const uint32_t bin = (key - bin_begin[r]) >> shift;
      if (bin < kSearchBins) atomicAdd(&consumer.shared.bitmap[words[r] + bin], 1u);
    });
  }

  // Finds the bin that the last wanted margin lies in, by one warp, and clears the histogram.
  __device__ __forceinline__ void Narrow(int tile, int shift) const {
    auto& shared = consumer.shared;
    constexpr int kLaneBins = kSearchBins / 32;
    uint32_t* const histogram = shared.bitmap + tile * consumer.p.tile_words;
    const int lane = consumer.thread & 31;
    const uint32_t wanted = shared.wanted[tile];
    if (wanted == 0) return;
    uint32_t own = 0, total = 0;
    for (int i = 0; i < kLaneBins; ++i) own += histogram[lane * kLaneBins + (i + lane) % kLaneBins];
    uint32_t before = SumOfLowerLanes(own, &total);
    if (before < wanted && wanted <= before + own) {  // one lane
      int bin = lane * kLaneBins;
      while (before + histogram[bin] < wanted) before += histogram[bin++];
      shared.bin_begin[tile] += static_cast<uint32_t>(bin) << shift;
      shared.wanted[tile] = wanted - before;
    }
    __syncwarp();
    for (int i = lane; i < kSearchBins; i += 32) histogram[i] = 0;
  }

  // first: of the section; first_block: within it.
  __device__ __forceinline__ void MarkBest(const float (&s)[64], int first, int first_block) const {
    EachCandidate(s, first + first_block, [&](int r, int block, uint32_t key) {
      if (key >= bin_begin[r] + (1u << kLastShift)) return;
      const int bitmap = words[r] + (key < bin_begin[r] ? 0 : consumer.p.section_words);
      atomicOr(&consumer.shared.bitmap[bitmap + ((block - first) >> 5)], 1u << (block & 31));
    });
  }

  // Of a tile's list, whose length is known; by one thread.
  __device__ __forceinline__ void DrawRoom(int local, int head) const {
    const SearchParams& p = consumer.p;
    const int tile = consumer.first_tile + local;
    const TileBlocks blocks = BlocksOfTile(p, tile);
    const int always = blocks.total - max(0, WindowBegin(p, blocks) - p.sink_blocks);
    const uint64_t length = always + consumer.shared.wanted[local];
    bool dense = tile >= p.first_dense_tile;
    uint64_t begin = 0;
    if (!dense && length > 0) {
      begin = atomicAdd(reinterpret_cast<unsigned long long*>(p.cursor), length);
      dense = begin + length > p.capacity;
      if (dense) atomicAdd(p.overflows, 1u);
    }
    const int64_t segment = static_cast<int64_t>(head) * p.num_tiles + tile;
    p.counts[segment] = dense ? kDenseSegment : static_cast<int32_t>(length);
    p.offsets[segment] = static_cast<int64_t>(dense ? 0 : begin);
    consumer.shared.list_end[local] = dense ? kNoList : begin + length;
  }

  // The section's part of a list, before what is written of it; by one warp, which clears the bitmaps.
  __device__ __forceinline__ void WriteSection(int local, int first) const {
    const SearchParams& p = consumer.p;
    auto& shared = consumer.shared;
    uint32_t* const listed = shared.bitmap + local * p.tile_words;
    const int lane = consumer.thread & 31;
    const TileBlocks blocks = BlocksOfTile(p, consumer.first_tile + local);
    const int end = min(blocks.total, first + p.section_words * 32);
    const uint64_t list_end = shared.list_end[local];
    if (list_end != kNoList && end > first) {
      TakeFromLastBin(local);
      const auto list = [&](int begin, int stop) {
        for (int i = max(begin, first) + lane; i < min(stop, end); i += 32) {
          atomicOr(&listed[(i - first) >> 5], 1u << (i & 31));
        }
      };
      list(0, p.sink_blocks);
      list(WindowBegin(p, blocks), blocks.total);
      __syncwarp();
      const int used = (end - first + 31) / 32;
      uint32_t total = 0;
      for (int i = lane; i < used; i += 32) total += __popc(listed[i]);
      uint64_t begin = list_end - __reduce_add_sync(~0u, total);
      if (lane == 0) shared.list_end[local] = begin;
      for (int base = 0; base < used; base += 32) {
        uint32_t word = base + lane < used ? listed[base + lane] : 0, in_words = 0;
        uint64_t at = begin + SumOfLowerLanes(__popc(word), &in_words);
        begin += in_words;
        for (; word != 0; word &= word - 1) p.blocks[at++] = first + (base + lane) * 32 + __ffs(word) - 1;
      }
    }
    __syncwarp();
    for (int i = lane; i < 2 * p.section_words; i += 32) listed[i] = 0;
  }

  // Lists the last bin's blocks of the highest numbers, as many as are still wanted; by one warp.
  __device__ __forceinline__ void TakeFromLastBin(int tile) const {
    const auto wanted = static_cast<int>(consumer.shared.wanted[tile]);
    if (wanted == 0) return;
    uint32_t* const listed = consumer.shared.bitmap + tile * consumer.p.tile_words;
    const uint32_t* const last_bin = listed + consumer.p.section_words;
    const int lane = consumer.thread & 31, words_used = consumer.p.section_words;
    int in_bin = 0;
    for (int i = lane; i < words_used; i += 32) in_bin += __popc(last_bin[i]);
    in_bin = __reduce_add_sync(~0u, in_bin);
    int excess = max(0, in_bin - wanted);
    __syncwarp();
    if (lane == 0) consumer.shared.wanted[tile] = wanted - (in_bin - excess);
    for (int base = 0; base < words_used; base += 32) {
      uint32_t word = base + lane < words_used ? last_bin[base + lane] : 0, in_words = 0;
      const auto before = static_cast<int>(SumOfLowerLanes(__popc(word), &in_words));
      for (int i = before; i < excess && word != 0; ++i) word &= word - 1;
      if (word != 0) listed[base + lane] |= word;
      excess -= static_cast<int>(in_words);
    }
    __syncwarp();
  }
};

}  // namespace headwater::kernels::sm90
