#include "kernels/cuda/policies/vertical_slash.h"

#include <algorithm>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/policies/range_policy.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMeanRanges = 512, kMeanColumns = 4096;  // of a tile

// Sum over tiles t of min(most, each * (t + 1)).
int64_t SumOverTiles(int64_t tiles, int64_t most, int64_t each) {
  const int64_t growing = std::min(most / each, tiles);
  return growing * (growing + 1) / 2 * each + (tiles - growing) * most;
}

}  // namespace

struct VerticalSlashPolicy::Plan {
  CudaTailProfileArgs profile;
  void* workspace;
  size_t workspace_bytes;
  CudaChooseArgs choose;
  CudaMergeVerticalSlashArgs merge;
};

size_t VerticalSlashPolicy::MakePlan(int64_t num_tokens, void* memory, Plan* plan) const {
  const int64_t heads = shape_.num_q_heads, tiles = CudaRangeTiles(num_tokens);
  int64_t most_columns = 0, ranges = 0, columns = 0;
  for (int32_t head = 0; head < heads; ++head) {
    const int64_t of_head = VerticalSlashColumns(parameters_, head, num_tokens);
    most_columns = std::max(most_columns, of_head);
    columns += SumOverTiles(tiles, of_head, kRangeRows);
    ranges += SumOverTiles(tiles, VerticalSlashDistances(parameters_, head, num_tokens), 1);
  }
  PolicyMemory from(memory);
  CudaTailProfileArgs& profile = plan->profile;
  profile = {};
  profile.num_tokens = num_tokens;
  profile.num_q_heads = shape_.num_q_heads;
  profile.num_kv_heads = shape_.num_kv_heads;
  profile.head_dim = shape_.head_dim;
  profile.softmax_scale = shape_.softmax_scale;
  profile.rows = static_cast<int32_t>(std::min(parameters_.last_q, num_tokens));
  profile.factor = 1;
  profile.vertical = from.Take<float>(heads * num_tokens);
  profile.slash = from.Take<float>(heads * num_tokens);
  plan->workspace_bytes = CudaTailProfileWorkspaceBytes(profile);
  plan->workspace = from.Take<char>(static_cast<int64_t>(plan->workspace_bytes));

  CudaChosen chosen;
  chosen.column_stride = most_columns;
  chosen.columns = from.Take<int32_t>(heads * most_columns);
  chosen.column_totals = from.Take<int32_t>(heads);
  chosen.distances = from.Take<CudaDistanceWord>(heads * CudaDistanceWords(num_tokens));
  plan->choose = {profile.vertical, profile.slash, num_tokens, shape_.num_q_heads, chosen};

  CudaMergeVerticalSlashArgs& merge = plan->merge;
  merge = {};
  merge.chosen = chosen;
  merge.num_tokens = num_tokens;
  merge.num_heads = shape_.num_q_heads;
  merge.range_counts = from.Take<int32_t>(heads * tiles);
  merge.column_counts = from.Take<int32_t>(heads * tiles);
  merge.range_offsets = from.Take<int64_t>(heads * tiles);
  merge.column_offsets = from.Take<int64_t>(heads * tiles);
  merge.range_capacity = std::min(ranges, kMeanRanges * heads * tiles);
  merge.column_capacity = std::min(columns, kMeanColumns * heads * tiles);
  merge.ranges = from.Take<CudaKeyRange>(merge.range_capacity);
  merge.columns = from.Take<int32_t>(merge.column_capacity);
  merge.visited = from.Take<uint64_t>(1);
  merge.overflows = from.Take<uint32_t>(1);
  return from.bytes();
}

size_t VerticalSlashPolicy::MemoryBytes(int64_t num_tokens) const {
  if (num_tokens < 1) return 0;
  Plan plan;
  return MakePlan(num_tokens, nullptr, &plan);
}

Status VerticalSlashPolicy::Begin(int64_t num_tokens, void* memory, size_t memory_bytes,
                                  cudaStream_t /*stream*/) {
  memory_ = nullptr;
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX - 256));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyMemory(num_tokens, memory, memory_bytes, MemoryBytes(num_tokens)));
  num_tokens_ = num_tokens;
  memory_ = memory;
  return {};
}

Status VerticalSlashPolicy::Select(const CudaPolicyLayer& layer, cudaStream_t stream,
                                   CudaSelection* selection) {
  if (memory_ == nullptr) return InvalidArgument("Select() without a Begin() that was OK");
  Plan plan;
  MakePlan(num_tokens_, memory_, &plan);
  plan.profile.q = layer.q;
  plan.profile.k = layer.k;
  HW_KERNELS_RETURN_IF_ERROR(CudaTailProfile(plan.profile, plan.workspace, plan.workspace_bytes, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaChooseVerticalSlash(parameters_, plan.choose, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaMergeVerticalSlash(plan.merge, stream));
  const CudaMergeVerticalSlashArgs& m = plan.merge;
  ranges_ = {};
  ranges_.num_lists = shape_.num_q_heads;
  ranges_.range_counts = m.range_counts;
  ranges_.range_offsets = m.range_offsets;
  ranges_.ranges = m.ranges;
  ranges_.column_counts = m.column_counts;
  ranges_.column_offsets = m.column_offsets;
  ranges_.columns = m.columns;
  *selection = {};
  selection->ranges = &ranges_;
  selection->visited = m.visited;
  selection->overflows = m.overflows;
  selection->possible = PossibleSteps(num_tokens_, shape_.num_q_heads);
  return {};
}

Status MakeCudaVerticalSlash(const reference::VerticalSlashParameters& parameters,
                             const CudaPolicyShape& shape, std::unique_ptr<CudaPolicy>* made) {
  const reference::VerticalSlashParameters& p = parameters;
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyShape(shape));
  if (p.budgets.size() != 1 && static_cast<int64_t>(p.budgets.size()) != shape.num_q_heads) {
    return InvalidArgument("budgets has " + std::to_string(p.budgets.size()) + " entries; 1 or the " +
                           std::to_string(shape.num_q_heads) + " query heads are wanted");
  }
  for (const reference::VerticalSlashBudget& budget : p.budgets) {
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("n_vertical", budget.n_vertical, 1, kMostPatternTokens));
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("n_slash", budget.n_slash, 1, kMostPatternTokens));
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("last_q", p.last_q, 1, kMostPatternTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("forced_verticals", p.forced_verticals, 0, kMostPatternTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("forced_locals", p.forced_locals, 1, kMostPatternTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("least_verticals", p.least_verticals, 1, kMostPatternTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("least_slashes", p.least_slashes, 1, kMostPatternTokens));
  if (p.last_q > kMostTailRows) {
    return {StatusCode::kUnimplemented,
            "last_q " + std::to_string(p.last_q) + "; 1 to " + std::to_string(kMostTailRows) + " are known"};
  }
  *made = std::make_unique<VerticalSlashPolicy>(parameters, shape);
  return {};
}

}  // namespace headwater::kernels
