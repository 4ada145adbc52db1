// FlashPrefill V2's index stage (arXiv:2608.19758, sections 3.2 to 3.4, and what its official code does where
// they differ). A tile is packed rows of one KV head: row r is position r / g, head r % g of the group of g
// heads.
//
//   x[r, J] = softmax_scale * log2(e) * q_r . kbar_J        row r sees J if it sees the FIRST token of J
//   scored: the blocks that end at or before the tile's last position
//   E[J] = sum over the rows r that see J of 2^(x[r, J] - max x of the tile)
//   J is kept if it is scored and E[J] >= alpha * max_J E[J], or J < sink_blocks,
//   or first_block - window_blocks < J <= last_block (blocks of the tile's first and last position);
//   the last dense_last_tiles tiles and the first dense_layers layers keep everything
//
// The mean correction that goes with it is MeanKeys() without superblocks (reference/mean_keys.h).
#ifndef HW_KERNELS_REFERENCE_POLICIES_FLASH2_H_
#define HW_KERNELS_REFERENCE_POLICIES_FLASH2_H_

#include <cstdint>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/flash_scores.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/status.h"

namespace headwater::kernels::reference {

// Defaults are those of the official README, not of its classes.
struct Flash2Parameters {
  double alpha = 0.1;            // 0 to 1; a share of the tile's largest energy
  int32_t sink_blocks = 2;       // 0 to 2^20
  int32_t window_blocks = 4;     // 1 to 2^20, back from the tile's first position, its own block among them
  int32_t dense_last_tiles = 8;  // 0 to 2^20
  int32_t dense_layers = 4;      // 0 to 2^20
  int64_t dense_tokens = 0;      // 0 to 2^40: prompts of no more tokens are dense
  // How tiles are cut where g does not divide 128. False: 128 / g (rounded down) positions, as our attention
  // takes them. True, as the official code: 128 packed rows, so that a tile may end inside a group.
  bool compat = false;
};

// INVALID_ARGUMENT names the value and its range.
Status CheckFlash2Parameters(const Flash2Parameters& parameters);

struct Flash2Tile : FlashTile {        // a dense tile is not scored: maxima and energy are empty
  int64_t first_row = 0, end_row = 0;  // packed rows
};

struct Flash2Trace {
  BlockMeans means;
  int64_t num_tiles = 0;          // of a KV head
  std::vector<Flash2Tile> tiles;  // [num_kv_heads, num_tiles]
};

// layer: counted from 0. index: one list per KV head, q_tile_tokens = 128 / g, blocks of 128 tokens; passes
// ValidateBlockIndex(). Either output may be null. INVALID_ARGUMENT: parameters, layer or problem out of
// range, or g over 128. UNIMPLEMENTED: an index is asked for, compat is set and g does not divide 128:
// BlockIndex cannot say tiles that end inside a group; the trace can. Cost: num_q_heads * num_tokens^2 / 256
// products of head_dim.
Status Flash2Select(const PolicyProblem& problem, const Flash2Parameters& parameters, int32_t layer,
                    Flash2Trace* trace, BlockIndex* index);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_FLASH2_H_
