// What FlexPrefill's rule leaves open where rounding decides, for tests.
#ifndef HW_TESTS_KERNELS_CUDA_FLEX_BOUNDS_H_
#define HW_TESTS_KERNELS_CUDA_FLEX_BOUNDS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/reference/policies/flex.h"

namespace headwater::kernels {

using reference::flex::BlockSet;

// Scores this close, relatively, may be ordered either way, and running sums this close to gamma may be over
// or under it. Numbers that decide over a head must not be this close to their limits: kNearGate.
inline constexpr double kNearScore = 1e-4, kNearGamma = 1e-5, kNearGate = 1e-3;

// The score of the n-th best entry but the forced one, entry 0; infinite where there is none.
inline double NthBest(std::vector<double> scores, int64_t n) {
  scores[0] = INFINITY;
  std::sort(scores.begin(), scores.end(), std::greater<>());
  return scores[std::min<int64_t>(n, static_cast<int64_t>(scores.size())) - 1];
}

// Entries that any order of near scores and any of the two budgets gives, and that all do.
inline void Bounds(const std::vector<double>& scores, int64_t least, int64_t most, std::vector<int32_t>* must,
                   std::vector<int32_t>* may) {
  const double surely = NthBest(scores, least) * (1 + kNearScore);
  const double possibly = NthBest(scores, most) * (1 - kNearScore);
  const bool all = least >= static_cast<int64_t>(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    if (i == 0 || all || scores[i] > surely) must->push_back(static_cast<int32_t>(i));
    if (i == 0 || scores[i] >= possibly) may->push_back(static_cast<int32_t>(i));
  }
}

// A head with gamma a little lower and a little higher.
struct FlexScored {
  FlexScored(const reference::PolicyProblem& problem, const reference::FlexParameters& parameters, int head)
      : low(parameters), high(parameters) {
    low.gamma -= kNearGamma;
    high.gamma += kNearGamma;
    least = reference::flex::ScoreHead(problem, low, head);
    most = reference::flex::ScoreHead(problem, high, head);
  }
  reference::FlexParameters low, high;
  reference::FlexHead least, most;
};

// Blocks of a head that must be in its mask, and that may be.
struct FlexRange {
  BlockSet must, may;
};

// Columns and offsets by the head's own budgets or by the least ones.
inline FlexRange ColumnsAndOffsets(const FlexScored& scored, bool least_budgets) {
  const auto blocks = static_cast<int64_t>(scored.least.column_scores.size()),
             fewest = scored.low.MinBlocks();
  int64_t n_v[2] = {scored.least.n_v, scored.most.n_v}, n_s[2] = {scored.least.n_s, scored.most.n_s};
  if (least_budgets) n_v[0] = n_v[1] = n_s[0] = n_s[1] = fewest;
  std::vector<int32_t> columns[2], offsets[2];
  const std::vector<double>& slash = scored.least.slash_scores;
  Bounds(scored.least.column_scores, n_v[0], n_v[1], &columns[0], &columns[1]);
  Bounds({slash.rbegin(), slash.rend()}, n_s[0], n_s[1], &offsets[0], &offsets[1]);
  FlexRange range{BlockSet(blocks), BlockSet(blocks)};
  range.must.Add(columns[0], offsets[0]);
  range.may.Add(columns[1], offsets[1]);
  return range;
}

// Adds the pooled map's.
inline void AddPooled(const reference::PolicyProblem& problem, const FlexScored& scored, int head,
                      FlexRange* range) {
  for (const auto& [i, j] : reference::flex::ChoosePooled(problem, scored.low, head)) range->must.Add(i, j);
  for (const auto& [i, j] : reference::flex::ChoosePooled(problem, scored.high, head)) range->may.Add(i, j);
}

// `words`: of the head's mask. *undecided: how many blocks rounding decides.
inline void ExpectMask(const uint32_t* words, const FlexRange& range, int64_t* undecided) {
  const int64_t blocks = range.must.num_blocks(), row_words = (blocks + 31) / 32;
  *undecided = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    for (int64_t j = 0; j < 32 * row_words; ++j) {
      const bool has = (words[i * row_words + j / 32] >> (j % 32) & 1) != 0;
      const bool may = j <= i && range.may.Has(i, j), must = j <= i && range.must.Has(i, j);
      ASSERT_TRUE(has ? may : !must) << "tile " << i << ", block " << j;
      *undecided += may && !must ? 1 : 0;
    }
  }
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_FLEX_BOUNDS_H_
