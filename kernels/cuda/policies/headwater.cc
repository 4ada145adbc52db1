#include "kernels/cuda/policies/headwater.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/policies/layer_means.h"
#include "kernels/cuda/policies/memory.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kBlocksPerTile = 128, kEntries = int64_t{64} << 20;

int32_t PositionsOf(const CudaPolicyShape& shape) { return 128 / (shape.num_q_heads / shape.num_kv_heads); }

int64_t TilesOf(const CudaPolicyShape& shape, int64_t num_queries) {
  return (num_queries + PositionsOf(shape) - 1) / PositionsOf(shape);
}

Status CheckRanges(int64_t num_tokens, const std::vector<CudaQueryRange>& ranges) {
  int64_t end = 0;
  for (const CudaQueryRange& range : ranges) {
    HW_KERNELS_RETURN_IF_ERROR(CheckQueries(range.first, range.count, num_tokens));
    if (range.count > 0 && range.first >= end && range.first % kStatsBlockTokens == 0) {
      end = range.first + range.count;
      continue;
    }
    return InvalidArgument("a range of " + std::to_string(range.count) + " queries from " +
                           std::to_string(range.first) + " on, behind " + std::to_string(end) +
                           "; some from a later multiple of 128 on are wanted");
  }
  return {};
}

// Blocks that a tile lists whatever is found: the mean over the heads, of the layer where that is most.
int64_t MeanWindow(const HeadwaterParameters& parameters, int64_t heads) {
  int64_t most = parameters.windows.empty() ? parameters.window_blocks * heads : 0;
  for (size_t first = 0; first < parameters.windows.size(); first += static_cast<size_t>(heads)) {
    const auto begin = parameters.windows.begin() + static_cast<std::ptrdiff_t>(first);
    most = std::max(most, std::accumulate(begin, begin + heads, int64_t{0}));
  }
  return (most + heads - 1) / heads;
}

// Room of a tile's list where it may not hold all that there is.
int64_t MostBlocksPerTile(const HeadwaterParameters& parameters, const CudaPolicyShape& shape,
                          int64_t num_tokens) {
  const int64_t segments = TilesOf(shape, num_tokens) * shape.num_kv_heads;
  return std::max(kBlocksPerTile + MeanWindow(parameters, shape.num_kv_heads), kEntries / segments);
}

class HeadwaterCudaPolicy final : public CudaPolicy {
 public:
  HeadwaterCudaPolicy(const HeadwaterParameters& parameters, const CudaPolicyShape& shape)
      : parameters_(parameters), shape_(shape) {}

  size_t MemoryBytes(int64_t num_tokens) const override {
    return RangesMemoryBytes(num_tokens, {{0, num_tokens}});
  }

