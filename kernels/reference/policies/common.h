// What the references of this folder share: checks of what they are given, and lists made into a BlockIndex.
#ifndef HW_KERNELS_REFERENCE_POLICIES_COMMON_H_
#define HW_KERNELS_REFERENCE_POLICIES_COMMON_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/status.h"

namespace headwater::kernels::reference {

// INVALID_ARGUMENT: q or k null, no tokens or over 2^37 of them, query heads not a positive multiple of KV
// heads, head_dim outside 1 to 2^16, softmax_scale not a positive number, q or k not finite. Reads both once.
Status CheckPolicyProblem(const PolicyProblem& problem);

// INVALID_ARGUMENT, with the name, the value and the range, unless least <= value <= most.
Status CheckRange(const std::string& name, int64_t value, int64_t least, int64_t most);
// The same of real numbers; refuses NaN.
Status CheckReal(const std::string& name, double value, double least, double most);

// INVALID_ARGUMENT unless there is one value for all heads or one for each.
Status CheckPerHead(const std::string& name, int64_t values, int32_t num_q_heads);

// The index with one list per query head over the tiles of a whole prompt; lists[head][tile] holds the key
// blocks in ascending order.
BlockIndex IndexOfLists(const std::vector<std::vector<std::vector<int32_t>>>& lists);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_COMMON_H_
