#include "kernels/cuda/policies/flex.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/policies/workspace.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMostEntries = int64_t{1} << 26;

Status CheckParameters(const reference::FlexParameters& p) {
  const auto bad = [](const char* name, double value, const char* range) {
    return InvalidArgument(std::string(name) + " is " + std::to_string(value) + "; " + range + " is wanted");
  };
  if (!(p.gamma > 0 && p.gamma < 1)) return bad("gamma", p.gamma, "over 0 and below 1");
  if (!(p.tau >= 0 && p.tau <= 1)) return bad("tau", p.tau, "0 to 1");
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("min_budget_tokens", p.min_budget_tokens, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("max_budget_tokens", p.max_budget_tokens, 0, INT32_MAX));
  if (p.block_tokens == 128) return {};
  return {StatusCode::kUnimplemented,
          "block_tokens is " + std::to_string(p.block_tokens) + "; 128 is known on the GPU"};
}

Status CheckShape(const CudaPolicyShape& shape) {
  HW_KERNELS_RETURN_IF_ERROR(CheckSizes(1, 1, shape.num_q_heads, shape.num_kv_heads, shape.head_dim));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", shape.num_q_heads, 1, 32767));
  if (shape.softmax_scale > 0 && std::isfinite(shape.softmax_scale)) return {};
  return InvalidArgument("softmax_scale is " + std::to_string(shape.softmax_scale) +
                         "; a positive number is wanted");
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

bool FlexPolicy::Dense(int64_t num_tokens) const {
  return num_tokens <= std::max<int64_t>(256, parameters_.MinBlocks() * 128);
}

FlexPolicy::Plan FlexPolicy::PlanOf(int64_t num_tokens, void* memory) const {
  const int32_t heads = shape_.num_q_heads;
  const int64_t blocks = CudaStatsBlocks(num_tokens);
  const float scale = parameters_.compat.scale_of_head_dim
                          ? static_cast<float>(1 / std::sqrt(static_cast<double>(shape_.head_dim)))
                          : shape_.softmax_scale;
  WorkspaceLayout layout(memory);
  Plan plan;

  plan.profile = Sized<CudaTailProfileArgs>(shape_, num_tokens, scale);
  plan.profile.rows = static_cast<int32_t>(std::min<int64_t>(128, num_tokens));
  plan.profile.factor = 1 / static_cast<float>(plan.profile.rows);
  // Columns and diagonals as one array: they are covered, and chosen from, together.
  auto* const profile = layout.Take<float>(2 * heads * num_tokens);
  auto* const sums = layout.Take<float>(2 * heads * blocks);
  plan.profile.vertical = profile;
  plan.profile.slash = profile == nullptr ? nullptr : profile + heads * num_tokens;
  plan.profile.vertical_sums = sums;
  plan.profile.slash_sums = sums == nullptr ? nullptr : sums + heads * blocks;

  plan.cover.x = profile;
  plan.cover.length = num_tokens;
  plan.cover.num_rows = 2 * heads;
  plan.cover.share = parameters_.gamma;
  plan.cover.counts = layout.Take<int64_t>(2 * heads);

  plan.k_mean = layout.Take<float>(blocks * shape_.num_kv_heads * shape_.head_dim);
  plan.budgets = Sized<CudaFlexBudgetsArgs>(shape_, num_tokens, scale);
  plan.budgets.k_mean = plan.k_mean;
  plan.budgets.column_scores = plan.profile.vertical_sums;
  plan.budgets.covers = plan.cover.counts;
  plan.budgets.tau = parameters_.tau;
  plan.budgets.nan_rule = parameters_.compat.nan_rule;
  plan.budgets.min_blocks = parameters_.MinBlocks();
  plan.budgets.max_blocks =
      parameters_.max_budget_tokens > 0 ? (parameters_.max_budget_tokens + 127) / 128 : INT32_MAX;
  plan.budgets.pooled = layout.Take<float>(heads * blocks);
  plan.budgets.js_distance = layout.Take<float>(heads);
  plan.budgets.query_aware = layout.Take<uint8_t>(heads);
  plan.budgets.budgets = layout.Take<int32_t>(2 * heads);

  plan.masks = CudaBlockMasksOf(num_tokens, heads, shape_.num_kv_heads, true);
  plan.masks.words = static_cast<uint32_t*>(layout.TakeBytes(plan.masks.bytes()));
  plan.top = {sums, plan.budgets.budgets, blocks, heads, nullptr};
  plan.top.bits = layout.Take<uint32_t>(2 * heads * plan.masks.tile_words());

  plan.pooled = Sized<CudaFlexPooledArgs>(shape_, num_tokens, scale);
  plan.pooled.k_mean = plan.k_mean;
  plan.pooled.query_aware = plan.budgets.query_aware;
  plan.pooled.gamma = parameters_.gamma;
  plan.pooled.masks = plan.masks;

  plan.lists.masks = plan.masks;
  plan.lists.counts = layout.Take<int32_t>(heads * blocks);
  plan.lists.offsets = layout.Take<int64_t>(heads * blocks);
  plan.lists.capacity = std::min(heads * (blocks * (blocks + 1) / 2), kMostEntries);
  plan.lists.blocks = layout.Take<int32_t>(plan.lists.capacity);
  plan.lists.visited = layout.Take<uint64_t>(1);
  plan.lists.overflows = layout.Take<uint32_t>(1);

  plan.scratch_bytes =
      std::max({CudaTailProfileWorkspaceBytes(plan.profile), CudaCoverWorkspaceBytes(plan.cover),
                CudaFlexPooledWorkspaceBytes(plan.pooled)});
  plan.scratch = layout.TakeBytes(plan.scratch_bytes);
  plan.bytes = layout.bytes();
  return plan;
}

size_t FlexPolicy::MemoryBytes(int64_t num_tokens) const {
  return Dense(num_tokens) ? WorkspaceLayout::kAlignment : PlanOf(num_tokens, nullptr).bytes;
}

Status FlexPolicy::Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t /*stream*/) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckWorkspace(memory, memory_bytes, MemoryBytes(num_tokens)));
  num_tokens_ = num_tokens;
  plan_ = Dense(num_tokens) ? Plan() : PlanOf(num_tokens, memory);
  return {};
}

