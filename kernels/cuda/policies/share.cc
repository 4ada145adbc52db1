#include "kernels/cuda/policies/share.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/top_share.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr bool SameRole(sm90::ShareRole ours, reference::ShareRole theirs) {
  return static_cast<int>(ours) == static_cast<int>(theirs);
}
static_assert(SameRole(sm90::ShareRole::kQueryAware, reference::ShareRole::kQueryAware) &&
              SameRole(sm90::ShareRole::kPivot, reference::ShareRole::kPivot) &&
              SameRole(sm90::ShareRole::kShared, reference::ShareRole::kShared) &&
              SameRole(sm90::ShareRole::kOwn, reference::ShareRole::kOwn));

Status CheckParameters(const reference::ShareParameters& p, const CudaPolicyShape& shape) {
  const std::pair<const char*, double> shares[] = {
      {"similarity", p.similarity}, {"fallback", p.fallback}, {"query_aware", p.query_aware}};
  for (const auto& [name, value] : shares) {
    if (!(value >= 0 && value <= 1)) {
      return InvalidArgument(std::string(name) + " is " + NumberText(value) + "; 0 to 1 is wanted");
    }
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("pivots_per_layer", p.pivots_per_layer, 0, 65536));
  HW_KERNELS_RETURN_IF_ERROR(CheckFlexPlan(p.Flex(), shape));
  if (p.compat_ratio) return {StatusCode::kUnimplemented, "SharePrefill with compat_ratio on a GPU"};
  if (shape.num_q_heads <= sm90::kMostShareHeads) return {};
  return {StatusCode::kUnimplemented, "SharePrefill of " + std::to_string(shape.num_q_heads) +
                                          " query heads; at most " + std::to_string(sm90::kMostShareHeads) +
                                          " are known"};
}

Status CheckClusters(const reference::ShareClusters& clusters, const CudaPolicyShape& shape) {
  for (const auto& [where, cluster] : clusters.cluster_of) {
    const auto [layer, head] = where;
    if (layer < 0 || layer >= shape.num_layers || head < 0 || head >= shape.num_q_heads) {
      return InvalidArgument("cluster " + std::to_string(cluster) + " has head " + std::to_string(head) +
                             " of layer " + std::to_string(layer) + "; there are " +
                             std::to_string(shape.num_q_heads) + " heads in " +
                             std::to_string(shape.num_layers) + " layers");
    }
  }
  return {};
}

ShareSlots SlotsOf(const ShareWithClusters& parameters, const CudaPolicyShape& shape) {
  ShareSlots slots;
  if (parameters.share.pivots_per_layer > 0) {
    slots.count = std::min(parameters.share.pivots_per_layer, shape.num_q_heads);
    return slots;
  }
  const reference::ShareClusters& clusters = parameters.clusters;
  slots.of_head.resize(static_cast<size_t>(shape.num_layers));
  slots.wanted.resize(slots.of_head.size());
  std::map<int32_t, int32_t> slot_of;                         // by cluster
  std::vector<int32_t> last;                                  // layer of each slot's heads
  for (const auto& [where, cluster] : clusters.cluster_of) {  // layers go up
    if (clusters.shareable.count(cluster) == 0) continue;
    const auto [layer, head] = where;
    const int32_t slot = slot_of.try_emplace(cluster, static_cast<int32_t>(slot_of.size())).first->second;
    std::vector<int32_t>& of_layer = slots.of_head[static_cast<size_t>(layer)];
    of_layer.resize(static_cast<size_t>(shape.num_q_heads), -1);
    of_layer[static_cast<size_t>(head)] = slot;
    last.resize(slot_of.size());
    last[static_cast<size_t>(slot)] = layer;
  }
  slots.count = static_cast<int32_t>(slot_of.size());
  for (size_t layer = 0; layer < slots.of_head.size(); ++layer) {
    std::vector<int32_t>& wanted = slots.wanted[layer];
    for (const int32_t slot : slots.of_head[layer]) {
      if (slot >= 0 && last[static_cast<size_t>(slot)] > static_cast<int32_t>(layer)) wanted.push_back(slot);
    }
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  }
  return slots;
}

}  // namespace

SharePolicy::SharePolicy(const ShareWithClusters& parameters, const CudaPolicyShape& shape)
    : parameters_(parameters.share),
      flex_(parameters.share.Flex()),
      shape_(shape),
      slots_(SlotsOf(parameters, shape)) {}

