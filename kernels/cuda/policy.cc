#include "kernels/cuda/policy.h"

#include <algorithm>
#include <string>
#include <utility>
#include <variant>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/policies/a_shape.h"
#include "kernels/cuda/policies/dense_below.h"
#include "kernels/cuda/policies/flash.h"
#include "kernels/cuda/policies/flex.h"
#include "kernels/cuda/policies/headwater.h"
#include "kernels/cuda/policies/memory.h"
#include "kernels/cuda/policies/probe.h"
#include "kernels/cuda/policies/share.h"
#include "kernels/cuda/policies/skeleton.h"
#include "kernels/cuda/policies/vertical_slash.h"
#include "kernels/cuda/policies/xattention.h"
#include "kernels/cuda/range_attention.h"

namespace headwater::kernels {
namespace {

CudaAttentionArgs ArgsOf(const CudaPolicyShape& shape, int64_t num_tokens) {
  CudaAttentionArgs args;
  args.total_q = args.total_k = num_tokens;
  args.num_q_heads = shape.num_q_heads;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.softmax_scale = shape.softmax_scale;
  return args;
}

// Overloads for std::visit.
struct Make {
  const CudaPolicyShape& shape;
  std::unique_ptr<CudaPolicy>* made;

  Status operator()(const DenseParameters& p) const { return MakeCudaDense(p, shape, made); }
  Status operator()(const ProbeParameters& p) const { return MakeCudaProbe(p, shape, made); }
  Status operator()(const reference::FlashParameters& p) const { return MakeCudaFlash(p, shape, made); }
  Status operator()(const reference::Flash2Parameters& p) const { return MakeCudaFlash2(p, shape, made); }
  Status operator()(const HeadwaterParameters& p) const { return MakeCudaHeadwater(p, shape, made); }
  Status operator()(const AShapeParameters& p) const { return MakeCudaAShape(p, shape, made); }
  Status operator()(const reference::VerticalSlashParameters& p) const {
    return MakeCudaVerticalSlash(p, shape, made);
  }
  Status operator()(const reference::XAttentionParameters& p) const {
    return MakeCudaXAttention(p, shape, made);
  }
  Status operator()(const reference::SkeletonParameters& p) const { return MakeCudaSkeleton(p, shape, made); }
  Status operator()(const reference::FlexParameters& p) const { return MakeCudaFlex(p, shape, made); }
  Status operator()(const ShareWithClusters& p) const { return MakeCudaShare(p, shape, made); }
};

Status OverLists(const CudaPolicyShape& shape, int64_t num_tokens, const CudaPolicyLayer& layer,
                 const CudaPolicyOutput& output, const CudaSelection& selection, void* workspace,
                 size_t workspace_bytes, cudaStream_t stream) {
  CudaAttentionArgs args = ArgsOf(shape, num_tokens);
  if (selection.queries.count > 0) {
    args.total_q = selection.queries.count;
    args.query_position = static_cast<int32_t>(selection.queries.first);
  }
  args.q = layer.q;
  args.k = layer.k;
  args.v = layer.v;
  args.out = output.out;
  args.lse_ln = output.lse_ln;
  args.lists = selection.lists;
  args.correction = selection.correction;
  return CudaAttention(args, workspace, workspace_bytes, stream);
}

Status OverRanges(const CudaPolicyShape& shape, int64_t num_tokens, const CudaPolicyLayer& layer,
                  const CudaPolicyOutput& output, const CudaSelection& selection, cudaStream_t stream) {
  CudaRangeAttentionArgs args;
  args.q = layer.q;
  args.k = layer.k;
  args.v = layer.v;
  args.out = output.out;
  args.lse_ln = output.lse_ln;
  args.num_tokens = num_tokens;
  args.num_q_heads = shape.num_q_heads;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.softmax_scale = shape.softmax_scale;
  args.ranges = *selection.ranges;
  return CudaRangeAttention(args, stream);
}

}  // namespace

Status MakeCudaPolicy(const PolicyParameters& parameters, const CudaPolicyShape& shape,
                      std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyShape(shape));
  HW_KERNELS_RETURN_IF_ERROR(std::visit(Make{shape, made}, parameters));
  if (parameters.dense_below_tokens > 0) *made = DenseBelow(parameters.dense_below_tokens, std::move(*made));
  return {};
}

bool CudaPolicyTakesRanges(const PolicyParameters& parameters) {
  return std::holds_alternative<HeadwaterParameters>(parameters);
}

bool CudaPolicyListsBlocks(const PolicyParameters& parameters) {
  return !std::holds_alternative<AShapeParameters>(parameters) &&
         !std::holds_alternative<reference::VerticalSlashParameters>(parameters);
}

