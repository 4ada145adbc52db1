#include "kernels/reference/select_blocks.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/dtype.h"

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kRows = 128;  // of a tile
constexpr int64_t kBlockKeys = 128;
constexpr double kNothing = -std::numeric_limits<double>::infinity();

float RoundToBf16(double value) {
  const float single = static_cast<float>(value);
  uint16_t bits = 0;
  float rounded = 0;
  Convert(&single, DType::kF32, &bits, DType::kBF16, 1);
  Convert(&bits, DType::kBF16, &rounded, DType::kF32, 1);
  return rounded;
}

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
      const auto visible = [&](int64_t row) {
        return std::clamp<int64_t>(row + a.query_position + 1, 0, a.total_k);
      };
      const int64_t complete = visible(first) / kBlockKeys,
                    total = (visible(end - 1) + kBlockKeys - 1) / kBlockKeys;
      SelectedBlocks selected;
      selected.dense = a.dense_last_tokens > 0 &&
                       tile >= std::max<int64_t>(0, a.total_q - a.dense_last_tokens) / positions;
      std::vector<Head> heads;
      double best = kNothing;
      for (int32_t h = 0; h < pack; ++h) {
        heads.push_back(ScoreHead(Mean(a.q, first, end, a.num_q_heads, list * pack + h, a.head_dim), means,
                                  complete, a.softmax_scale));
        for (const double score : heads.back().scores) best = std::max(best, score - heads.back().lse);
      }
      for (int64_t block = 0; block < total && !selected.dense; ++block) {
        double margin = kNothing;
        for (const Head& head : heads) {
          if (block < complete) {
            margin = std::max(margin, head.scores[block] - head.lse - std::log2(a.threshold) - best);
          }
        }
        const bool forced = block < a.sink_blocks || block >= std::min(total - a.window_blocks, complete);
        if (forced || margin >= 0) selected.blocks.push_back(static_cast<int32_t>(block));
        if (!forced && std::abs(margin) < near) selected.undecided.push_back(static_cast<int32_t>(block));
      }
      result.push_back(std::move(selected));
    }
  }
  return result;
}

}  // namespace headwater::kernels::reference
