#include "kernels/cuda/policies/flex_plan.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/cuda/block_stats.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

Status CheckParameters(const reference::FlexParameters& p) {
  const auto bad = [](const char* name, double value, const char* range) {
    return InvalidArgument(std::string(name) + " is " + NumberText(value) + "; " + range + " is wanted");
  };
  if (!(p.gamma > 0 && p.gamma < 1)) return bad("gamma", p.gamma, "over 0 and below 1");
  if (!(p.tau >= 0 && p.tau <= 1)) return bad("tau", p.tau, "0 to 1");
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("min_budget_tokens", p.min_budget_tokens, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("max_budget_tokens", p.max_budget_tokens, 0, INT32_MAX));
  if (p.block_tokens == 128) return {};
  return {StatusCode::kUnimplemented,
          "block_tokens is " + std::to_string(p.block_tokens) + "; 128 is known on the GPU"};
}

// The sizes and the scale that stages share.
template <class Args>
Args Sized(const CudaPolicyShape& shape, int64_t num_tokens, float scale) {
  Args args;
  args.num_tokens = num_tokens;
  args.num_q_heads = shape.num_q_heads;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.softmax_scale = scale;
  return args;
}

}  // namespace

Status CheckFlexPlan(const reference::FlexParameters& parameters, const CudaPolicyShape& shape) {
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(parameters));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyShape(shape));
  return CheckRange("num_q_heads", shape.num_q_heads, 1, 32767);
}

FlexPlan MakeFlexPlan(const reference::FlexParameters& parameters, const CudaPolicyShape& shape,
                      int64_t num_tokens, size_t least_scratch, PolicyMemory* memory) {
  const int64_t heads = shape.num_q_heads;
  const int64_t blocks = CudaStatsBlocks(num_tokens);
  const float scale = parameters.compat.scale_of_head_dim
                          ? static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)))
                          : shape.softmax_scale;
  FlexPlan plan;

  plan.profile = Sized<CudaTailProfileArgs>(shape, num_tokens, scale);
  plan.profile.rows = static_cast<int32_t>(std::min<int64_t>(128, num_tokens));
  plan.profile.factor = 1 / static_cast<float>(plan.profile.rows);
  // Columns and diagonals as one array: they are covered, and chosen from, together.
  auto* const profile = memory->Take<float>(2 * heads * num_tokens);
  auto* const sums = memory->Take<float>(2 * heads * blocks);
  plan.profile.vertical = profile;
  plan.profile.slash = profile == nullptr ? nullptr : profile + heads * num_tokens;
  plan.profile.vertical_sums = sums;
  plan.profile.slash_sums = sums == nullptr ? nullptr : sums + heads * blocks;

  plan.cover.x = profile;
  plan.cover.length = num_tokens;
  plan.cover.num_rows = 2 * shape.num_q_heads;
  plan.cover.share = parameters.gamma;
  plan.cover.counts = memory->Take<int64_t>(2 * heads);

  plan.k_mean = memory->Take<float>(blocks * shape.num_kv_heads * shape.head_dim);
  plan.budgets = Sized<CudaFlexBudgetsArgs>(shape, num_tokens, scale);
  plan.budgets.k_mean = plan.k_mean;
  plan.budgets.column_scores = plan.profile.vertical_sums;
  plan.budgets.covers = plan.cover.counts;
  plan.budgets.tau = parameters.tau;
  plan.budgets.nan_rule = parameters.compat.nan_rule;
  plan.budgets.min_blocks = parameters.MinBlocks();
  plan.budgets.max_blocks =
      parameters.max_budget_tokens > 0 ? (parameters.max_budget_tokens + 127) / 128 : INT32_MAX;
  plan.budgets.pooled = memory->Take<float>(heads * blocks);
  plan.budgets.js_distance = memory->Take<float>(heads);
  plan.budgets.query_aware = memory->Take<uint8_t>(heads);
  plan.budgets.budgets = memory->Take<int32_t>(2 * heads);

  plan.lists = TakeLists(CudaBlockMasksOf(num_tokens, shape.num_q_heads, shape.num_kv_heads, true), memory);
  plan.top = {sums, plan.budgets.budgets, blocks, shape.num_q_heads, nullptr};
  plan.top.bits = memory->Take<uint32_t>(2 * heads * plan.lists.masks.tile_words());

  plan.pooled = Sized<CudaFlexPooledArgs>(shape, num_tokens, scale);
  plan.pooled.k_mean = plan.k_mean;
  plan.pooled.query_aware = plan.budgets.query_aware;
  plan.pooled.gamma = parameters.gamma;
  plan.pooled.masks = plan.lists.masks;

  plan.scratch_bytes =
      std::max({CudaTailProfileWorkspaceBytes(plan.profile), CudaCoverWorkspaceBytes(plan.cover),
                CudaFlexPooledWorkspaceBytes(plan.pooled), least_scratch});
  plan.scratch = memory->TakeBytes(plan.scratch_bytes);
  return plan;
}

Status FlexScores(const FlexPlan& plan, const CudaPolicyLayer& layer, cudaStream_t stream) {
  CudaBlockStatsArgs means;
  means.k = layer.k;
  means.total_k = plan.profile.num_tokens;
  means.num_kv_heads = plan.profile.num_kv_heads;
  means.head_dim = plan.profile.head_dim;
  means.stats.k_mean = plan.k_mean;
  CudaTailProfileArgs profile = plan.profile;
  profile.q = layer.q;
  profile.k = layer.k;
  CudaFlexBudgetsArgs budgets = plan.budgets;
  budgets.q = layer.q;
  HW_KERNELS_RETURN_IF_ERROR(CudaTailProfile(profile, plan.scratch, plan.scratch_bytes, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaCover(plan.cover, plan.scratch, plan.scratch_bytes, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaBlockStatistics(means, stream));
  return CudaFlexBudgets(budgets, stream);
}

Status FlexColumnsAndOffsets(const FlexPlan& plan, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CudaFlexTop(plan.top, stream));
  return CudaFlexMasks(plan.top.bits, plan.lists.masks, stream);
}

Status FlexPooledBlocks(const FlexPlan& plan, const CudaPolicyLayer& layer, cudaStream_t stream) {
  if (plan.budgets.tau == 0) return {};  // no head is query aware
  CudaFlexPooledArgs pooled = plan.pooled;
  pooled.q = layer.q;
  return CudaFlexPooled(pooled, plan.scratch, plan.scratch_bytes, stream);
}

}  // namespace headwater::kernels
