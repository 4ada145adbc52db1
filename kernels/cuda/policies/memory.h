// The memory of a policy, dealt out in parts.
#ifndef HW_KERNELS_CUDA_POLICIES_MEMORY_H_
#define HW_KERNELS_CUDA_POLICIES_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/status.h"

namespace headwater::kernels {

// With no memory it adds up what the parts need; with memory it deals them out. Parts are 256-byte aligned.
class PolicyMemory {
 public:
  explicit PolicyMemory(void* memory = nullptr) : base_(static_cast<char*>(memory)) {}
  template <typename T>
  T* Take(int64_t count) {
    char* const part = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(part);
  }
  size_t bytes() const { return bytes_; }

 private:
  char* const base_;
  size_t bytes_ = 0;
};

// What every CudaPolicy::Begin() refuses.
inline Status CheckPolicyMemory(int64_t num_tokens, const void* memory, size_t memory_bytes, size_t wanted) {
  if (num_tokens < 1 || num_tokens > INT32_MAX) {
    return InvalidArgument("num_tokens is " + std::to_string(num_tokens) + "; 1 to 2147483647 is wanted");
  }
  if (wanted > 0 &&
      (memory == nullptr || memory_bytes < wanted || reinterpret_cast<uintptr_t>(memory) % 256 != 0)) {
    return InvalidArgument("a policy's memory has " + std::to_string(memory_bytes) + " bytes; " +
                           std::to_string(wanted) + ", 256-byte aligned, are wanted");
  }
  return {};
}

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_MEMORY_H_
