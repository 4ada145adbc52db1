// How much of the attention lies on which blocks of 128 keys, in obvious loops and double precision.
#ifndef HW_KERNELS_REFERENCE_BLOCK_MASS_H_
#define HW_KERNELS_REFERENCE_BLOCK_MASS_H_

#include <cstdint>
#include <vector>

#include "kernels/reference/policies/problem.h"

namespace headwater::kernels::reference {

// [num_tokens]: ln of the sum of exp(softmax_scale * q . k) over the keys that each query of a head sees.
std::vector<double> LogSumExp(const PolicyProblem& problem, int32_t head);

// [blocks]: sum over each block's keys of exp(softmax_scale * q . k - lse) for the query at `position`, zeros
// past its own block. With lse from LogSumExp() they sum to 1.
std::vector<double> RowMass(const PolicyProblem& problem, int64_t position, int32_t head, double lse);

// [blocks, blocks], row by row: the mean of RowMass() over the queries of each block.
std::vector<double> BlockMass(const PolicyProblem& problem, int32_t head);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_BLOCK_MASS_H_