bool SharePolicy::wants_lse() const {
  return std::any_of(slots_.wanted.begin(), slots_.wanted.end(),
                     [](const std::vector<int32_t>& slots) { return !slots.empty(); });
}

SharePolicy::Plan SharePolicy::PlanOf(int64_t num_tokens, void* memory) const {
  PolicyMemory from(memory);
  Plan plan;
  const int64_t blocks = (num_tokens + 127) / 128, slots = slots_.count;
  const size_t map_bytes = slots == 0 ? 0 : static_cast<size_t>(blocks * blocks) * sizeof(float);
  plan.flex = MakeFlexPlan(flex_, shape_, num_tokens, map_bytes, &from);
  sm90::SharePivots& pivots = plan.pivots;
  pivots.count = slots_.count;
  pivots.layers = from.Take<int32_t>(slots);
  pivots.fresh = from.Take<int32_t>(slots);
  pivots.fresh_flags = from.Take<uint8_t>(slots);
  pivots.scores = from.Take<float>(2 * slots * blocks);
  pivots.ratios = from.Take<double>(slots);
  pivots.patterns = {nullptr, num_tokens, slots_.count, 128};
  pivots.patterns.words = static_cast<uint32_t*>(from.TakeBytes(pivots.patterns.bytes()));
  plan.heads = from.Take<sm90::ShareHead>(shape_.num_q_heads);
  plan.dense = from.Take<uint8_t>(shape_.num_q_heads);
  plan.flex.lists.dense_lists = plan.dense;
  if (parameters_.pivots_per_layer > 0) plan.lse_ln = from.Take<float>(num_tokens * shape_.num_q_heads);
  plan.bytes = from.bytes();
  return plan;
}

size_t SharePolicy::MemoryBytes(int64_t num_tokens) const {
  if (num_tokens < 1 || num_tokens > kMostTokens) return 0;
  return PlanOf(num_tokens, nullptr).bytes;
}

Status SharePolicy::Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) {
  num_tokens_ = 0;
  next_layer_ = 0;
  finish_due_ = false;
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyMemory(num_tokens, memory, memory_bytes, MemoryBytes(num_tokens)));
  if (num_tokens > kMostTokens) {
    return {StatusCode::kUnimplemented, "SharePrefill of " + std::to_string(num_tokens) +
                                            " tokens; at most " + std::to_string(kMostTokens) + " are known"};
  }
  plan_ = PlanOf(num_tokens, memory);
  if (slots_.count > 0) {
    const auto bytes = static_cast<size_t>(slots_.count) * sizeof(int32_t);
    HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(plan_.pivots.layers, 0xFF, bytes, stream));
  }
  num_tokens_ = num_tokens;
  return {};
}

sm90::ShareParams SharePolicy::Params(int32_t layer) const {
  const FlexPlan& flex = plan_.flex;
  sm90::ShareParams p{};
  p.query_aware = flex.budgets.query_aware;
  p.scores = flex.top.scores;
  p.budgets = flex.budgets.budgets;
  p.num_blocks = flex.top.num_blocks;
  p.num_heads = shape_.num_q_heads;
  p.layer = layer;
  p.pivots_per_layer = parameters_.pivots_per_layer;
  p.least_budget = static_cast<int32_t>(std::min(flex_.MinBlocks(), p.num_blocks));
  p.nan_rule = parameters_.compat.nan_rule;
  p.similarity = parameters_.similarity;
  p.fallback = parameters_.fallback;
  p.pivots = plan_.pivots;
  p.heads = plan_.heads;
  p.dense = plan_.dense;
  std::fill(std::begin(p.slots), std::end(p.slots), -1);
  if (p.pivots_per_layer == 0) {
    const std::vector<int32_t>& slots = slots_.of_head[static_cast<size_t>(layer)];
    std::copy(slots.begin(), slots.end(), p.slots);
  }
  return p;
}

CudaMassProblem SharePolicy::Problem(const CudaPolicyLayer& layer) const {
  return {layer.q,
          layer.k,
          num_tokens_,
          shape_.num_q_heads,
          shape_.num_kv_heads,
          shape_.head_dim,
          shape_.softmax_scale};
}

