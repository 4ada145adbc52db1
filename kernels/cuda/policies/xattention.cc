#include "kernels/cuda/policies/xattention.h"

#include <cmath>

#include "kernels/cuda/policies/memory.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

Status CheckParameters(const reference::XAttentionParameters& p, const CudaPolicyShape& shape) {
  if (p.compat) return {StatusCode::kUnimplemented, "xattention's compat has no path on the GPU"};
  if (p.thresholds.size() != 1 && p.thresholds.size() != static_cast<size_t>(shape.num_q_heads)) {
    return InvalidArgument(std::to_string(p.thresholds.size()) + " thresholds; 1 or " +
                           std::to_string(shape.num_q_heads) + " are wanted");
  }
  for (const double threshold : p.thresholds) {
    if (!(threshold >= 0 && threshold <= 1)) {
      return InvalidArgument("threshold " + NumberText(threshold) + " is outside 0 to 1");
    }
  }
  if (p.chunk_tokens < 0 || p.chunk_tokens > (int64_t{1} << 28) || p.chunk_tokens % 128 != 0) {
    return InvalidArgument("chunk_tokens " + std::to_string(p.chunk_tokens) +
                           " is not 0 or a multiple of 128 up to 2^28");
  }
  if (!std::isfinite(p.norm) || p.norm <= 0) {
    return InvalidArgument("norm " + NumberText(p.norm) + " is not a number over 0");
  }
  if (p.stride < 1 || p.stride > 128 || 128 % p.stride != 0) {
    return InvalidArgument("stride " + std::to_string(p.stride) + " is not a divisor of 128 from 1 to 128");
  }
  if (p.stride == 4 || p.stride == 8 || p.stride == 16) return {};
  return {StatusCode::kUnimplemented, "stride " + std::to_string(p.stride) + "; 4, 8 and 16 are known"};
}

}  // namespace

XAttentionPolicy::Memory XAttentionPolicy::Divide(int64_t num_tokens, void* memory) const {
  PolicyMemory from(memory);
  Memory m;
  const CudaXAttentionArgs args = ArgsFor(num_tokens);
  m.lists = TakeLists(args.masks, &from);
  m.workspace_bytes = CudaXAttentionWorkspaceBytes(args);
  m.workspace = from.TakeBytes(m.workspace_bytes);
  m.bytes = from.bytes();
  return m;
}

CudaXAttentionArgs XAttentionPolicy::ArgsFor(int64_t num_tokens) const {
  CudaXAttentionArgs args;
  args.num_tokens = num_tokens;
  args.num_q_heads = shape_.num_q_heads;
  args.num_kv_heads = shape_.num_kv_heads;
  args.head_dim = shape_.head_dim;
  args.softmax_scale = shape_.softmax_scale;
  args.stride = parameters_.stride;
  args.norm = parameters_.norm;
  args.thresholds = parameters_.thresholds.data();
  args.num_thresholds = static_cast<int32_t>(parameters_.thresholds.size());
  args.masks = {nullptr, num_tokens, shape_.num_q_heads, 128};
  return args;
}

size_t XAttentionPolicy::MemoryBytes(int64_t num_tokens) const {
  if (num_tokens < 1 || num_tokens > kCudaXAttentionMostTokens) return 0;
  return Divide(num_tokens, nullptr).bytes;
}

Status XAttentionPolicy::Begin(int64_t num_tokens, void* memory, size_t memory_bytes,
                               cudaStream_t /*stream*/) {
  num_tokens_ = 0;
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX));
  if (num_tokens > kCudaXAttentionMostTokens) {
    return {StatusCode::kUnimplemented, "xattention of " + std::to_string(num_tokens) + " tokens; at most " +
                                            std::to_string(kCudaXAttentionMostTokens) + " are known"};
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyMemory(num_tokens, memory, memory_bytes, MemoryBytes(num_tokens)));
  num_tokens_ = num_tokens;
  memory_ = Divide(num_tokens, memory);
  return {};
}

Status XAttentionPolicy::Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) {
  *selection = {};
  if (num_tokens_ == 0) return InvalidArgument("Select() before Begin()");
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("layer", layer.layer, 0, shape_.num_layers - 1));
  CudaXAttentionArgs args = ArgsFor(num_tokens_);
  args.q = layer.q;
  args.k = layer.k;
  args.masks = memory_.lists.masks;
  HW_KERNELS_RETURN_IF_ERROR(CudaXAttentionMasks(args, memory_.workspace, memory_.workspace_bytes, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaListsOfMasks(memory_.lists, stream));
  *selection = SelectionOf(memory_.lists);
  return {};
}

Status MakeCudaXAttention(const reference::XAttentionParameters& parameters, const CudaPolicyShape& shape,
                          std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyShape(shape));
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(parameters, shape));
  *made = std::make_unique<XAttentionPolicy>(parameters, shape);
  return {};
}

}  // namespace headwater::kernels
