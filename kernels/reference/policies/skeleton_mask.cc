#include "kernels/reference/policies/skeleton_mask.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kPair = 64;   // tokens of the published blocks
constexpr int64_t kTile = 128;  // of ours
constexpr double kNear = 0.02;
constexpr double kNothing = -std::numeric_limits<double>::infinity();

// Largest value of each block of 64.
std::vector<double> BlockMaxima(const std::vector<double>& values) {
  std::vector<double> maxima((values.size() + kPair - 1) / kPair, kNothing);
  for (size_t i = 0; i < values.size(); ++i) maxima[i / kPair] = std::max(maxima[i / kPair], values[i]);
  return maxima;
}

// A pair (row, column) of blocks of 64 that holds sinks or a distance below T.
bool Forced(const SkeletonParameters& a, int64_t row, int64_t column) {
  const int64_t nearest = row * kPair - (column * kPair + kPair - 1);
  return column * kPair < a.sink_tokens || nearest < a.local_tokens;
}

double Sum(const SkeletonHead& head, int64_t row, int64_t column) {
  return head.s_block[static_cast<size_t>(row - column)] + head.v_block[static_cast<size_t>(column)] +
         head.h_block[static_cast<size_t>(row)];
}

double BudgetThreshold(int64_t num_tokens, const SkeletonParameters& a, const SkeletonHead& head) {
  const int64_t rows = (num_tokens + kPair - 1) / kPair;
  double forced = 0, free = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column <= row; ++column) (Forced(a, row, column) ? forced : free) += 1;
  }
  if (free == 0) return 0;  // decides nothing
  const double kept = std::clamp((a.budget_blocks * static_cast<double>(rows) - forced) / free, 0.0, 1.0);
  return ThresholdOfShare(SpreadOfSkeleton(num_tokens, a, head), 1 - kept);
}

// Whether a pair of 128 is kept, and whether it is by more than kNear either way.
struct Verdict {
  bool keep = false, surely = false, perhaps = false;
};

Verdict Judge(const SkeletonParameters& a, const SkeletonHead& head, int64_t tile, int64_t block) {
  constexpr int64_t kParts = kTile / kPair;
  Verdict verdict;
  const auto rows = static_cast<int64_t>(head.h_block.size());
  for (int64_t row = tile * kParts; row < std::min(rows, (tile + 1) * kParts); ++row) {
    for (int64_t column = block * kParts; column <= std::min(row, block * kParts + kParts - 1); ++column) {
      const bool forced = Forced(a, row, column);
      const double sum = forced ? 0 : Sum(head, row, column);
      verdict.keep |= forced || sum >= head.tau;
      verdict.surely |= forced || sum >= head.tau + kNear;
      verdict.perhaps |= forced || sum >= head.tau - kNear;
    }
  }
  return verdict;
}

}  // namespace

SkeletonSpread SpreadOfSkeleton(int64_t num_tokens, const SkeletonParameters& a, const SkeletonHead& head) {
  double count = 0, sum = 0, squares = 0;
  const auto each = [&](auto&& visit) {
    for (int64_t i = a.sink_tokens + a.local_tokens; i < num_tokens; ++i) {
      for (int64_t j = a.sink_tokens; j <= i - a.local_tokens; ++j) {
        visit(head.s[static_cast<size_t>(i - j)] + head.v[static_cast<size_t>(j)] +
              head.h[static_cast<size_t>(i)]);
      }
    }
  };
  each([&](double value) { sum += value, count += 1; });
  const double mean = sum / count;
  each([&](double value) { squares += (value - mean) * (value - mean); });
  return {mean, std::sqrt(squares / count)};
}

double ThresholdOfShare(const SkeletonSpread& spread, double dropped) {
  if (dropped <= 0) return kNothing;
  if (dropped >= 1) return -kNothing;
  // Of the upper tail, which is small: 1 - dropped^(1/64).
  const double tail = -std::expm1(std::log(dropped) / static_cast<double>(kPair));
  double low = -40, high = 40;
  for (int step = 0; step < 200; ++step) {
    const double middle = (low + high) / 2;
    (std::erfc(middle / std::sqrt(2.0)) / 2 > tail ? low : high) = middle;
  }
  return spread.mean + spread.deviation * low;
}

void SelectSkeletonBlocks(int64_t num_tokens, const SkeletonParameters& a, SkeletonHead* head) {
  head->v_block = BlockMaxima(head->v);
  head->h_block = BlockMaxima(head->h);
  head->s_block = BlockMaxima(head->s);
  // From the end, so that the neighbour below is still a maximum.
  for (size_t i = head->s_block.size(); i-- > 1;) {
    head->s_block[i] = (head->s_block[i - 1] + head->s_block[i]) / 2;
  }
  head->tau = a.budget_blocks > 0
                  ? BudgetThreshold(num_tokens, a, *head)
                  : std::log(a.epsilon * static_cast<double>(kPair) / static_cast<double>(num_tokens));
  const int64_t tiles = (num_tokens + kTile - 1) / kTile;
  head->kept.assign(static_cast<size_t>(tiles), {});
  head->undecided.assign(static_cast<size_t>(tiles), {});
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t block = 0; block <= tile; ++block) {
      const Verdict verdict = Judge(a, *head, tile, block);
      const auto number = static_cast<int32_t>(block);
      if (verdict.keep) head->kept[static_cast<size_t>(tile)].push_back(number);
      if (verdict.perhaps && !verdict.surely) head->undecided[static_cast<size_t>(tile)].push_back(number);
    }
  }
}

BlockIndex SkeletonIndex(const PolicyProblem& p, const SkeletonTrace& trace) {
  BlockIndex index;
  index.num_lists = p.num_q_heads;
  index.num_q_tiles = (p.num_tokens + kTile - 1) / kTile;
  index.dense.assign(static_cast<size_t>(index.num_lists * index.num_q_tiles), trace.dense ? 1 : 0);
  index.offsets.assign(index.dense.size() + 1, 0);
  size_t segment = 0;
  for (const SkeletonHead& head : trace.heads) {
    for (const std::vector<int32_t>& kept : head.kept) {
      index.blocks.insert(index.blocks.end(), kept.begin(), kept.end());
      index.offsets[++segment] = static_cast<int64_t>(index.blocks.size());
    }
  }
  return index;
}

}  // namespace headwater::kernels::reference
