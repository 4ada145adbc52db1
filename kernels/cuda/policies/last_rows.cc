#include "kernels/cuda/policies/last_rows.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/last_rows_launch.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kCtas = 512;  // several for each SM

Status Validate(const CudaLastRowsArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 1, INT32_MAX - 256));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(a.num_tokens, a.num_tokens, a.num_q_heads, a.num_kv_heads, a.head_dim));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", a.num_q_heads, 1, 65535));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("last_rows", a.last_rows, 1, kMostLastRows));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", a.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", a.k));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("vertical", a.vertical));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("slash", a.slash));
  if (a.softmax_scale > 0 && std::isfinite(a.softmax_scale)) return {};
  return InvalidArgument("softmax_scale is " + std::to_string(a.softmax_scale) +
                         "; a positive number is wanted");
}

sm90::LastRowsParams Plan(const CudaLastRowsArgs& a, void* workspace) {
  sm90::LastRowsParams p = {};
  p.args = a;
  p.args.last_rows = static_cast<int32_t>(std::min<int64_t>(a.last_rows, a.num_tokens));
  p.tile_rows = p.args.last_rows <= 64 ? 64 : 128;
  p.blocks = (a.num_tokens + sm90::kLastRowsKeys - 1) / sm90::kLastRowsKeys;
  const int64_t splits = std::clamp<int64_t>(kCtas / a.num_q_heads, 1, p.blocks);
  p.split_blocks = (p.blocks + splits - 1) / splits;
  p.splits = static_cast<int>((p.blocks + p.split_blocks - 1) / p.split_blocks);
  p.stats = static_cast<float2*>(workspace);
  p.parts = reinterpret_cast<float*>(p.stats + int64_t{a.num_q_heads} * p.splits * p.tile_rows);
  return p;
}

}  // namespace

size_t CudaLastRowsWorkspaceBytes(const CudaLastRowsArgs& args) {
  const sm90::LastRowsParams p = Plan(args, nullptr);
  return static_cast<size_t>(args.num_q_heads) *
         (static_cast<size_t>(p.splits) * p.tile_rows * sizeof(float2) +
          static_cast<size_t>(p.blocks) * (p.tile_rows + sm90::kLastRowsKeys) * sizeof(float));
}

Status CudaLastRows(const CudaLastRowsArgs& args, void* workspace, size_t workspace_bytes,
                    cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  const size_t wanted = CudaLastRowsWorkspaceBytes(args);
  if (workspace == nullptr || workspace_bytes < wanted || Misaligned(workspace)) {
    return InvalidArgument("the workspace has " + std::to_string(workspace_bytes) + " bytes; " +
                           std::to_string(wanted) + ", 256-byte aligned, are wanted");
  }
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchLastRows(Plan(args, workspace), stream));
  return {};
}

}  // namespace headwater::kernels
