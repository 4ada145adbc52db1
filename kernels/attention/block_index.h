// BlockIndex: which key blocks each query tile attends to. Every pattern policy ends in one, every attention
// kernel starts from one.
#ifndef HW_KERNELS_ATTENTION_BLOCK_INDEX_H_
#define HW_KERNELS_ATTENTION_BLOCK_INDEX_H_

#include <cstdint>
#include <vector>

#include "kernels/status.h"

namespace headwater::kernels {

inline constexpr int32_t kQueryTileTokens = 128;
inline constexpr int32_t kKeyBlockTokens = 128;

// Segments in CSR form. Tiles and blocks are counted from the start of the prompt: tile t holds the queries
// at positions [t * q_tile_tokens, (t + 1) * q_tile_tokens), block b likewise. Segment (list, tile) has the
// row list * num_q_tiles + (tile - first_q_tile). Causality is not stored: a kernel masks keys after the
// query, and blocks after the tile's own are not allowed.
struct BlockIndex {
  int32_t q_tile_tokens = kQueryTileTokens;
  int32_t k_block_tokens = kKeyBlockTokens;
  // Query heads are dealt to the lists in order: head h uses list h * num_lists / num_q_heads. 1: all heads
  // share one list; num_kv_heads: one per GQA group; num_q_heads: one per head.
  int32_t num_lists = 1;
  int64_t first_q_tile = 0;
  int64_t num_q_tiles = 0;
  // [num_lists * num_q_tiles]; nonzero: every causal block, the segment's list is empty.
  std::vector<uint8_t> dense;
  // [num_lists * num_q_tiles + 1]
  std::vector<int64_t> offsets;
  // Key blocks of each segment, ascending, without repeats.
  std::vector<int32_t> blocks;

  // Element mask inside the selected blocks, for A-shaped patterns; both negative: none. A query at position
  // p sees key j (j <= p) where j < sink_tokens or j > p - window_tokens.
  int64_t sink_tokens = -1;
  int64_t window_tokens = -1;

  bool has_element_mask() const { return window_tokens >= 0; }
  int64_t Row(int32_t list, int64_t tile) const { return list * num_q_tiles + (tile - first_q_tile); }
};

// Every segment of tiles [first_q_tile, first_q_tile + num_q_tiles) dense, in one list.
BlockIndex DenseBlockIndex(int64_t first_q_tile, int64_t num_q_tiles);

// INVALID_ARGUMENT names the first segment that breaks a rule above (sizes, order, repeats, blocks past the
// tile's own).
Status ValidateBlockIndex(const BlockIndex& index);

// Selected and causally possible (list, tile, block) triples; density is their ratio. Cost: O(segments).
struct BlockCounts {
  uint64_t selected = 0;
  uint64_t possible = 0;
};
BlockCounts CountBlocks(const BlockIndex& index);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_ATTENTION_BLOCK_INDEX_H_