Status FlexPolicy::Stages(const Plan& plan, const CudaPolicyLayer& layer, cudaStream_t stream) const {
  CudaBlockStatsArgs means;
  means.k = layer.k;
  means.total_k = num_tokens_;
  means.num_kv_heads = shape_.num_kv_heads;
  means.head_dim = shape_.head_dim;
  means.stats.k_mean = plan.k_mean;
  CudaTailProfileArgs profile = plan.profile;
  profile.q = layer.q;
  profile.k = layer.k;
  CudaFlexBudgetsArgs budgets = plan.budgets;
  budgets.q = layer.q;
  CudaFlexPooledArgs pooled = plan.pooled;
  pooled.q = layer.q;

  HW_KERNELS_RETURN_IF_ERROR(CudaTailProfile(profile, plan.scratch, plan.scratch_bytes, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaCover(plan.cover, plan.scratch, plan.scratch_bytes, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaBlockStatistics(means, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaFlexBudgets(budgets, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaFlexTop(plan.top, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaFlexMasks(plan.top.bits, plan.masks, stream));
  if (parameters_.tau > 0) {
    HW_KERNELS_RETURN_IF_ERROR(CudaFlexPooled(pooled, plan.scratch, plan.scratch_bytes, stream));
  }
  return CudaListsOfMasks(plan.lists, stream);
}

Status FlexPolicy::Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) {
  if (num_tokens_ == 0) return InvalidArgument("Select() before Begin()");
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", layer.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", layer.k));
  *selection = CudaSelection();
  if (Dense(num_tokens_)) return {};
  HW_KERNELS_RETURN_IF_ERROR(Stages(plan_, layer, stream));
  selection->lists = {shape_.num_q_heads, plan_.lists.counts, plan_.lists.offsets, plan_.lists.blocks};
  selection->visited = plan_.lists.visited;
  selection->overflows = plan_.lists.overflows;
  selection->possible = CudaPossibleBlocks(plan_.masks);
  return {};
}

Status MakeCudaFlex(const reference::FlexParameters& parameters, const CudaPolicyShape& shape,
                    std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(parameters));
  HW_KERNELS_RETURN_IF_ERROR(CheckShape(shape));
  *made = std::make_unique<FlexPolicy>(parameters, shape);
  return {};
}

}  // namespace headwater::kernels
