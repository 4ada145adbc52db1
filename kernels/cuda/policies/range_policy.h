// What the policies whose patterns are ranges share.
#ifndef HW_KERNELS_CUDA_POLICIES_RANGE_POLICY_H_
#define HW_KERNELS_CUDA_POLICIES_RANGE_POLICY_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/policy.h"
#include "kernels/cuda/range_attention.h"

namespace headwater::kernels {

inline constexpr int64_t kMostPatternTokens = int64_t{1} << 22;  // of a parameter

// Arrays in a row, 256-byte aligned. From a null base the sizes are right and the pointers mean nothing.
class MemoryCarver {
 public:
  explicit MemoryCarver(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* Take(int64_t count) {
    auto* const array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return array;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

inline Status CheckPolicyShape(const CudaPolicyShape& shape) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_layers", shape.num_layers, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", shape.num_q_heads, 1, 65535));
  HW_KERNELS_RETURN_IF_ERROR(CheckSizes(1, 1, shape.num_q_heads, shape.num_kv_heads, shape.head_dim));
  if (shape.softmax_scale > 0 && std::isfinite(shape.softmax_scale)) return {};
  return InvalidArgument("softmax_scale is " + std::to_string(shape.softmax_scale) +
                         "; a positive number is wanted");
}

inline Status CheckPolicyMemory(int64_t num_tokens, const void* memory, size_t memory_bytes, size_t wanted) {
  if (memory != nullptr && memory_bytes >= wanted && reinterpret_cast<uintptr_t>(memory) % 256 == 0)
    return {};
  return InvalidArgument("the memory for " + std::to_string(num_tokens) + " tokens has " +
                         std::to_string(memory_bytes) + " bytes; " + std::to_string(wanted) +
                         ", 256-byte aligned, are wanted");
}

// Pairs of 64 query rows and 64 keys that dense attention reads.
inline uint64_t PossibleSteps(int64_t num_tokens, int32_t num_q_heads) {
  const auto tiles = static_cast<uint64_t>(CudaRangeTiles(num_tokens));
  return tiles * (tiles + 1) / 2 * static_cast<uint64_t>(num_q_heads);
}

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_RANGE_POLICY_H_