// Of a pivot that this layer may have made; without one the kernels leave at once.
Status SharePolicy::MakePattern(const CudaPolicyLayer& layer, int32_t slot, const float* lse_ln,
                                cudaStream_t stream) const {
  const sm90::SharePivots& pivots = plan_.pivots;
  auto* const average = static_cast<float*>(plan_.flex.scratch);
  CudaBlockMassArgs mass;
  mass.problem = Problem(layer);
  mass.lse_ln = lse_ln;
  mass.heads = pivots.fresh + slot;
  mass.num_heads = 1;
  mass.average = average;
  CudaTopShareArgs top;
  top.scores = average;
  top.masks = pivots.patterns;
  top.first_list = slot;
  top.num_lists = 1;
  top.num_rows = top.masks.tiles();
  top.rule = CudaTopShareRule::kUntilSum;
  top.shares = &parameters_.gamma;
  top.num_shares = 1;
  top.flags = pivots.fresh_flags + slot;
  HW_KERNELS_RETURN_IF_ERROR(CudaBlockMass(mass, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaTopShareRows(top, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(
      sm90::LaunchShareRatio(pivots, slot, average, plan_.flex.lists.masks, stream));
  return {};
}

Status SharePolicy::MakePatternsOfLayer(const CudaPolicyLayer& layer, cudaStream_t stream) const {
  CudaLogSumExpArgs lse;
  lse.problem = Problem(layer);
  lse.heads = plan_.pivots.fresh;
  lse.num_heads = slots_.count;
  lse.lse_ln = plan_.lse_ln;
  // Ratios are of the pivots' own columns and offsets.
  HW_KERNELS_RETURN_IF_ERROR(FlexColumnsAndOffsets(plan_.flex, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaLogSumExp(lse, stream));
  for (int32_t slot = 0; slot < slots_.count; ++slot) {
    HW_KERNELS_RETURN_IF_ERROR(MakePattern(layer, slot, plan_.lse_ln, stream));
  }
  return {};
}

Status SharePolicy::Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) {
  *selection = {};
  if (num_tokens_ == 0) return InvalidArgument("Select() before Begin()");
  if (finish_due_)
    return InvalidArgument("Select() before Finish() of layer " + std::to_string(next_layer_ - 1));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("layer", layer.layer, next_layer_, shape_.num_layers - 1));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", layer.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", layer.k));
  const sm90::ShareParams params = Params(layer.layer);
  HW_KERNELS_RETURN_IF_ERROR(FlexScores(plan_.flex, layer, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSharePivots(params, stream));
  if (params.pivots_per_layer > 0) HW_KERNELS_RETURN_IF_ERROR(MakePatternsOfLayer(layer, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchShareSharers(params, stream));
  HW_KERNELS_RETURN_IF_ERROR(FlexColumnsAndOffsets(plan_.flex, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(
      sm90::LaunchSharePatterns(plan_.heads, plan_.pivots.patterns, plan_.flex.lists.masks, stream));
  HW_KERNELS_RETURN_IF_ERROR(FlexPooledBlocks(plan_.flex, layer, stream));
  HW_KERNELS_RETURN_IF_ERROR(CudaListsOfMasks(plan_.flex.lists, stream));
  *selection = SelectionOf(plan_.flex.lists);
  next_layer_ = layer.layer + 1;
  finish_due_ = params.pivots_per_layer == 0 && !slots_.wanted[static_cast<size_t>(layer.layer)].empty();
  return {};
}

Status SharePolicy::Finish(const CudaPolicyLayer& layer, const float* lse_ln, cudaStream_t stream) {
  if (layer.layer != next_layer_ - 1) {
    return InvalidArgument("Finish() of layer " + std::to_string(layer.layer) + "; the last selected is " +
                           std::to_string(next_layer_ - 1));
  }
  if (!finish_due_) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", layer.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", layer.k));
  for (const int32_t slot : slots_.wanted[static_cast<size_t>(layer.layer)]) {
    HW_KERNELS_RETURN_IF_ERROR(MakePattern(layer, slot, lse_ln, stream));
  }
  finish_due_ = false;
  return {};
}

Status MakeCudaShare(const ShareWithClusters& parameters, const CudaPolicyShape& shape,
                     std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(parameters.share, shape));
  if (parameters.share.pivots_per_layer == 0) {
    HW_KERNELS_RETURN_IF_ERROR(CheckClusters(parameters.clusters, shape));
  }
  *made = std::make_unique<SharePolicy>(parameters, shape);
  return {};
}

}  // namespace headwater::kernels
