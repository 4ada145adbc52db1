// What the policies whose patterns are ranges share.
#ifndef HW_KERNELS_CUDA_POLICIES_RANGE_POLICY_H_
#define HW_KERNELS_CUDA_POLICIES_RANGE_POLICY_H_

#include <cstdint>

#include "kernels/cuda/policies/memory.h"
#include "kernels/cuda/range_attention.h"

namespace headwater::kernels {

inline constexpr int64_t kMostPatternTokens = int64_t{1} << 22;  // of a parameter

// Pairs of 64 query rows and 64 keys that dense attention reads.
inline uint64_t PossibleSteps(int64_t num_tokens, int32_t num_q_heads) {
  const auto tiles = static_cast<uint64_t>(CudaRangeTiles(num_tokens));
  return tiles * (tiles + 1) / 2 * static_cast<uint64_t>(num_q_heads);
}

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_RANGE_POLICY_H_
