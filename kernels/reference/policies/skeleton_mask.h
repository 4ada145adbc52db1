// The second half of SparseSkeleton: from s, v and h to blocks (the paper's section 3.3, equations 12 to 14).
#ifndef HW_KERNELS_REFERENCE_POLICIES_SKELETON_MASK_H_
#define HW_KERNELS_REFERENCE_POLICIES_SKELETON_MASK_H_

#include <cstdint>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/skeleton.h"

namespace headwater::kernels::reference {

// Fills tau, s_block, v_block, h_block, kept and undecided from s, v and h. num_tokens > S + T.
void SelectSkeletonBlocks(int64_t num_tokens, const SkeletonParameters& parameters, SkeletonHead* head);

// Mean and standard deviation of s + v + h over the interior (equations 12 and 13).
struct SkeletonSpread {
  double mean, deviation;
};
SkeletonSpread SpreadOfSkeleton(int64_t num_tokens, const SkeletonParameters& parameters,
                                const SkeletonHead& head);

// The threshold under which a pair of blocks of 64 lies with probability `dropped` (equation 14 solved for
// it): mean + deviation * PhiInverse(dropped^(1/64)); infinite at 0 and 1.
double ThresholdOfShare(const SkeletonSpread& spread, double dropped);

BlockIndex SkeletonIndex(const PolicyProblem& problem, const SkeletonTrace& trace);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_SKELETON_MASK_H_