  size_t RangesMemoryBytes(int64_t num_tokens, const std::vector<CudaQueryRange>& ranges) const override {
    return Lay(num_tokens, ranges, nullptr).bytes;
  }

  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) override {
    HW_KERNELS_RETURN_IF_ERROR(BeginRanges(num_tokens, {{0, num_tokens}}, memory, memory_bytes, stream));
    makes_means_ = true;
    return {};
  }

  Status BeginRanges(int64_t num_tokens, const std::vector<CudaQueryRange>& ranges, void* memory,
                     size_t memory_bytes, cudaStream_t) override {
    num_tokens_ = 0;
    means_layer_ = -1;
    makes_means_ = false;
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX));
    HW_KERNELS_RETURN_IF_ERROR(CheckRanges(num_tokens, ranges));
    HW_KERNELS_RETURN_IF_ERROR(
        CheckPolicyMemory(num_tokens, memory, memory_bytes, RangesMemoryBytes(num_tokens, ranges)));
    parts_ = Lay(num_tokens, ranges, memory);
    num_tokens_ = num_tokens;
    return {};
  }

  CudaBlockStats stats() const override { return parts_.means.stats(); }

  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override {
    *selection = {};
    HW_KERNELS_RETURN_IF_ERROR(CheckLayer("Select()", layer));
    if (num_tokens_ < parameters_.dense_below_tokens) return {};
    const CudaSearchSettings own = OwnSettings(layer.layer);
    const bool dense =
        own.thresholds != nullptr &&
        std::all_of(own.thresholds, own.thresholds + shape_.num_kv_heads, [](float t) { return t == 0; });
    if (dense) return {};
    return Search(layer, own, stream, selection);
  }

  Status Reselect(const CudaPolicyLayer& layer, const CudaSearchSettings& settings, cudaStream_t stream,
                  CudaSelection* selection) override {
    *selection = {};
    HW_KERNELS_RETURN_IF_ERROR(CheckLayer("Reselect()", layer));
    if (num_tokens_ < parameters_.dense_below_tokens) {
      return InvalidArgument("Reselect() for " + std::to_string(num_tokens_) +
                             " tokens, fewer than dense_below_tokens " +
                             std::to_string(parameters_.dense_below_tokens));
    }
    CudaSearchSettings all = OwnSettings(layer.layer);
    if (settings.thresholds != nullptr) all.thresholds = settings.thresholds;
    if (settings.windows != nullptr) all.windows = settings.windows;
    all.forced_density = settings.forced_density;
    return Search(layer, all, stream, selection);
  }

  Status ThresholdsForRecall(const CudaPolicyLayer& layer, const CudaRecallGoal& goal,
                             cudaStream_t stream) override {
    HW_KERNELS_RETURN_IF_ERROR(CheckLayer("ThresholdsForRecall()", layer));
    if (means_layer_ != layer.layer) {
      return InvalidArgument("layer " + std::to_string(layer.layer) + " was not searched; the last one was " +
                             std::to_string(means_layer_));
    }
    CudaRecallThresholdArgs args;
    args.q = layer.q;
    args.k_means = parts_.means.k_table;
    args.queries = RangeOf(layer).queries;
    args.num_tokens = num_tokens_;
    args.num_q_heads = shape_.num_q_heads;
    args.num_kv_heads = shape_.num_kv_heads;
    args.head_dim = shape_.head_dim;
    args.softmax_scale = shape_.softmax_scale;
    args.sink_blocks = parameters_.sink_blocks;
    args.window_blocks = parameters_.window_blocks;
    args.windows = OwnSettings(layer.layer).windows;
    args.dense_last_tokens = DenseLastTokens(args.queries);
    args.goal = goal;
    return CudaThresholdsForRecall(args, stream);
  }

 private:
  struct Range {
    CudaQueryRange queries;
    int32_t* counts;
    int64_t* offsets;
    int32_t* blocks;
    int64_t capacity;
    uint64_t* used;
    uint32_t* overflows;
  };
  struct Parts {
    LayerMeans means{};
    std::vector<Range> ranges;
    char* workspace = nullptr;
    size_t workspace_bytes = 0, bytes = 0;
  };

  const Range& RangeOf(const CudaPolicyLayer& layer) const {
    return parts_.ranges[static_cast<size_t>(layer.range)];
  }

  Status CheckLayer(const char* call, const CudaPolicyLayer& layer) const {
    if (num_tokens_ == 0) return InvalidArgument(std::string(call) + " before Begin()");
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("layer", layer.layer, 0, shape_.num_layers - 1));
    return CheckRange("range", layer.range, 0, static_cast<int64_t>(parts_.ranges.size()) - 1);
  }

  // Of the prompt's last queries, those that end the range.
  int32_t DenseLastTokens(const CudaQueryRange& queries) const {
    const int64_t first_dense = num_tokens_ - parameters_.dense_last_tokens;
    return static_cast<int32_t>(
        std::clamp<int64_t>(queries.first + queries.count - first_dense, 0, queries.count));
  }

  // The layer's part of the tables; null where there is none.
  CudaSearchSettings OwnSettings(int32_t layer) const {
    const int64_t first = int64_t{layer} * shape_.num_kv_heads;
    CudaSearchSettings own;
    if (!parameters_.thresholds.empty()) own.thresholds = parameters_.thresholds.data() + first;
    if (!parameters_.windows.empty()) own.windows = parameters_.windows.data() + first;
    return own;
  }

  Status Search(const CudaPolicyLayer& layer, const CudaSearchSettings& settings, cudaStream_t stream,
                CudaSelection* selection) {
    if (means_layer_ != layer.layer) {
      if (makes_means_) {
        HW_KERNELS_RETURN_IF_ERROR(parts_.means.Make(shape_, num_tokens_, layer, stream));
      } else {
        HW_KERNELS_RETURN_IF_ERROR(parts_.means.MakeTables(shape_, num_tokens_, stream));
      }
    }
    means_layer_ = layer.layer;
    const Range& range = RangeOf(layer);
    CudaSearchArgs args;
    args.q = layer.q;
    args.k_means = parts_.means.k_table;
    args.total_q = range.queries.count;
    args.total_k = num_tokens_;
    args.query_position = static_cast<int32_t>(range.queries.first);
    args.num_q_heads = shape_.num_q_heads;
    args.num_kv_heads = shape_.num_kv_heads;
    args.head_dim = shape_.head_dim;
    args.softmax_scale = shape_.softmax_scale;
    args.threshold = static_cast<float>(parameters_.threshold);
    args.thresholds = settings.thresholds;
    args.windows = settings.windows;
    args.forced_density = settings.forced_density;
    args.sink_blocks = parameters_.sink_blocks;
    args.window_blocks = parameters_.window_blocks;
    args.dense_last_tokens = DenseLastTokens(range.queries);
    args.counts = range.counts;
    args.offsets = range.offsets;
    args.blocks = range.blocks;
    args.capacity = range.capacity;
    args.used = range.used;
    args.overflows = range.overflows;
    HW_KERNELS_RETURN_IF_ERROR(CudaSelectBlocks(args, parts_.workspace, parts_.workspace_bytes, stream));
    selection->lists = {shape_.num_kv_heads, range.counts, range.offsets, range.blocks};
    selection->queries = range.queries;
    selection->correction = parts_.means.correction();
    selection->overflows = range.overflows;
    return {};
  }

  Parts Lay(int64_t num_tokens, const std::vector<CudaQueryRange>& ranges, void* memory) const {
    PolicyMemory from(memory);
    Parts parts;
    if (num_tokens < parameters_.dense_below_tokens) {
      for (const CudaQueryRange& queries : ranges) parts.ranges.push_back({queries, {}, {}, {}, {}, {}, {}});
      return parts;
    }
    parts.means = LayerMeans::Take(shape_, num_tokens, parameters_.correction, &from);
    for (const CudaQueryRange& queries : ranges) {
      const int64_t segments = TilesOf(shape_, queries.count) * shape_.num_kv_heads;
      Range& range = parts.ranges.emplace_back();
      range.queries = queries;
      range.capacity = std::min(
          segments * MostBlocksPerTile(parameters_, shape_, num_tokens),
          static_cast<int64_t>(CudaPossibleBlocks(queries, PositionsOf(shape_))) * shape_.num_kv_heads);
      range.counts = from.Take<int32_t>(segments);
      range.offsets = from.Take<int64_t>(segments);
      range.blocks = from.Take<int32_t>(range.capacity);
      range.used = from.Take<uint64_t>(1);
      range.overflows = from.Take<uint32_t>(1);
    }
    parts.workspace_bytes =
        CudaSearchProbeBytes(num_tokens, shape_.num_q_heads, shape_.num_kv_heads, shape_.head_dim);
    parts.workspace = from.Take<char>(static_cast<int64_t>(parts.workspace_bytes));
    parts.bytes = from.bytes();
    return parts;
  }

  const HeadwaterParameters parameters_;
  const CudaPolicyShape shape_;
  int64_t num_tokens_ = 0;    // 0: no prompt
  int32_t means_layer_ = -1;  // whose means the memory holds
  bool makes_means_ = true;   // else they are in stats() before a layer's Select()
  Parts parts_;
};

}  // namespace

