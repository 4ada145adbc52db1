// Checks that the GPU operations share.
#ifndef HW_KERNELS_CUDA_CHECK_H_
#define HW_KERNELS_CUDA_CHECK_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/status.h"

namespace headwater::kernels {

inline constexpr double kLog2E = 1.4426950408889634;

inline bool Misaligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; }

// An array that must be there, and one that may be null; the message calls it `name`.
inline Status CheckOptionalArray(const char* name, const void* pointer) {
  if (!Misaligned(pointer)) return {};
  return InvalidArgument(std::string(name) + " is not 16-byte aligned");
}
inline Status CheckArray(const char* name, const void* pointer) {
  if (pointer == nullptr) return InvalidArgument(std::string(name) + " is null");
  return CheckOptionalArray(name, pointer);
}

inline Status CheckAligned(const char* name, const void* pointer, size_t bytes) {
  if (pointer == nullptr) return InvalidArgument(std::string(name) + " is null");
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return {};
  return InvalidArgument(std::string(name) + " is not " + std::to_string(bytes) + "-byte aligned");
}

inline Status CheckRange(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return {};
  return InvalidArgument(std::string(name) + " is " + std::to_string(value) + "; " + std::to_string(least) +
                         " to " + std::to_string(most) + " is wanted");
}

// Sizes of q [total_q, num_q_heads, head_dim] and k [total_k, num_kv_heads, head_dim].
inline Status CheckSizes(int64_t total_q, int64_t total_k, int32_t num_q_heads, int32_t num_kv_heads,
                         int32_t head_dim) {
  if (total_q <= 0 || total_k <= 0 || total_q > INT32_MAX || total_k > INT32_MAX) {
    return InvalidArgument("total_q is " + std::to_string(total_q) + " and total_k " +
                           std::to_string(total_k) + "; 1 to 2147483647 is wanted");
  }
  if (num_q_heads <= 0 || num_kv_heads <= 0 || num_q_heads % num_kv_heads != 0) {
    return InvalidArgument(std::to_string(num_q_heads) + " query heads are not a multiple of " +
                           std::to_string(num_kv_heads) + " KV heads");
  }
  if (num_q_heads / num_kv_heads > 8 || (head_dim != 64 && head_dim != 128)) {
    return {StatusCode::kUnimplemented, "head_dim " + std::to_string(head_dim) + " with " +
                                            std::to_string(num_q_heads / num_kv_heads) +
                                            " query heads per KV head; 64 or 128 with 1 to 8 is known"};
  }
  return {};
}

// A CudaQueryRange of a prompt.
inline Status CheckQueries(int64_t first, int64_t count, int64_t num_tokens) {
  if (first >= 0 && count >= 0 && first <= num_tokens - count && (count > 0 || first == 0)) return {};
  return InvalidArgument("queries are " + std::to_string(count) + " from " + std::to_string(first) +
                         " on; some of " + std::to_string(num_tokens) + " are wanted");
}

// Positions of queries among the keys, so that position + row stays in 32 bits, rows past the end of a tile
// included.
inline Status CheckPosition(int32_t query_position, int64_t total_q) {
  constexpr int64_t kTileRows = 256;
  const int64_t most = INT32_MAX - kTileRows - total_q;
  if (query_position >= -INT32_MAX && query_position <= most) return {};
  return InvalidArgument("query_position is " + std::to_string(query_position) + "; -2147483647 to " +
                         std::to_string(most) + " is wanted");
}

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_CHECK_H_
