// FlexPrefill (Lai et al., arXiv:2502.20766): the attention of the last block of queries says which columns
// and diagonals of blocks all queries attend to; a head whose attention pooled queries and keys predict well
// takes the best blocks of the pooled map as well. Where the paper and the official code differ, this is the
// code.
//
// Per query head, with B tokens a block, nb = ceil(N / B), A the softmax of the last min(B, N) queries over
// their keys:
//
//   vertical[j] = mean over those queries of A[., j]
//   slash[c]    = the same of the diagonal at distance N - 1 - c from query to key
//   n_v, n_s    = cover(., gamma) / 128 + 1, clamped to the budgets in blocks
//   V, D        = sums of vertical and slash over B entries from entry 0 on; the last sum has the rest
//   pbar        = softmax_J(mean of those queries . mean of block J of K), no mask
//   query aware = JSdist(pbar, V) < tau; then n_v = n_s = the smallest budget
//   columns     = column 0 and the best n_v - 1 others of V; offsets = 0 and the best n_s - 1 others, by
//                 D[nb - 1 - offset]
//   blocks      = (i, J) for columns J <= i, and (i, i - o) for offsets o <= i; query aware: also the best
//                 (I, J) of the pooled map, over all rows at once, while their sum is at most gamma * nb
//
// Equal scores: the lower column, the smaller offset, the lower row and then column of the pooled map, the
// lower index in cover() (upstream leaves it to an unstable sort). An offset stands for B successive
// distances, which reach into the next block diagonal as well; that one is not added.
#ifndef HW_KERNELS_REFERENCE_POLICIES_FLEX_H_
#define HW_KERNELS_REFERENCE_POLICIES_FLEX_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/status.h"

namespace headwater::kernels::reference {

// What upstream does and one may want otherwise; on: as upstream.
struct FlexCompat {
  // JSdist is NaN, hence the head not query aware, where an entry of pbar or V is zero in f32; off: 0 ln 0 =
  // 0.
  bool nan_rule = true;
  // cover() is divided by 128 whatever a block has; off: by block_tokens.
  bool count_by_128 = true;
  // Scores are scaled by 1 / sqrt(head_dim); off: by the problem's softmax_scale.
  bool scale_of_head_dim = true;
};

struct FlexParameters {
  double gamma = 0.9;                // over 0 and below 1
  double tau = 0.1;                  // 0 to 1; 0: no head is query aware
  int64_t min_budget_tokens = 1024;  // 1 to 2^31 - 1, in blocks by rounding up
  int64_t max_budget_tokens = 0;  // likewise; 0: none. Wins over the smallest, but not in query-aware heads
  int32_t block_tokens = 128;     // 16, 32, 64 or 128
  FlexCompat compat;

  int64_t MinBlocks() const { return (min_budget_tokens + block_tokens - 1) / block_tokens; }
};

// (query block, key block)
using FlexBlock = std::pair<int32_t, int32_t>;

// The stages of one query head.
struct FlexHead {
  std::vector<double> vertical, slash;  // [N]
  int64_t vertical_cover = 0, slash_cover = 0;
  int64_t n_v = 0, n_s = 0;           // as used, before the limit of nb
  std::vector<double> column_scores;  // V: [nb]
  std::vector<double> slash_scores;   // D: [nb]
  std::vector<double> pooled;         // pbar: [nb]
  double js_distance = 0;             // NaN by FlexCompat::nan_rule
  bool query_aware = false;
  std::vector<int32_t> columns, offsets;  // best first
  std::vector<FlexBlock> pooled_blocks;   // query aware: best first
};

struct FlexTrace {
  bool dense = false;  // the prompt is short: heads is empty
  std::vector<FlexHead> heads;
};

// Fills `index` (one list per query head, tiles and blocks of block_tokens) and, where it is not null,
// `trace`. Every segment is dense where num_tokens <= max(2 * block_tokens, min_budget_tokens rounded up to
// blocks). INVALID_ARGUMENT, with both untouched: a parameter outside its range, or what
// CheckPolicyProblem() refuses. v is not looked at. Cost: block_tokens * N * head_dim products a head, plus
// nb^2 * head_dim in query-aware ones, and two sorts of N.
Status FlexSelect(const PolicyProblem& problem, const FlexParameters& parameters, FlexTrace* trace,
                  BlockIndex* index);

// The parts, which SharePrefill (share.h) is built on. All take what CheckFlex() let pass.
namespace flex {

// A set of causal blocks of one head; Add() leaves out what is not causal.
class BlockSet {
 public:
  explicit BlockSet(int64_t num_blocks = 0)
      : num_blocks_(num_blocks), has_(static_cast<size_t>(num_blocks * num_blocks)) {}
  bool Has(int64_t row, int64_t column) const {
    return has_[static_cast<size_t>(row * num_blocks_ + column)];
  }
  void Add(int64_t row, int64_t column) {
    if (row < num_blocks_ && column <= row) has_[static_cast<size_t>(row * num_blocks_ + column)] = true;
  }
  void Add(const BlockSet& other);
  // What columns and offsets stand for.
  void Add(const std::vector<int32_t>& columns, const std::vector<int32_t>& offsets);
  int64_t num_blocks() const { return num_blocks_; }

 private:
  int64_t num_blocks_;
  std::vector<bool> has_;  // [num_blocks, num_blocks]
};

Status CheckFlex(const PolicyProblem& problem, const FlexParameters& parameters);

// How many entries, largest first, have a running sum of at most `share`, plus one.
int64_t Cover(std::vector<double> x, double share);

// sqrt(sum p ln(p / m) / 2 + sum q ln(q / m) / 2), m = (p + q) / 2; [0, sqrt(ln 2)]. nan_rule: NaN where an
// entry of either is zero in f32.
double JsDistance(const std::vector<double>& p, const std::vector<double>& q, bool nan_rule);

// All of FlexHead up to query_aware, with n_v and n_s of a head that is not.
FlexHead ScoreHead(const PolicyProblem& problem, const FlexParameters& parameters, int32_t head);

// columns and offsets from n_v, n_s, V and D.
void ChooseColumnsAndOffsets(FlexHead* head);

// pooled_blocks.
std::vector<FlexBlock> ChoosePooled(const PolicyProblem& problem, const FlexParameters& parameters,
                                    int32_t head);

// One list per head; dense[h]: all of its segments are.
BlockIndex MakeIndex(const std::vector<BlockSet>& heads, const std::vector<bool>& dense,
                     int32_t block_tokens);

}  // namespace flex
}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_FLEX_H_
