// SharePrefill (arXiv:2505.19578): heads of one cluster attend to much the same blocks, so the first head of
// a cluster to come in a prompt, its pivot, is computed in full, and heads of later layers that look like it
// take the blocks in which its attention was found. The rest is FlexPrefill (flex.h). Where the paper and the
// official code differ, this is the code.
//
// Per layer, heads ascending, with the stages of FlexPrefill at gamma and tau = query_aware:
//
//   query aware      : FlexPrefill's blocks with the smallest budget
//   first of cluster : the pivot, dense; keeps V, D and what its columns and offsets would have been
//   cluster's pivot lies in an earlier layer, JSdist(V, V of the pivot) < similarity, JSdist(D, D of the
//   pivot) < similarity and r < fallback
//                    : shared: the pivot's pattern, and columns and offsets with the smallest budget
//   all others       : their own columns and offsets
//
//   Abar[I, J] = mean over the queries of block I of their attention on block J (of the pivot, softmax_scale)
//   pattern    = per row I the largest Abar[I, .] until they sum to at least gamma
//   r          = the share of Abar that the pivot's columns and offsets hold
//
// Equal scores: as in flex.h; of equal Abar the lower column first. There is no dense path for short prompts.
#ifndef HW_KERNELS_REFERENCE_POLICIES_SHARE_H_
#define HW_KERNELS_REFERENCE_POLICIES_SHARE_H_

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/flex.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/status.h"

namespace headwater::kernels::reference {

struct ShareParameters {
  double gamma = 0.9;                // over 0 and below 1; 0.95 in upstream's README
  double similarity = 0.5;           // 0 to 1; 0: nothing is shared
  double fallback = 0.9;             // 0 to 1; 0.95 in upstream's latency script
  double query_aware = 0.1;          // 0 to 1
  int64_t min_budget_tokens = 1024;  // as in FlexParameters, all three
  int64_t max_budget_tokens = 0;
  int32_t block_tokens = 128;
  // 0: pivots by cluster. n: the cluster map is not looked at; in each layer the first n heads that are not
  // query aware are dense, and the others share with the one of them whose V and D are nearest (least sum of
  // both distances, the lower head of equals), under the same conditions. NaN is far from everything.
  int32_t pivots_per_layer = 0;
  FlexCompat compat;  // count_by_128 is not looked at: upstream divides by block_tokens here
  // Upstream counts a block of r once for each column or offset that holds it, and (0, 0) for each of theirs
  // that is not causal; r often passes 1, and then nothing is shared. Off: each block once.
  bool compat_ratio = false;

  FlexParameters Flex() const;
};

// Which heads may share. Heads that are not in cluster_of never do (upstream's map must hold all).
struct ShareClusters {
  std::map<std::pair<int32_t, int32_t>, int32_t> cluster_of;  // (layer, head) to cluster
  std::set<int32_t> shareable;                                // clusters
};

struct SharePivot {
  int32_t layer = 0, head = 0;
  std::vector<double> column_scores, slash_scores;  // V, D: [nb]
  std::vector<int32_t> columns, offsets;            // of its own pattern, not used for itself
  std::vector<double> average;                      // Abar: [nb, nb]
  flex::BlockSet pattern;
  double ratio = 0;  // r
};

// Of one prompt; starts empty, layers go up.
struct ShareState {
  int64_t num_tokens = 0;
  int32_t next_layer = 0;
  std::map<int32_t, SharePivot> pivots;  // by cluster; by head with pivots_per_layer, those of the last layer
};

enum class ShareRole { kQueryAware, kPivot, kShared, kOwn };

struct ShareHead {
  FlexHead flex;
  ShareRole role = ShareRole::kOwn;
  std::string why;       // in words, with the numbers that decided
  int32_t cluster = -1;  // -1: none, or not looked at
  // Of the pivot that the head was compared with; pivot_head -1: with none.
  int32_t pivot_layer = -1, pivot_head = -1;
  double vertical_distance = 0, slash_distance = 0, ratio = 0;
};

struct ShareLayer {
  std::vector<ShareHead> heads;  // the stages
  BlockIndex index;              // one list per query head; a pivot's segments are dense
};

// One layer: fills `selected` and goes on with `state`. INVALID_ARGUMENT, both untouched: what FlexSelect()
// refuses, a parameter outside its range, a layer below state's next, another number of tokens than in the
// layers before. Cost: FlexSelect()'s, and N^2 * head_dim / 2 products for each pivot.
Status ShareSelect(const PolicyProblem& problem, const ShareParameters& parameters,
                   const ShareClusters& clusters, int32_t layer, ShareState* state, ShareLayer* selected);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_SHARE_H_
