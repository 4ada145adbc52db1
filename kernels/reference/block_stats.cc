#include "kernels/reference/block_stats.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kBlockTokens = 128;
constexpr int64_t kSuperblock = 8;
constexpr int64_t kTableRows = 8;  // tables are padded to a multiple of it

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t TokensOf(int64_t block, int64_t tokens) {
  return std::min(kBlockTokens, tokens - block * kBlockTokens);
}

// A NaN on either side stays.
double Smaller(double a, double b) { return std::isnan(a) || a < b ? a : b; }
double Larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }

}  // namespace

BlockStats BlockStatistics(const float* x, int64_t tokens, int32_t num_heads, int32_t head_dim) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const int64_t blocks = DivideUp(tokens, kBlockTokens);
  const auto rows = static_cast<size_t>(blocks * num_heads), dim = static_cast<size_t>(head_dim);
  BlockStats stats;
  stats.mean.assign(rows * dim, 0);
  stats.min.assign(rows * dim, kInfinity);
  stats.max.assign(rows * dim, -kInfinity);
  stats.mean_square.assign(rows, 0);
  stats.max_norm.assign(rows, 0);
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t block = token / kBlockTokens;
    const auto own = static_cast<double>(TokensOf(block, tokens));
    for (int32_t head = 0; head < num_heads; ++head) {
      const auto row = static_cast<size_t>(block * num_heads + head);
      const float* values = x + (token * num_heads + head) * head_dim;
      double square = 0;
      for (size_t i = 0; i < dim; ++i) {
        const double value = values[i];
        square += value * value;
        stats.mean[row * dim + i] += value / own;
        stats.min[row * dim + i] = Smaller(value, stats.min[row * dim + i]);
        stats.max[row * dim + i] = Larger(value, stats.max[row * dim + i]);
      }
      stats.mean_square[row] += square / own;
      stats.max_norm[row] = Larger(std::sqrt(square), stats.max_norm[row]);
    }
  }
  return stats;
}

std::vector<double> MeanTable(const float* mean, int64_t tokens, int32_t num_heads, int32_t head_dim) {
  const int64_t blocks = DivideUp(tokens, kBlockTokens), superblocks = DivideUp(blocks, kSuperblock);
  const int64_t fine = superblocks * kSuperblock;
  const int64_t rows = fine + DivideUp(superblocks, kTableRows) * kTableRows;
  std::vector<double> table(static_cast<size_t>(num_heads * rows * head_dim), 0);
  for (int32_t head = 0; head < num_heads; ++head) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t superblock = block / kSuperblock;
      const int64_t last = std::min(tokens, (superblock + 1) * kSuperblock * kBlockTokens);
      const auto share = static_cast<double>(TokensOf(block, tokens)) /
                         static_cast<double>(last - superblock * kSuperblock * kBlockTokens);
      for (int32_t i = 0; i < head_dim; ++i) {
        const double value = mean[(block * num_heads + head) * head_dim + i];
        table[static_cast<size_t>((head * rows + block) * head_dim + i)] = value;
        table[static_cast<size_t>((head * rows + fine + superblock) * head_dim + i)] += value * share;
      }
    }
  }
  return table;
}

}  // namespace headwater::kernels::reference
