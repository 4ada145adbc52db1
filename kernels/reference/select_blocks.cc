#include "kernels/reference/select_blocks.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/reference/rounding.h"

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kRows = 128;  // of a tile
constexpr int64_t kBlockKeys = 128;
constexpr double kNothing = -std::numeric_limits<double>::infinity();

// Mean of one head's rows [begin, end) of x [tokens, heads, dim].
std::vector<float> Mean(const float* x, int64_t begin, int64_t end, int32_t heads, int32_t head,
                        int32_t dim) {
  std::vector<float> mean(dim);
  for (int32_t i = 0; i < dim; ++i) {
    double sum = 0;
    for (int64_t token = begin; token < end; ++token) sum += x[(token * heads + head) * dim + i];
    mean[i] = RoundToBf16(sum / static_cast<double>(end - begin));
  }
  return mean;
}

struct Head {
  std::vector<double> scores;  // log2 units, of the complete blocks
  double lse;
};

Head ScoreHead(const std::vector<float>& probe, const std::vector<std::vector<float>>& means,
               int64_t complete, double scale) {
  Head head{std::vector<double>(complete), kNothing};
  double top = kNothing, sum = 0;
  for (int64_t block = 0; block < complete; ++block) {
    double dot = 0;
    for (size_t i = 0; i < probe.size(); ++i) dot += static_cast<double>(probe[i]) * means[block][i];
    head.scores[block] = dot * scale / std::log(2.0);
    top = std::max(top, head.scores[block]);
  }
  for (const double score : head.scores) sum += std::exp2(score - top);
  if (complete > 0) head.lse = top + std::log2(sum);
  return head;
}

struct Tile {
  int64_t complete, total;     // blocks that all rows see, and that the last one sees
  std::vector<double> scores;  // of the complete blocks: log2 units under the tile's best, of the best head
};

Tile ScoreTile(const SelectBlocksArgs& a, int32_t list, int64_t first, int64_t end,
               const std::vector<std::vector<float>>& means) {
  const auto visible = [&](int64_t row) {
    return std::clamp<int64_t>(row + a.query_position + 1, 0, a.total_k);
  };
  const int64_t complete = visible(first) / kBlockKeys;
  Tile tile{complete, (visible(end - 1) + kBlockKeys - 1) / kBlockKeys,
            std::vector<double>(complete, kNothing)};
  const int32_t pack = a.num_q_heads / a.num_kv_heads;
  double best = kNothing;
  for (int32_t h = 0; h < pack; ++h) {
    const Head head = ScoreHead(Mean(a.q, first, end, a.num_q_heads, list * pack + h, a.head_dim), means,
                                complete, a.softmax_scale);
    for (int64_t block = 0; block < complete; ++block) {
      tile.scores[block] = std::max(tile.scores[block], head.scores[block] - head.lse);
      best = std::max(best, tile.scores[block]);
    }
  }
  for (double& score : tile.scores) score -= best;
  return tile;
}

struct Last {
  double score;
  int64_t block;
};

// The last of `candidates` (neither sink nor window) that a forced density lists; infinity: none.
Last LastListed(const SelectBlocksArgs& a, const Tile& tile, std::vector<int64_t> candidates) {
  const int64_t always = tile.total - static_cast<int64_t>(candidates.size());
  const double listed = std::ceil(a.forced_density * static_cast<double>(tile.total));
  const int64_t wanted = static_cast<int64_t>(listed) - always;
  if (wanted <= 0) return {-kNothing, tile.total};
  std::sort(candidates.begin(), candidates.end(), [&](int64_t x, int64_t y) {
    return tile.scores[x] != tile.scores[y] ? tile.scores[x] > tile.scores[y] : x > y;
  });
  return {tile.scores[candidates[wanted - 1]], candidates[wanted - 1]};
}

SelectedBlocks SelectOfTile(const SelectBlocksArgs& a, const Tile& tile, double near) {
  SelectedBlocks selected;
  std::vector<int64_t> candidates;
  const int64_t window = std::min(tile.total - a.window_blocks, tile.complete);
  for (int64_t block = a.sink_blocks; block < window; ++block) candidates.push_back(block);
  const Last last = a.forced_density > 0 ? LastListed(a, tile, candidates) : Last{std::log2(a.threshold), 0};
  for (int64_t block = 0; block < tile.total; ++block) {
    const bool always = block < a.sink_blocks || block >= window;
    const double score = always ? 0 : tile.scores[block];
    if (always || score > last.score || (score == last.score && block >= last.block)) {
      selected.blocks.push_back(static_cast<int32_t>(block));
    }
    if (!always && std::abs(score - last.score) < near) {
      selected.undecided.push_back(static_cast<int32_t>(block));
    }
  }
  return selected;
}

}  // namespace

std::vector<SelectedBlocks> SelectBlocks(const SelectBlocksArgs& a, double near) {
  const int32_t pack = a.num_q_heads / a.num_kv_heads;
  const int64_t positions = kRows / pack, tiles = (a.total_q + positions - 1) / positions;
  const int64_t num_blocks = (a.total_k + kBlockKeys - 1) / kBlockKeys;
  std::vector<SelectedBlocks> result;
  for (int32_t list = 0; list < a.num_kv_heads; ++list) {
    std::vector<std::vector<float>> means;
    for (int64_t block = 0; block < num_blocks; ++block) {
      means.push_back(Mean(a.k, block * kBlockKeys, std::min(a.total_k, (block + 1) * kBlockKeys),
                           a.num_kv_heads, list, a.head_dim));
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * positions, end = std::min(a.total_q, first + positions);
      const bool dense = a.dense_last_tokens > 0 &&
                         tile >= std::max<int64_t>(0, a.total_q - a.dense_last_tokens) / positions;
      result.push_back(dense ? SelectedBlocks{true, {}, {}}
                             : SelectOfTile(a, ScoreTile(a, list, first, end, means), near));
    }
  }
  return result;
}

}  // namespace headwater::kernels::reference
