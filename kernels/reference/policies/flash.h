// FlashPrefill V1 (arXiv:2603.06199, sections 3.2 to 3.4, and what its official code does where they differ):
// every row of a tile scores the mean key of every block.
//
//   x[r, J] = softmax_scale * log2(e) * q_r . kbar_J        row r sees J if it sees the LAST token of J
//   E[I, J] = sum over the rows r of tile I that see J of 2^(x[r, J] - max x of the tile)
//   J is kept if E[I, J] >= alpha * max_J E[I, J], or J < sink_blocks, or I - J < window_blocks;
//   the last dense_last_blocks tiles keep everything
//
// Of its own block a tile's last row alone has a say, and of a block that ends past the prompt no row.
#ifndef HW_KERNELS_REFERENCE_POLICIES_FLASH_H_
#define HW_KERNELS_REFERENCE_POLICIES_FLASH_H_

#include <cstdint>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/flash_scores.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/status.h"

namespace headwater::kernels::reference {

// Published: alpha 0.18 for Llama-3.1-8B, 0.08 for Qwen2.5-7B, 0.12 for Qwen3-30B-A3B; 0 keeps
// every block.
struct FlashParameters {
  double alpha = 0.18;            // 0 to 1; a share of the tile's largest energy
  int32_t sink_blocks = 2;        // 0 to 2^20
  int32_t window_blocks = 4;      // 1 to 2^20, the tile's own among them
  int32_t dense_last_blocks = 2;  // 0 to 2^20
  // That many blocks of the largest energies are kept in any case, of equal ones the lower. 0 to 2^20.
  int32_t min_blocks = 0;
  // As the official code: rows past the prompt in a last tile that is not full are queries of zeros, which
  // see what rows at their positions would: 2^0 for each block and row. It shows only where the last tile is
  // not dense.
  bool compat = false;
};

// INVALID_ARGUMENT names the value and its range.
Status CheckFlashParameters(const FlashParameters& parameters);

struct FlashTrace {
  BlockMeans means;
  // [num_q_heads, num_tiles of 128 tokens]; dense tiles are scored too, over blocks 0 to the tile's own.
  std::vector<FlashTile> tiles;
};

// index: one list per query head, tiles and blocks of 128 tokens; passes ValidateBlockIndex(). Either output
// may be null. INVALID_ARGUMENT: parameters or problem out of range. Cost: num_q_heads * num_tokens^2 / 256
// products of head_dim, and as many doubles of memory as a tile has rows and blocks.
Status FlashSelect(const PolicyProblem& problem, const FlashParameters& parameters, FlashTrace* trace,
                   BlockIndex* index);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_FLASH_H_
