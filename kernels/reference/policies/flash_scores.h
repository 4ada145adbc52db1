// What FlashPrefill V1 and V2 share: means of key blocks, energies of a tile over them, and the threshold.
#ifndef HW_KERNELS_REFERENCE_POLICIES_FLASH_SCORES_H_
#define HW_KERNELS_REFERENCE_POLICIES_FLASH_SCORES_H_

#include <cstdint>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/problem.h"

namespace headwater::kernels::reference {

// [num_kv_heads, blocks, head_dim]: means of K over each block's tokens, from double sums, rounded to bf16 as
// both versions store them. The last block's mean is over the tokens that it has.
struct BlockMeans {
  int64_t num_blocks = 0;
  int32_t head_dim = 0;
  std::vector<float> values;
  const float* Of(int32_t kv_head, int64_t block) const {
    return values.data() + (kv_head * num_blocks + block) * head_dim;
  }
};
BlockMeans MeanOfKeyBlocks(const PolicyProblem& problem);

// A tile's stages. Logits x are in log2 units: softmax_scale * log2(e) * q . kbar.
struct FlashTile {
  bool dense = false;          // every causal block; `kept` is empty then
  std::vector<double> maxima;  // per scored block: largest x of the rows that see it; -inf: none does
  std::vector<double> energy;  // per scored block: sum over those rows of 2^(x - top)
  double top = 0;              // largest x of the tile; -inf: no row sees a block
  double threshold = 0;        // alpha times the largest energy
  std::vector<int32_t> kept;   // ascending
  // Blocks that the threshold alone decides and whose energy is within 2 % of it: f32 may decide otherwise.
  std::vector<int32_t> undecided;
};

// Fills maxima, energy, top and threshold from x[row][block], -inf where the row does not see the block.
void FinishEnergies(const std::vector<std::vector<double>>& x, int64_t num_blocks, double alpha,
                    FlashTile* tile);

// Lists blocks [0, end): those that `always` says, and the scored ones that reach the threshold.
void KeepBlocks(const std::vector<bool>& always, FlashTile* tile);

// x of one query row and one mean.
double ScoreLog2(const PolicyProblem& problem, const BlockMeans& means, int64_t token, int32_t q_head,
                 int64_t block);

// tiles: [num_lists, num_q_tiles], list-major.
BlockIndex IndexOfTiles(const std::vector<FlashTile>& tiles, int32_t num_lists, int32_t q_tile_tokens);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_FLASH_SCORES_H_
