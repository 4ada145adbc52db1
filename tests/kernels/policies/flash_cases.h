// Problems for the tests of FlashPrefill's references, and its quantities computed another way: in natural
// logarithms, long double, one (tile, block) at a time.
#ifndef HW_TESTS_KERNELS_POLICIES_FLASH_CASES_H_
#define HW_TESTS_KERNELS_POLICIES_FLASH_CASES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/flash_scores.h"

namespace headwater::kernels::reference {

struct FlashCase {
  FlashCase(int64_t tokens, int32_t q_heads, int32_t kv_heads, int32_t dim)
      : q(static_cast<size_t>(tokens * q_heads * dim)), k(static_cast<size_t>(tokens * kv_heads * dim)) {
    problem.num_tokens = tokens;
    problem.num_q_heads = q_heads;
    problem.num_kv_heads = kv_heads;
    problem.head_dim = dim;
    problem.softmax_scale = 1;
    problem.q = q.data();
    problem.k = k.data();
  }
  FlashCase(const FlashCase&) = delete;

  // Normal q and k; keys of a block share a part, so that blocks differ.
  void Randomize(uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (float& value : q) value = normal(generator);
    const size_t width = static_cast<size_t>(problem.num_kv_heads) * problem.head_dim;
    std::vector<float> shared(width);
    for (size_t i = 0; i < k.size(); ++i) {
      if (i % (128 * width) < width) shared[i % width] = normal(generator);
      k[i] = normal(generator) + shared[i % width];
    }
    problem.softmax_scale = 1 / std::sqrt(static_cast<double>(problem.head_dim));
  }

  void SetQ(int64_t token, int32_t head, int32_t i, float value) {
    q[static_cast<size_t>((token * problem.num_q_heads + head) * problem.head_dim + i)] = value;
  }
  void SetK(int64_t begin, int64_t end, int32_t kv_head, int32_t i, float value) {
    for (int64_t token = begin; token < std::min(end, problem.num_tokens); ++token) {
      k[static_cast<size_t>((token * problem.num_kv_heads + kv_head) * problem.head_dim + i)] = value;
    }
  }

  std::vector<float> q, k;
  PolicyProblem problem;
};

// bf16 by its bits, to nearest even.
inline float Bf16(long double value) {
  const auto single = static_cast<float>(value);
  uint32_t bits = 0;
  std::memcpy(&bits, &single, 4);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  float rounded = 0;
  std::memcpy(&rounded, &bits, 4);
  return rounded;
}

// ln of sum exp and the maximum of (softmax_scale q . mean of block), over the (token, head) rows given.
struct LogSum {
  long double most = -INFINITY, sum = 0;
  void Add(long double x) {
    if (x > most) {
      sum = most == -INFINITY ? 1 : sum * std::exp(most - x) + 1;
      most = x;
    } else {
      sum += std::exp(x - most);
    }
  }
  long double Ln() const { return most + std::log(sum); }
};

struct Row {
  int64_t token;
  int32_t head;
};

inline LogSum RowsOnBlock(const PolicyProblem& p, const std::vector<Row>& rows, int64_t block) {
  const int64_t begin = block * 128, end = std::min(p.num_tokens, begin + 128);
  LogSum total;
  std::vector<float> mean;
  for (int32_t i = 0; !rows.empty() && i < p.head_dim; ++i) {
    long double sum = 0;
    for (int64_t token = end - 1; token >= begin; --token) sum += p.K(token, rows[0].head)[i];
    mean.push_back(Bf16(sum / static_cast<long double>(end - begin)));
  }
  for (const Row& row : rows) {
    long double x = 0;
    for (int32_t i = p.head_dim - 1; i >= 0; --i)
      x += static_cast<long double>(p.Q(row.token, row.head)[i]) * mean[i];
    total.Add(x * p.softmax_scale);
  }
  return total;
}

// The stages of a tile from the rows that see each block.
struct Expected {
  std::vector<long double> ln;      // of each block's sum over its rows; -inf: no rows
  std::vector<long double> maxima;  // natural units
  long double best = -INFINITY;     // largest of ln
  bool Passes(size_t block, double alpha) const { return ln[block] - best >= std::log(alpha); }
};

inline Expected ExpectTile(const PolicyProblem& p, int64_t num_blocks,
                           const std::function<std::vector<Row>(int64_t)>& rows_that_see) {
  Expected expected;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const std::vector<Row> rows = rows_that_see(block);
    const LogSum sum = RowsOnBlock(p, rows, block);
    expected.ln.push_back(rows.empty() ? -INFINITY : sum.Ln());
    expected.maxima.push_back(sum.most);
    expected.best = std::max(expected.best, expected.ln.back());
  }
  return expected;
}

inline std::vector<int32_t> BlocksOf(const BlockIndex& index, int32_t list, int64_t tile) {
  const auto row = static_cast<size_t>(index.Row(list, tile));
  return {index.blocks.begin() + index.offsets[row], index.blocks.begin() + index.offsets[row + 1]};
}

}  // namespace headwater::kernels::reference

#endif  // HW_TESTS_KERNELS_POLICIES_FLASH_CASES_H_
