// Forced density of the pattern search: per tile the `wanted` best blocks are marked in place of those over a
// threshold. wanted is ceil(forced_density * total) less the blocks that are always listed.
//
// A block's margin is how far it lies under the tile's best one: the least over the tile's heads of lse_h + M
// - scale * probe_h . kbar_J, log2 units. Floats that are not negative are ordered like their bits, so that a
// radix select finds the wanted-th margin: two passes over the means make a histogram per tile, of the
// margins' first and next nine bits from the exponent on, and a third marks what lies below the last bin, and
// in it. Margins in one last bin differ by 2^-12 of themselves; of these the list takes the highest numbers.
// So every list has its exact length, and equal calls give equal lists.
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
// two bitmaps: listed blocks, and those of the last bin.
template <class Traits, int kRowPack>
struct DensitySearch {
  static constexpr int kPasses = 4;  // over the means, that of Gather() counted
  static constexpr int kDigitBits = 9;
  static constexpr int kFirstShift = 20, kLastShift = kFirstShift - kDigitBits;
  static_assert(1 << kDigitBits == kSearchBins);
  // Bits of 2^-32, and of the last float under 2^32: smaller margins are equal, larger ones too.
  static constexpr int kLeast = 95 << 23, kMost = (159 << 23) - 1;
  static_assert((kMost - kLeast) >> kFirstShift == kSearchBins - 1);

  SearchConsumer<Traits>& consumer;
  float offset[2];        // lse_h + M of the row; infinity: it has no say
  int end[2];             // of the candidates of the row's tile
  uint32_t bin_begin[2];  // key at which the tile's last bin begins
  int words[2];           // where those of the row's tile begin

  __device__ __forceinline__ void Mark(int steps) {
    auto& shared = consumer.shared;
    EachTile([&](int tile) {
      if ((consumer.thread & 31) != 0) return;
      shared.bin_begin[tile] = 0;
      shared.wanted[tile] = CandidatesOfTile(consumer.p, consumer.first_tile + tile).wanted;
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
    consumer.Pass(steps, [&](float(&s)[64], int first_block) { MarkBest(s, first_block); });
    NamedSync(1, 256);
    EachTile([&](int tile) { TakeFromLastBin(tile); });
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

  __device__ __forceinline__ void MarkBest(const float (&s)[64], int first_block) const {
    EachCandidate(s, first_block, [&](int r, int block, uint32_t key) {
      if (key >= bin_begin[r] + (1u << kLastShift)) return;
      const int bitmap = words[r] + (key < bin_begin[r] ? 0 : consumer.p.bitmap_words);
      atomicOr(&consumer.shared.bitmap[bitmap + (block >> 5)], 1u << (block & 31));
    });
  }

  // Lists the last bin's blocks of the highest numbers, as many as are still wanted; by one warp.
  __device__ __forceinline__ void TakeFromLastBin(int tile) const {
    const auto wanted = static_cast<int>(consumer.shared.wanted[tile]);
    if (wanted == 0) return;
    uint32_t* const listed = consumer.shared.bitmap + tile * consumer.p.tile_words;
    const uint32_t* const last_bin = listed + consumer.p.bitmap_words;
    const int lane = consumer.thread & 31, words_used = consumer.p.bitmap_words;
    int in_bin = 0;
    for (int i = lane; i < words_used; i += 32) in_bin += __popc(last_bin[i]);
    int excess = __reduce_add_sync(~0u, in_bin) - wanted;
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
