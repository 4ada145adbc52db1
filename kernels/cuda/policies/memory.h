// The memory of a policy or of a stage, dealt out in parts, and what every policy checks.
#ifndef HW_KERNELS_CUDA_POLICIES_MEMORY_H_
#define HW_KERNELS_CUDA_POLICIES_MEMORY_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/policy.h"
#include "kernels/number_text.h"
#include "kernels/status.h"

namespace headwater::kernels {

// Parts are 256-byte aligned, in the order of the calls; without memory they are null, and only bytes()
// counts.
class PolicyMemory {
 public:
  explicit PolicyMemory(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* Take(int64_t count) {
    return static_cast<T*>(TakeBytes(static_cast<size_t>(count) * sizeof(T)));
  }
  void* TakeBytes(size_t bytes) {
    void* const part = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return part;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

// `wanted` 0: null will do.
inline Status CheckMemory(const char* name, const void* memory, size_t bytes, size_t wanted) {
  if (wanted == 0 ||
      (memory != nullptr && bytes >= wanted && reinterpret_cast<uintptr_t>(memory) % 256 == 0)) {
    return {};
  }
  return InvalidArgument(std::string(name) + " has " + std::to_string(bytes) + " bytes; " +
                         std::to_string(wanted) + ", 256-byte aligned, are wanted");
}

// What every CudaPolicy::Begin() refuses.
inline Status CheckPolicyMemory(int64_t num_tokens, const void* memory, size_t memory_bytes, size_t wanted) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX));
  return CheckMemory("a policy's memory", memory, memory_bytes, wanted);
}

// What every factory of a policy refuses.
inline Status CheckPolicyShape(const CudaPolicyShape& shape) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_layers", shape.num_layers, 1, 1 << 20));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", shape.num_q_heads, 1, 65535));
  HW_KERNELS_RETURN_IF_ERROR(CheckSizes(1, 1, shape.num_q_heads, shape.num_kv_heads, shape.head_dim));
  if (shape.softmax_scale > 0 && std::isfinite(shape.softmax_scale)) return {};
  return InvalidArgument("softmax_scale is " + NumberText(shape.softmax_scale) +
                         "; a positive number is wanted");
}

// Masks, and lists with room for every causal block up to 2^26 entries: over that tiles go dense.
inline CudaListsOfMasksArgs TakeLists(CudaBlockMasks masks, PolicyMemory* memory) {
  constexpr int64_t kMostEntries = int64_t{1} << 26;
  const int64_t segments = masks.num_lists * masks.tiles();
  CudaListsOfMasksArgs lists;
  masks.words = static_cast<uint32_t*>(memory->TakeBytes(masks.bytes()));
  lists.masks = masks;
  lists.counts = memory->Take<int32_t>(segments);
  lists.offsets = memory->Take<int64_t>(segments);
  lists.capacity =
      static_cast<int64_t>(std::min<uint64_t>(CudaPossibleBlocks(masks), uint64_t{kMostEntries}));
  lists.blocks = memory->Take<int32_t>(lists.capacity);
  lists.visited = memory->Take<uint64_t>(1);
  lists.overflows = memory->Take<uint32_t>(1);
  return lists;
}

// What attention is told of lists that CudaListsOfMasks() has been asked for.
inline CudaSelection SelectionOf(const CudaListsOfMasksArgs& lists) {
  CudaSelection selection;
  selection.lists = {lists.masks.num_lists, lists.counts, lists.offsets, lists.blocks};
  selection.visited = lists.visited;
  selection.overflows = lists.overflows;
  selection.possible = CudaPossibleBlocks(lists.masks);
  return selection;
}

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_MEMORY_H_
