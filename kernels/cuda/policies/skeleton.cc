#include "kernels/cuda/policies/skeleton.h"

#include <utility>

#include "kernels/cuda/policies/memory.h"
#include "kernels/cuda/skeleton.h"

namespace headwater::kernels {
namespace {

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
    HW_KERNELS_RETURN_IF_ERROR(CheckPolicyMemory(num_tokens, memory, memory_bytes, MemoryBytes(num_tokens)));
    if (num_tokens >= Shortest()) {
      memory_ = Divide(num_tokens, memory);
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
    *selection = SelectionOf(memory_.lists);
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
    PolicyMemory from(memory);
    Memory m;
    m.lists = TakeLists(CudaBlockMasksOf(num_tokens, shape_.num_q_heads, shape_.num_kv_heads, true), &from);
    m.workspace_bytes = CudaSkeletonWorkspaceBytes(Args(num_tokens));
    m.workspace = from.TakeBytes(m.workspace_bytes);
    m.bytes = from.bytes();
    return m;
  }

  const reference::SkeletonParameters parameters_;
  const CudaPolicyShape shape_;
  int64_t num_tokens_ = 0;  // 0: no prompt
  Memory memory_;
};

}  // namespace

Status MakeCudaSkeleton(const reference::SkeletonParameters& parameters, const CudaPolicyShape& shape,
                        std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(reference::CheckSkeletonParameters(parameters));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyShape(shape));
  auto policy = std::make_unique<SkeletonPolicy>(parameters, shape);
  HW_KERNELS_RETURN_IF_ERROR(CheckCudaSkeletonArgs(policy->Args(0)));
  *made = std::move(policy);
  return {};
}

}  // namespace headwater::kernels
