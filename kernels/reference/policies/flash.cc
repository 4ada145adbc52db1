#include "kernels/reference/policies/flash.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels/reference/policies/common.h"

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kTokens = 128;  // of a tile and of a block
constexpr double kNothing = -std::numeric_limits<double>::infinity();

void ScoreTile(const PolicyProblem& p, const FlashParameters& a, const BlockMeans& means, int32_t head,
               int64_t tile, FlashTile* out) {
  std::vector<std::vector<double>> x;
  for (int64_t row = tile * kTokens; row < (tile + 1) * kTokens; ++row) {
    const bool padding = row >= p.num_tokens;
    if (padding && !a.compat) break;
    x.emplace_back(static_cast<size_t>(tile + 1), kNothing);
    for (int64_t block = 0; block <= tile; ++block) {
      const bool sees = row >= block * kTokens + kTokens - 1;
      if (sees) x.back()[static_cast<size_t>(block)] = padding ? 0 : ScoreLog2(p, means, row, head, block);
    }
  }
  FinishEnergies(x, tile + 1, a.alpha, out);
}

std::vector<bool> AlwaysKept(const FlashParameters& a, int64_t tile, const std::vector<double>& energy) {
  std::vector<bool> always;
  std::vector<size_t> order;
  for (int64_t block = 0; block <= tile; ++block) {
    always.push_back(block < a.sink_blocks || tile - block < a.window_blocks);
    order.push_back(static_cast<size_t>(block));
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return energy[i] > energy[j]; });
  for (size_t i = 0; i < order.size() && i < static_cast<size_t>(a.min_blocks); ++i) always[order[i]] = true;
  return always;
}

}  // namespace

Status CheckFlashParameters(const FlashParameters& a) {
  constexpr int64_t kMost = 1 << 20;
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("alpha", a.alpha, 0, 1));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("sink_blocks", a.sink_blocks, 0, kMost));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("window_blocks", a.window_blocks, 1, kMost));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("dense_last_blocks", a.dense_last_blocks, 0, kMost));
  return CheckRange("min_blocks", a.min_blocks, 0, kMost);
}

Status FlashSelect(const PolicyProblem& p, const FlashParameters& a, FlashTrace* trace, BlockIndex* index) {
  HW_KERNELS_RETURN_IF_ERROR(CheckFlashParameters(a));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyProblem(p));
  FlashTrace stages{MeanOfKeyBlocks(p), {}};
  const int64_t num_tiles = stages.means.num_blocks;
  for (int32_t head = 0; head < p.num_q_heads; ++head) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      FlashTile out;
      ScoreTile(p, a, stages.means, head, tile, &out);
      out.dense = tile >= num_tiles - a.dense_last_blocks;
      if (!out.dense) KeepBlocks(AlwaysKept(a, tile, out.energy), &out);
      stages.tiles.push_back(std::move(out));
    }
  }
  if (index != nullptr) *index = IndexOfTiles(stages.tiles, p.num_q_heads, kTokens);
  if (trace != nullptr) *trace = std::move(stages);
  return {};
}

}  // namespace headwater::kernels::reference
