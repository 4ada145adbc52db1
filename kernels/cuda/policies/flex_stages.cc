#include "kernels/cuda/policies/flex_stages.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/policies/memory.h"
#include "kernels/cuda/sm90/flex_launch.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMostHeads = 32767;

int64_t Blocks(int64_t num_tokens) { return (num_tokens + 127) / 128; }

Status CheckReal(const char* name, double value, bool good, const char* range) {
  if (good) return {};
  return InvalidArgument(std::string(name) + " is " + NumberText(value) + "; " + range + " is wanted");
}

// What CudaFlexBudgetsArgs and CudaFlexPooledArgs have in common.
template <class Args>
Status CheckCommon(const Args& a) {
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(a.num_tokens, a.num_tokens, a.num_q_heads, a.num_kv_heads, a.head_dim));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", a.num_q_heads, 1, kMostHeads));
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("softmax_scale", a.softmax_scale,
                                       a.softmax_scale > 0 && std::isfinite(a.softmax_scale),
                                       "a positive number"));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", a.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k_mean", a.k_mean));
  return CheckArray("query_aware", a.query_aware);
}

Status CheckMasks(const CudaBlockMasks& masks) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("masks.num_tokens", masks.num_tokens, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("masks.num_lists", masks.num_lists, 1, kMostHeads));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("masks.tile_positions", masks.tile_positions, 128, 128));
  return CheckArray("masks.words", masks.words);
}

Status Sm90() {
  int num_sms = 0;
  return RequireSm90(&num_sms);
}

sm90::FlexPooledParams Plan(const CudaFlexPooledArgs& a, PolicyMemory* memory) {
  sm90::FlexPooledParams p{};
  p.args = a;
  p.blocks = Blocks(a.num_tokens);
  p.map = p.blocks * (p.blocks + 1) / 2;
  p.slots = static_cast<int32_t>(
      std::clamp<int64_t>(a.map_bytes / (p.map * static_cast<int64_t>(sizeof(float))), 1, a.num_q_heads));
  p.heads = memory->Take<int32_t>(a.num_q_heads);
  p.num_heads = memory->Take<int32_t>(1);
  p.q_mean = memory->Take<float>(p.slots * p.blocks * a.head_dim);
  p.maps = memory->Take<float>(p.slots * p.map);
  p.ties = memory->Take<uint64_t>(p.slots * p.blocks);
  p.share = sm90::CoverOf(a.gamma * static_cast<double>(p.blocks), static_cast<double>(p.blocks));
  p.share.x = p.maps;
  p.share.length = p.map;
  p.share.rows = p.slots;
  p.share.num_active = p.num_heads;
  p.share.bins = memory->Take<sm90::CoverBin>(int64_t{sm90::kCoverBins} * p.slots);
  p.share.states = memory->Take<sm90::CoverState>(p.slots);
  return p;
}

}  // namespace

Status CudaFlexBudgets(const CudaFlexBudgetsArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckCommon(a));
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("tau", a.tau, a.tau >= 0 && a.tau <= 1, "0 to 1"));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("min_blocks", a.min_blocks, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("max_blocks", a.max_blocks, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("column_scores", a.column_scores));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("covers", a.covers));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("pooled", a.pooled));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("js_distance", a.js_distance));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("budgets", a.budgets));
  HW_KERNELS_RETURN_IF_ERROR(Sm90());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchFlexBudgets(a, stream));
  return {};
}

Status CudaFlexTop(const CudaFlexTopArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_blocks", a.num_blocks, 1, 1 << 24));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_heads", a.num_heads, 1, kMostHeads));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("scores", a.scores));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("budgets", a.budgets));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("bits", a.bits));
  HW_KERNELS_RETURN_IF_ERROR(Sm90());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchFlexTop(a, stream));
  return {};
}

Status CudaFlexMasks(const uint32_t* bits, const CudaBlockMasks& masks, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("bits", bits));
  HW_KERNELS_RETURN_IF_ERROR(CheckMasks(masks));
  HW_KERNELS_RETURN_IF_ERROR(Sm90());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchFlexMasks(bits, masks, stream));
  return {};
}

size_t CudaFlexPooledWorkspaceBytes(const CudaFlexPooledArgs& args) {
  PolicyMemory memory;
  Plan(args, &memory);
  return memory.bytes();
}

Status CudaFlexPooled(const CudaFlexPooledArgs& a, void* workspace, size_t workspace_bytes,
                      cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckCommon(a));
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("gamma", a.gamma, a.gamma > 0 && a.gamma < 1, "over 0 and below 1"));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("map_bytes", a.map_bytes, 1, INT64_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckMasks(a.masks));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("masks.num_tokens", a.masks.num_tokens, a.num_tokens, a.num_tokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("masks.num_lists", a.masks.num_lists, a.num_q_heads, a.num_q_heads));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckMemory("the workspace", workspace, workspace_bytes, CudaFlexPooledWorkspaceBytes(a)));
  PolicyMemory memory(workspace);
  const sm90::FlexPooledParams params = Plan(a, &memory);
  HW_KERNELS_RETURN_IF_ERROR(Sm90());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchFlexPooled(params, stream));
  return {};
}

}  // namespace headwater::kernels