int64_t HeadwaterBlocksPerTile(const HeadwaterParameters& parameters, const CudaPolicyShape& shape,
                               int64_t num_tokens) {
  // A tile sees at most a block more than half of the prompt's, on average.
  const int64_t visible = ((num_tokens + 127) / 128 + 1) / 2 + 1;
  return std::min(visible, MostBlocksPerTile(parameters, shape, num_tokens));
}

Status MakeCudaHeadwater(const HeadwaterParameters& p, const CudaPolicyShape& shape,
                         std::unique_ptr<CudaPolicy>* made) {
  const auto wanted = static_cast<size_t>(shape.num_layers) * static_cast<size_t>(shape.num_kv_heads);
  for (const size_t given : {p.thresholds.size(), p.windows.size()}) {
    if (given == 0 || given == wanted) continue;
    return InvalidArgument(std::to_string(given) + " thresholds or windows; " + std::to_string(wanted) +
                           ", one for each layer and KV head, are wanted");
  }
  for (size_t i = 0; i < p.thresholds.size(); ++i) {
    if (p.thresholds[i] >= 0) continue;
    return InvalidArgument("threshold " + std::to_string(i) + " is " + NumberText(p.thresholds[i]) +
                           "; 0 or more is wanted");
  }
  for (size_t i = 0; i < p.windows.size(); ++i) {
    if (p.windows[i] >= 1 && p.windows[i] <= 1 << 20) continue;
    return InvalidArgument("window " + std::to_string(i) + " is " + std::to_string(p.windows[i]) +
                           " blocks; 1 to 1048576 is wanted");
  }
  if (!(p.threshold > 0 && p.threshold <= 1)) {
    return InvalidArgument("threshold is " + NumberText(p.threshold) + "; over 0 and at most 1 is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("sink_blocks", p.sink_blocks, 0, 1 << 20));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("window_blocks", p.window_blocks, 1, 1 << 20));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("dense_last_tokens", p.dense_last_tokens, 0, INT32_MAX));
  *made = std::make_unique<HeadwaterCudaPolicy>(p, shape);
  return {};
}

}  // namespace headwater::kernels
