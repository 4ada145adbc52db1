#include "kernels/reference/block_mass.h"

#include <algorithm>
#include <cmath>

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kBlock = 128;

// Scaled scores of the keys that the query sees.
std::vector<double> Scores(const PolicyProblem& problem, int64_t position, int32_t head) {
  std::vector<double> scores(position + 1);
  for (int64_t key = 0; key <= position; ++key) {
    for (int32_t i = 0; i < problem.head_dim; ++i) {
      scores[key] += static_cast<double>(problem.Q(position, head)[i]) * problem.K(key, head)[i];
    }
    scores[key] *= problem.softmax_scale;
  }
  return scores;
}

}  // namespace

std::vector<double> LogSumExp(const PolicyProblem& problem, int32_t head) {
  std::vector<double> lse;
  for (int64_t position = 0; position < problem.num_tokens; ++position) {
    const std::vector<double> scores = Scores(problem, position, head);
    const double top = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - top);
    lse.push_back(top + std::log(sum));
  }
  return lse;
}

std::vector<double> RowMass(const PolicyProblem& problem, int64_t position, int32_t head, double lse) {
  std::vector<double> mass((problem.num_tokens + kBlock - 1) / kBlock);
  const std::vector<double> scores = Scores(problem, position, head);
  for (int64_t key = 0; key <= position; ++key) mass[key / kBlock] += std::exp(scores[key] - lse);
  return mass;
}

std::vector<double> BlockMass(const PolicyProblem& problem, int32_t head) {
  const int64_t blocks = (problem.num_tokens + kBlock - 1) / kBlock;
  const std::vector<double> lse = LogSumExp(problem, head);
  std::vector<double> average(blocks * blocks);
  for (int64_t position = 0; position < problem.num_tokens; ++position) {
    const int64_t block = position / kBlock, queries = std::min(kBlock, problem.num_tokens - block * kBlock);
    const std::vector<double> mass = RowMass(problem, position, head, lse[position]);
    for (int64_t key = 0; key <= block; ++key) {
      average[block * blocks + key] += mass[key] / static_cast<double>(queries);
    }
  }
  return average;
}

}  // namespace headwater::kernels::reference
