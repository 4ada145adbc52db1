#include "kernels/reference/policies/flash2.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "kernels/reference/policies/common.h"

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kBlock = 128;
constexpr int32_t kRows = 128;
constexpr double kNothing = -std::numeric_limits<double>::infinity();

void SelectOfTile(const PolicyProblem& p, const Flash2Parameters& a, const BlockMeans& means, int32_t kv_head,
                  Flash2Tile* tile) {
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  const int64_t first = tile->first_row / group, last = (tile->end_row - 1) / group;  // positions
  const int64_t scored = (last + 1) / kBlock;
  std::vector<std::vector<double>> x;
  for (int64_t row = tile->first_row; row < tile->end_row; ++row) {
    const int64_t position = row / group;
    const auto head = static_cast<int32_t>(kv_head * group + row % group);
    x.emplace_back(static_cast<size_t>(scored), kNothing);
    for (int64_t block = 0; block < scored; ++block) {
      const bool sees = position >= block * kBlock;
      if (sees) x.back()[static_cast<size_t>(block)] = ScoreLog2(p, means, position, head, block);
    }
  }
  FinishEnergies(x, scored, a.alpha, tile);
  std::vector<bool> always;
  for (int64_t block = 0; block <= last / kBlock; ++block) {
    always.push_back(block < a.sink_blocks || block > first / kBlock - a.window_blocks);
  }
  KeepBlocks(always, tile);
}

Status CheckAll(const PolicyProblem& p, const Flash2Parameters& a, int32_t layer, bool wants_index) {
  HW_KERNELS_RETURN_IF_ERROR(CheckFlash2Parameters(a));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyProblem(p));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("layer", layer, 0, 1 << 20));
  const int32_t group = p.num_q_heads / p.num_kv_heads;
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads / num_kv_heads", group, 1, kRows));
  if (wants_index && a.compat && kRows % group != 0) {
    return {StatusCode::kUnimplemented, "compat tiles of " + std::to_string(kRows) +
                                            " packed rows end inside groups of " + std::to_string(group) +
                                            " heads, which a BlockIndex cannot say"};
  }
  return {};
}

}  // namespace

Status CheckFlash2Parameters(const Flash2Parameters& a) {
  constexpr int64_t kMost = 1 << 20;
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("alpha", a.alpha, 0, 1));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("sink_blocks", a.sink_blocks, 0, kMost));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("window_blocks", a.window_blocks, 1, kMost));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("dense_last_tiles", a.dense_last_tiles, 0, kMost));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("dense_layers", a.dense_layers, 0, kMost));
  return CheckRange("dense_tokens", a.dense_tokens, 0, int64_t{1} << 40);
}

Status Flash2Select(const PolicyProblem& p, const Flash2Parameters& a, int32_t layer, Flash2Trace* trace,
                    BlockIndex* index) {
  HW_KERNELS_RETURN_IF_ERROR(CheckAll(p, a, layer, index != nullptr));
  const int32_t group = p.num_q_heads / p.num_kv_heads;
  const int64_t tile_rows = a.compat ? kRows : kRows / group * group;
  const int64_t rows = p.num_tokens * group;
  Flash2Trace stages{MeanOfKeyBlocks(p), (rows + tile_rows - 1) / tile_rows, {}};
  const bool all_dense = layer < a.dense_layers || p.num_tokens <= a.dense_tokens;
  for (int32_t head = 0; head < p.num_kv_heads; ++head) {
    for (int64_t i = 0; i < stages.num_tiles; ++i) {
      Flash2Tile tile;
      tile.first_row = i * tile_rows;
      tile.end_row = std::min(rows, tile.first_row + tile_rows);
      tile.dense = all_dense || i >= stages.num_tiles - a.dense_last_tiles;
      if (!tile.dense) SelectOfTile(p, a, stages.means, head, &tile);
      stages.tiles.push_back(std::move(tile));
    }
  }
  if (index != nullptr) {
    *index = IndexOfTiles({stages.tiles.begin(), stages.tiles.end()}, p.num_kv_heads, kRows / group);
  }
  if (trace != nullptr) *trace = std::move(stages);
  return {};
}

}  // namespace headwater::kernels::reference
