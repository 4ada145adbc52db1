#include "kernels/reference/policies/flash_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "kernels/reference/dot.h"
#include "kernels/reference/rounding.h"

namespace headwater::kernels::reference {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();
constexpr double kUndecided = 0.02;  // of the threshold

}  // namespace

BlockMeans MeanOfKeyBlocks(const PolicyProblem& p) {
  BlockMeans means{(p.num_tokens + kKeyBlockTokens - 1) / kKeyBlockTokens, p.head_dim, {}};
  const int32_t group = p.num_q_heads / p.num_kv_heads;
  for (int32_t head = 0; head < p.num_kv_heads; ++head) {
    for (int64_t block = 0; block < means.num_blocks; ++block) {
      const int64_t begin = block * kKeyBlockTokens;
      const int64_t end = std::min(p.num_tokens, begin + kKeyBlockTokens);
      for (int32_t i = 0; i < p.head_dim; ++i) {
        double sum = 0;
        for (int64_t token = begin; token < end; ++token) sum += p.K(token, head * group)[i];
        means.values.push_back(RoundToBf16(sum / static_cast<double>(end - begin)));
      }
    }
  }
  return means;
}

double ScoreLog2(const PolicyProblem& p, const BlockMeans& means, int64_t token, int32_t q_head,
                 int64_t block) {
  const float* q = p.Q(token, q_head);
  const float* mean = means.Of(q_head / (p.num_q_heads / p.num_kv_heads), block);
  return Dot(q, mean, p.head_dim) * p.softmax_scale / std::log(2.0);
}

void FinishEnergies(const std::vector<std::vector<double>>& x, int64_t num_blocks, double alpha,
                    FlashTile* tile) {
  tile->maxima.assign(static_cast<size_t>(num_blocks), kNothing);
  tile->energy.assign(static_cast<size_t>(num_blocks), 0);
  tile->top = kNothing;
  for (const std::vector<double>& row : x) {
    for (size_t block = 0; block < row.size(); ++block) {
      tile->maxima[block] = std::max(tile->maxima[block], row[block]);
      tile->top = std::max(tile->top, row[block]);
    }
  }
  for (const std::vector<double>& row : x) {
    for (size_t block = 0; block < row.size(); ++block) {
      if (row[block] != kNothing) tile->energy[block] += std::exp2(row[block] - tile->top);
    }
  }
  double most = 0;
  for (const double energy : tile->energy) most = std::max(most, energy);
  tile->threshold = alpha * most;
}

void KeepBlocks(const std::vector<bool>& always, FlashTile* tile) {
  for (size_t block = 0; block < always.size(); ++block) {
    const bool scored = block < tile->energy.size();
    const double energy = scored ? tile->energy[block] : 0;
    if (always[block] || (scored && energy >= tile->threshold)) {
      tile->kept.push_back(static_cast<int32_t>(block));
    }
    if (!always[block] && scored && std::abs(energy - tile->threshold) < kUndecided * tile->threshold) {
      tile->undecided.push_back(static_cast<int32_t>(block));
    }
  }
}

BlockIndex IndexOfTiles(const std::vector<FlashTile>& tiles, int32_t num_lists, int32_t q_tile_tokens) {
  BlockIndex index;
  index.q_tile_tokens = q_tile_tokens;
  index.num_lists = num_lists;
  index.num_q_tiles = static_cast<int64_t>(tiles.size()) / num_lists;
  index.offsets.push_back(0);
  for (const FlashTile& tile : tiles) {
    index.dense.push_back(tile.dense ? 1 : 0);
    index.blocks.insert(index.blocks.end(), tile.kept.begin(), tile.kept.end());
    index.offsets.push_back(static_cast<int64_t>(index.blocks.size()));
  }
  return index;
}

}  // namespace headwater::kernels::reference
