#include "kernels/cuda/policies/tail_profile.h"

#include <cmath>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/policies/memory.h"
#include "kernels/cuda/sm90/tail_profile_launch.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

// Keys that one warp walks: as many as leave work for every SM.
int32_t ChunkKeys(const CudaTailProfileArgs& a) {
  constexpr int64_t kWarps = 4096;
  int32_t keys = sm90::kTailMostChunkKeys;
  while (keys > sm90::kTailLeastChunkKeys && a.num_tokens / keys * a.num_q_heads < kWarps) keys /= 2;
  return keys;
}

sm90::TailProfileParams Plan(const CudaTailProfileArgs& a, PolicyMemory* memory) {
  sm90::TailProfileParams p{};
  p.args = a;
  p.chunk_keys = ChunkKeys(a);
  p.chunks = (a.num_tokens + p.chunk_keys - 1) / p.chunk_keys;
  const int64_t rows = int64_t{sm90::kTailRows} * a.num_q_heads;
  p.parts = memory->Take<float2>(rows * p.chunks);
  p.tails = memory->Take<float>(rows * p.chunks);
  p.lse = memory->Take<float>(rows);
  return p;
}

Status CheckPositive(const char* name, float value) {
  if (value > 0 && std::isfinite(value)) return {};
  return InvalidArgument(std::string(name) + " is " + NumberText(value) + "; a positive number is wanted");
}

Status Validate(const CudaTailProfileArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(a.num_tokens, a.num_tokens, a.num_q_heads, a.num_kv_heads, a.head_dim));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", a.num_q_heads, 1, 65535));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckRange("rows", a.rows, 1, a.num_tokens < sm90::kTailRows ? a.num_tokens : sm90::kTailRows));
  HW_KERNELS_RETURN_IF_ERROR(CheckPositive("softmax_scale", a.softmax_scale));
  HW_KERNELS_RETURN_IF_ERROR(CheckPositive("factor", a.factor));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", a.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", a.k));
  if (a.vertical == nullptr || a.slash == nullptr) return InvalidArgument("vertical or slash is null");
  for (const float* out : {a.vertical, a.slash, a.vertical_sums, a.slash_sums}) {
    if (reinterpret_cast<uintptr_t>(out) % alignof(float) != 0) {
      return InvalidArgument("an output is not 4-byte aligned");
    }
  }
  return {};
}

}  // namespace

size_t CudaTailProfileWorkspaceBytes(const CudaTailProfileArgs& args) {
  PolicyMemory memory;
  Plan(args, &memory);
  return memory.bytes();
}

Status CudaTailProfile(const CudaTailProfileArgs& args, void* workspace, size_t workspace_bytes,
                       cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckMemory("the workspace", workspace, workspace_bytes, CudaTailProfileWorkspaceBytes(args)));
  PolicyMemory memory(workspace);
  const sm90::TailProfileParams params = Plan(args, &memory);
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchTailProfile(params, stream));
  return {};
}

}  // namespace headwater::kernels
