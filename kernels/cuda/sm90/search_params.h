// What the pattern search kernels are told. Plain data, copied at launch.
#ifndef HW_KERNELS_CUDA_SM90_SEARCH_PARAMS_H_
#define HW_KERNELS_CUDA_SM90_SEARCH_PARAMS_H_

#include <cstdint>
#include <type_traits>

namespace headwater::kernels::sm90 {

inline constexpr int32_t kSearchRows = 128;           // probes of one CTA
inline constexpr int32_t kSearchBitmapWords = 20480;  // of all its tiles
inline constexpr int32_t kSearchHeads = 128;          // KV heads at most
inline constexpr int32_t kSearchBins = 512;  // of a tile's histogram, which shares the bitmaps' memory
inline constexpr int32_t kSearchSectionWords = 256;  // of one bitmap at most, with a forced density
static_assert(2 * kSearchSectionWords <= kSearchBins);

// Means over windows of `window` tokens of x [tokens, heads, head_dim] bf16, in f32, rounded to bf16:
// out [heads / pack, windows, pack, head_dim]. The last window may be short.
struct WindowMeanParams {
  const void* x;
  void* out;
  int64_t tokens;
  int32_t heads;
  int32_t head_dim;
  int32_t window;
  int32_t pack;
};

// Probes and block means as above; tiles as in attention_params.h, one sequence.
struct SearchParams {
  int32_t num_tiles;   // of a head
  int32_t begin_tile;  // this launch's tiles: probes are of [begin_tile, end_tile)
  int32_t end_tile;
  int32_t num_heads;  // KV heads: each packs its group
  int32_t pack;
  int32_t row_pack;       // rows of a tile among a CTA's: pack, rounded up to 1, 2, 4 or 8
  int32_t tiles_per_cta;  // at most kSearchRows / row_pack
  int32_t bitmap_words;   // of one bit per block
  int32_t section_words;  // of as many blocks as are listed at a time, with a forced density: a multiple of 4
  // Of a tile: one bitmap; with a forced density two of a section, and room for a histogram. tiles_per_cta *
  // tile_words <= kSearchBitmapWords.
  int32_t tile_words;
  int32_t tile_positions;
  int32_t q_len;
  int32_t kv_len;
  int32_t q_position;
  float scale_log2;  // softmax scale * log2(e)
  // log2(alpha) of each KV head; unused with a forced density. -infinity: dense; infinity: not searched.
  float thresholds_log2[kSearchHeads];
  double forced_density;  // 0: by threshold
  int32_t sink_blocks;
  int32_t window_blocks[kSearchHeads];  // of each KV head, the tile's last block included
  int32_t first_dense_tile;
  // Lists, as the attention kernel reads them.
  int32_t* counts;
  int64_t* offsets;
  int32_t* blocks;
  uint64_t* cursor;     // entries of `blocks` given out, 0 at launch
  uint64_t capacity;    // entries of `blocks`
  uint32_t* overflows;  // tiles that went dense for want of room, 0 at launch
};
static_assert(std::is_trivially_copyable_v<SearchParams>);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_SEARCH_PARAMS_H_
