#include "kernels/cuda/policies/skeleton.h"

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels/cuda/check.h"
#include "kernels/cuda/skeleton.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMostEntries = int64_t{64} << 20;

class SkeletonPolicy final : public CudaPolicy {
 public:
  SkeletonPolicy(const reference::SkeletonParameters& parameters, const CudaPolicyShape& shape)
      : parameters_(parameters), shape_(shape) {}
  SkeletonPolicy(const SkeletonPolicy&) = delete;  // arguments point to parameters_
  SkeletonPolicy& operator=(const SkeletonPolicy&) = delete;

  // Of the shortest prompt with an interior row, when num_tokens is 0.
  CudaSkeletonArgs Args(int64_t num_tokens) const {
    CudaSkeletonArgs args;
    args.num_tokens = num_tokens == 0 ? Shortest() : num_tokens;
    args.num_q_heads = shape_.num_q_heads;
    args.num_kv_heads = shape_.num_kv_heads;
    args.head_dim = shape_.head_dim;
    args.softmax_scale = shape_.softmax_scale;
    args.parameters = &parameters_;
    return args;
  }

  size_t MemoryBytes(int64_t num_tokens) const override {
    if (num_tokens < Shortest() || num_tokens > INT32_MAX) return 0;
    return Divide(num_tokens, nullptr).bytes;
  }

  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) override {
    num_tokens_ = 0;
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX));
    const size_t wanted = MemoryBytes(num_tokens);
    if (wanted > 0) {
      if (memory == nullptr || memory_bytes < wanted || reinterpret_cast<uintptr_t>(memory) % 256 != 0) {
        return InvalidArgument("the memory has " + std::to_string(memory_bytes) + " bytes; " +
                               std::to_string(wanted) + ", 256-byte aligned, are wanted");
      }
      memory_ = Divide(num_tokens, memory);
      possible_ = CudaPossibleBlocks(memory_.lists.masks);
      HW_KERNELS_RETURN_IF_ERROR(
          CudaSkeletonTables(Args(num_tokens), memory_.workspace, memory_.workspace_bytes, stream));
    }
    num_tokens_ = num_tokens;
    return {};
  }

  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override {
    *selection = {};
    if (num_tokens_ == 0) return InvalidArgument("Select() before Begin()");
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("layer", layer.layer, 0, shape_.num_layers - 1));
    HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", layer.q));
    HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", layer.k));
    if (num_tokens_ < Shortest()) return {};
    CudaSkeletonArgs args = Args(num_tokens_);
    args.q = layer.q;
    args.k = layer.k;
    HW_KERNELS_RETURN_IF_ERROR(
        CudaSkeletonSelect(args, memory_.lists.masks, memory_.workspace, memory_.workspace_bytes, stream));
    HW_KERNELS_RETURN_IF_ERROR(CudaListsOfMasks(memory_.lists, stream));
    selection->lists = {memory_.lists.masks.num_lists, memory_.lists.counts, memory_.lists.offsets,
                        memory_.lists.blocks};
    selection->visited = memory_.lists.visited;
    selection->overflows = memory_.lists.overflows;
    selection->possible = possible_;
    return {};
  }

 private:
  struct Memory {
    CudaListsOfMasksArgs lists;
    void* workspace = nullptr;
    size_t workspace_bytes = 0, bytes = 0;
  };

  int64_t Shortest() const { return int64_t{parameters_.sink_tokens} + parameters_.local_tokens + 1; }

  Memory Divide(int64_t num_tokens, void* memory) const {
    Memory m;
    const auto take = [&](auto** array, size_t count) {
      if (memory != nullptr) {
        *array =
            reinterpret_cast<std::remove_reference_t<decltype(*array)>>(static_cast<char*>(memory) + m.bytes);
      }
      m.bytes += (count * sizeof(**array) + 255) / 256 * 256;
    };
    CudaListsOfMasksArgs& lists = m.lists;
    lists.masks = CudaBlockMasksOf(num_tokens, shape_.num_q_heads, shape_.num_kv_heads, true);
    const int64_t segments = lists.masks.num_lists * lists.masks.tiles();
    lists.capacity = std::min(segments * (lists.masks.blocks() + 1) / 2, kMostEntries);
    take(&lists.masks.words, lists.masks.bytes() / 4);
    take(&lists.counts, static_cast<size_t>(segments));
    take(&lists.offsets, static_cast<size_t>(segments));
    take(&lists.blocks, static_cast<size_t>(lists.capacity));
    take(&lists.visited, 1);
    take(&lists.overflows, 1);
    m.workspace_bytes = CudaSkeletonWorkspaceBytes(Args(num_tokens));
    char* workspace = nullptr;
    take(&workspace, m.workspace_bytes);
    m.workspace = workspace;
    return m;
  }

  const reference::SkeletonParameters parameters_;
  const CudaPolicyShape shape_;
  int64_t num_tokens_ = 0;  // 0: no prompt
  Memory memory_;
  uint64_t possible_ = 0;
};

}  // namespace

Status MakeCudaSkeleton(const reference::SkeletonParameters& parameters, const CudaPolicyShape& shape,
                        std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(reference::CheckSkeletonParameters(parameters));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_layers", shape.num_layers, 1, 1 << 20));
  auto policy = std::make_unique<SkeletonPolicy>(parameters, shape);
  HW_KERNELS_RETURN_IF_ERROR(CheckCudaSkeletonArgs(policy->Args(0)));
  *made = std::move(policy);
  return {};
}

}  // namespace headwater::kernels
