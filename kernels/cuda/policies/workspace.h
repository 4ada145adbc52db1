// Arrays cut from one piece of device memory.
#ifndef HW_KERNELS_CUDA_POLICIES_WORKSPACE_H_
#define HW_KERNELS_CUDA_POLICIES_WORKSPACE_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/status.h"

namespace headwater::kernels {

// Hands out 256-byte aligned arrays in the order of the calls; without memory it counts what they would take.
class WorkspaceLayout {
 public:
  static constexpr size_t kAlignment = 256;

  explicit WorkspaceLayout(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* Take(int64_t count) {
    return static_cast<T*>(TakeBytes(static_cast<size_t>(count) * sizeof(T)));
  }
  void* TakeBytes(size_t bytes) {
    void* const taken = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

inline Status CheckWorkspace(const void* workspace, size_t bytes, size_t wanted) {
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % WorkspaceLayout::kAlignment != 0) {
    return InvalidArgument("workspace is null or not 256-byte aligned");
  }
  if (bytes >= wanted) return {};
  return InvalidArgument("workspace has " + std::to_string(bytes) + " bytes; " + std::to_string(wanted) +
                         " are wanted");
}

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_WORKSPACE_H_
