// Policies as the C interfaces are told of them.
#ifndef HW_KERNELS_PATTERN_CONFIG_H_
#define HW_KERNELS_PATTERN_CONFIG_H_

#include "kernels/headwater_kernels.h"
#include "kernels/pattern/parameters.h"
#include "kernels/status.h"

namespace headwater::kernels {

// INVALID_ARGUMENT: null pointers, what ParsePolicyParameters() refuses, tables that the policy does not take
// or whose entries are out of range.
Status ReadPolicyConfig(const hw_policy_config& config, PolicyParameters* parameters);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_PATTERN_CONFIG_H_
