#include "kernels/cuda/policies/flex.h"

#include <algorithm>

namespace headwater::kernels {

bool FlexPolicy::Dense(int64_t num_tokens) const {
  return num_tokens <= std::max<int64_t>(256, parameters_.MinBlocks() * 128);
}

size_t FlexPolicy::MemoryBytes(int64_t num_tokens) const {
  if (num_tokens > INT32_MAX || Dense(num_tokens)) return 0;
  PolicyMemory memory;
  MakeFlexPlan(parameters_, shape_, num_tokens, 0, &memory);
  return memory.bytes();
}

Status FlexPolicy::Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t /*stream*/) {
  num_tokens_ = 0;
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyMemory(num_tokens, memory, memory_bytes, MemoryBytes(num_tokens)));
  PolicyMemory from(memory);
  plan_ = Dense(num_tokens) ? FlexPlan() : MakeFlexPlan(parameters_, shape_, num_tokens, 0, &from);
  num_tokens_ = num_tokens;
  return {};
}

Status FlexPolicy::Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) {
  *selection = {};
  if (num_tokens_ == 0) return InvalidArgument("Select() before Begin()");
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", layer.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", layer.k));
  if (Dense(num_tokens_)) return {};
  HW_KERNELS_RETURN_IF_ERROR(FlexScores(plan_, layer, stream));
  HW_KERNELS_RETURN_IF_ERROR(FlexColumnsAndOffsets(plan_, stream));
  HW_KERNELS_RETURN_IF_ERROR(FlexPooledBlocks(plan_, layer, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaListsOfMasks(plan_.lists, stream));
  *selection = SelectionOf(plan_.lists);
  return {};
}

Status MakeCudaFlex(const reference::FlexParameters& parameters, const CudaPolicyShape& shape,
                    std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(CheckFlexPlan(parameters, shape));
  *made = std::make_unique<FlexPolicy>(parameters, shape);
  return {};
}

}  // namespace headwater::kernels
