// A policy that computes short prompts densely.
#ifndef HW_KERNELS_CUDA_POLICIES_DENSE_BELOW_H_
#define HW_KERNELS_CUDA_POLICIES_DENSE_BELOW_H_

#include <cstdint>
#include <memory>

#include "kernels/cuda/policy.h"

namespace headwater::kernels {

// `policy` from num_tokens on; shorter prompts are dense in every layer, take no memory and tell `policy`
// nothing.
std::unique_ptr<CudaPolicy> DenseBelow(int64_t num_tokens, std::unique_ptr<CudaPolicy> policy);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_DENSE_BELOW_H_