size_t CudaPolicyAttentionWorkspaceBytes(const CudaPolicyShape& shape, int64_t num_tokens) {
  // Sizes are asked for before there are arrays: any aligned address that is not null does.
  static int64_t some[2] __attribute__((aligned(256)));
  CudaAttentionArgs args = ArgsOf(shape, num_tokens);
  args.q = args.k = args.v = args.out = some;
  args.lists.counts = reinterpret_cast<int32_t*>(some);
  args.lists.offsets = some;
  args.lists.blocks = reinterpret_cast<int32_t*>(some);
  size_t most = 0;
  for (const int32_t lists : {0, shape.num_kv_heads, shape.num_q_heads}) {
    args.lists.num_lists = lists;
    most = std::max(most, CudaAttentionWorkspaceBytes(args));
  }
  return most;
}

size_t CudaPartBytes(const CudaPolicyShape& shape, int64_t num_tokens) {
  // Tiles of 128 rows: 128 positions of a query head, or fewer of all that share a KV head.
  const int64_t tiles = (num_tokens + 127) / 128 + 1;
  return static_cast<size_t>(shape.num_q_heads * tiles) * 2 * (sizeof(int64_t) + sizeof(int32_t));
}

Status CudaAttentionOverPart(const CudaSelection& selection, const CudaQueryRange& queries,
                             const CudaPolicyShape& shape, int64_t num_tokens, const CudaPolicyLayer& layer,
                             const CudaPolicyOutput& output, void* scratch, void* workspace,
                             size_t workspace_bytes, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckQueries(queries.first, queries.count, num_tokens));
  if (selection.ranges != nullptr) return {StatusCode::kUnimplemented, "a part of attention over key ranges"};
  CudaSelection part = selection;
  part.queries = queries;
  if (const int64_t lists = selection.lists.num_lists; lists > 0) {
    const int64_t positions = 128 / (shape.num_q_heads / lists);
    const int64_t all = (num_tokens + positions - 1) / positions, first = queries.first / positions;
    const int64_t tiles = (queries.count + positions - 1) / positions;
    if (queries.first % positions != 0) {
      return {StatusCode::kUnimplemented, "queries from " + std::to_string(queries.first) +
                                              " on, within a tile of " + std::to_string(positions)};
    }
    auto* const offsets = static_cast<int64_t*>(scratch);
    auto* const counts = reinterpret_cast<int32_t*>(offsets + lists * tiles);
    const auto copy = [&](void* to, const void* from, size_t size) {
      return cudaMemcpy2DAsync(to, static_cast<size_t>(tiles) * size,
                               static_cast<const char*>(from) + static_cast<size_t>(first) * size,
                               static_cast<size_t>(all) * size, static_cast<size_t>(tiles) * size,
                               static_cast<size_t>(lists), cudaMemcpyDeviceToDevice, stream);
    };
    HW_KERNELS_RETURN_IF_CUDA_ERROR(copy(offsets, selection.lists.offsets, sizeof(int64_t)));
    HW_KERNELS_RETURN_IF_CUDA_ERROR(copy(counts, selection.lists.counts, sizeof(int32_t)));
    part.lists.offsets = offsets;
    part.lists.counts = counts;
  }
  return OverLists(shape, num_tokens, layer, output, part, workspace, workspace_bytes, stream);
}

Status CudaAttentionOver(const CudaSelection& selection, CudaPolicy* policy, const CudaPolicyShape& shape,
                         int64_t num_tokens, const CudaPolicyLayer& layer, const CudaPolicyOutput& output,
                         void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  if (policy->wants_lse() && (output.lse_ln == nullptr || output.out == layer.q)) {
    return InvalidArgument("this policy needs lse_ln, and an output that is not q");
  }
  HW_KERNELS_RETURN_IF_ERROR(
      selection.ranges != nullptr
          ? OverRanges(shape, num_tokens, layer, output, selection, stream)
          : OverLists(shape, num_tokens, layer, output, selection, workspace, workspace_bytes, stream));
  if (policy->wants_lse()) return policy->Finish(layer, output.lse_ln, stream);
  return {};
}

Status CudaPolicyAttention(CudaPolicy* policy, const CudaPolicyShape& shape, int64_t num_tokens,
                           const CudaPolicyLayer& layer, const CudaPolicyOutput& output, void* workspace,
                           size_t workspace_bytes, cudaStream_t stream, CudaSelection* selection) {
  if (policy->wants_lse() && (output.lse_ln == nullptr || output.out == layer.q)) {
    return InvalidArgument("this policy needs lse_ln, and an output that is not q");
  }
  HW_KERNELS_RETURN_IF_ERROR(policy->Select(layer, stream, selection));
  return CudaAttentionOver(*selection, policy, shape, num_tokens, layer, output, workspace, workspace_bytes,
                           stream);
}

}  // namespace headwater::kernels
