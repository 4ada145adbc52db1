#include "kernels/cuda/policies/xattention.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/check.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMostListed = int64_t{64} << 20;

Status CheckParameters(const reference::XAttentionParameters& p, const CudaPolicyShape& shape) {
  if (p.compat) return {StatusCode::kUnimplemented, "xattention's compat has no path on the GPU"};
  if (p.thresholds.size() != 1 && p.thresholds.size() != static_cast<size_t>(shape.num_q_heads)) {
    return InvalidArgument(std::to_string(p.thresholds.size()) + " thresholds; 1 or " +
                           std::to_string(shape.num_q_heads) + " are wanted");
  }
  for (const double threshold : p.thresholds) {
    if (!(threshold >= 0 && threshold <= 1)) {
      return InvalidArgument("threshold " + std::to_string(threshold) + " is outside 0 to 1");
    }
  }
  if (p.chunk_tokens < 0 || p.chunk_tokens > (int64_t{1} << 28) || p.chunk_tokens % 128 != 0) {
    return InvalidArgument("chunk_tokens " + std::to_string(p.chunk_tokens) +
                           " is not 0 or a multiple of 128 up to 2^28");
  }
  if (!std::isfinite(p.norm) || p.norm <= 0) {
    return InvalidArgument("norm " + std::to_string(p.norm) + " is not a number over 0");
  }
  if (p.stride < 1 || p.stride > 128 || 128 % p.stride != 0) {
    return InvalidArgument("stride " + std::to_string(p.stride) + " is not a divisor of 128 from 1 to 128");
  }
  if (p.stride == 4 || p.stride == 8 || p.stride == 16) return {};
  return {StatusCode::kUnimplemented, "stride " + std::to_string(p.stride) + "; 4, 8 and 16 are known"};
}

}  // namespace

struct XAttentionPolicy::Memory {
  size_t words, counts, offsets, blocks, visited, overflows, workspace, bytes = 0;
  int64_t capacity;

  Memory(const CudaBlockMasks& masks, size_t workspace_bytes) {
    const int64_t segments = masks.num_lists * masks.tiles();
    capacity = std::min(segments * (masks.blocks() + 1) / 2, kMostListed);
    words = Take(masks.bytes());
    counts = Take(static_cast<size_t>(segments) * sizeof(int32_t));
    offsets = Take(static_cast<size_t>(segments) * sizeof(int64_t));
    blocks = Take(static_cast<size_t>(capacity) * sizeof(int32_t));
    visited = Take(sizeof(uint64_t));
    overflows = Take(sizeof(uint32_t));
    workspace = Take(workspace_bytes);
  }
  size_t Take(size_t size) {
    const size_t at = bytes;
    bytes += (size + 255) / 256 * 256;
    return at;
  }
};

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
  const CudaXAttentionArgs args = ArgsFor(num_tokens);
  return Memory(args.masks, CudaXAttentionWorkspaceBytes(args)).bytes;
}

Status XAttentionPolicy::Begin(int64_t num_tokens, void* memory, size_t memory_bytes,
                               cudaStream_t /*stream*/) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX));
  if (CudaXAttentionWorkspaceBytes(ArgsFor(num_tokens)) == 0) {
    return {StatusCode::kUnimplemented, "xattention of " + std::to_string(num_tokens) + " tokens"};
  }
  const size_t needed = MemoryBytes(num_tokens);
  if (memory == nullptr || reinterpret_cast<uintptr_t>(memory) % 256 != 0 || memory_bytes < needed) {
    return InvalidArgument("memory is null, not 256-byte aligned or smaller than " + std::to_string(needed) +
                           " bytes");
  }
  num_tokens_ = num_tokens;
  memory_ = static_cast<unsigned char*>(memory);
  return {};
}

Status XAttentionPolicy::Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("layer", layer.layer, 0, shape_.num_layers - 1));
  if (memory_ == nullptr) return InvalidArgument("Select() comes before Begin()");
  CudaXAttentionArgs args = ArgsFor(num_tokens_);
  const size_t workspace_bytes = CudaXAttentionWorkspaceBytes(args);
  const Memory at(args.masks, workspace_bytes);
  args.q = layer.q;
  args.k = layer.k;
  args.masks.words = reinterpret_cast<uint32_t*>(memory_ + at.words);
  HW_KERNELS_RETURN_IF_ERROR(CudaXAttentionMasks(args, memory_ + at.workspace, workspace_bytes, stream));

  CudaListsOfMasksArgs lists;
  lists.masks = args.masks;
  lists.counts = reinterpret_cast<int32_t*>(memory_ + at.counts);
  lists.offsets = reinterpret_cast<int64_t*>(memory_ + at.offsets);
  lists.blocks = reinterpret_cast<int32_t*>(memory_ + at.blocks);
  lists.capacity = at.capacity;
  lists.visited = reinterpret_cast<uint64_t*>(memory_ + at.visited);
  lists.overflows = reinterpret_cast<uint32_t*>(memory_ + at.overflows);
  HW_KERNELS_RETURN_IF_ERROR(CudaListsOfMasks(lists, stream));

  *selection = {};
  selection->lists = {shape_.num_q_heads, lists.counts, lists.offsets, lists.blocks};
  selection->visited = lists.visited;
  selection->overflows = lists.overflows;
  selection->possible = CudaPossibleBlocks(args.masks);
  return {};
}

Status MakeCudaXAttention(const reference::XAttentionParameters& parameters, const CudaPolicyShape& shape,
                          std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(CheckSizes(1, 1, shape.num_q_heads, shape.num_kv_heads, shape.head_dim));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_layers", shape.num_layers, 1, INT32_MAX));
  if (!std::isfinite(shape.softmax_scale) || shape.softmax_scale <= 0) {
    return InvalidArgument("softmax_scale is " + std::to_string(shape.softmax_scale) +
                           "; a number over 0 is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(parameters, shape));
  *made = std::make_unique<XAttentionPolicy>(parameters, shape);
  return {};
}

}  // namespace headwater::kernels
