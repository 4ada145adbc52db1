#include "worker/cuda/cuda_policy_log.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/status_macros.h"
#include "kernels/cuda/layer_ops.h"
#include "model/kernel_status.h"
#include "worker/cuda/cuda_plan.h"

namespace headwater {
namespace {

constexpr int64_t kRows = CudaPolicyPlan::kMostSampledRows;
constexpr int64_t kOwnOffset = kRows * static_cast<int64_t>(sizeof(int64_t));
constexpr int64_t kCountersOffset = kOwnOffset + 16;

// At most 1: lists of single keys are read in steps of 64, which may be more than all that there is.
double Ratio(uint64_t part, uint64_t whole) {
  return part >= whole ? 1 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

absl::Status CudaPolicyLog::Init(const ModelConfig& config, std::string policy, int rank, int world_size) {
  num_q_heads_ = config.num_q_heads;
  num_kv_heads_ = config.num_kv_heads;
  rank_ = rank;
  world_size_ = world_size;
  const auto counters = static_cast<int64_t>(CudaPolicyCounters::Bytes(num_q_heads_, world_size, kRows));
  stride_ = (kCountersOffset + counters + 63) / 64 * 64;
  layers_.resize(static_cast<size_t>(config.num_layers));
  report_.set_policy(std::move(policy));
  HW_ASSIGN_OR_RETURN(
      pinned_, DeviceBuffer::AllocatePinned(static_cast<uint64_t>(config.num_layers * stride_), "a report"));
  std::fill_n(pinned_.data(), pinned_.bytes(), 0);
  return absl::OkStatus();
}

CudaPolicyLog::Own* CudaPolicyLog::OwnOf(int32_t layer) const { return Pinned<Own>(layer, kOwnOffset); }

CudaPolicyCounters CudaPolicyLog::CountersOf(int32_t layer) const {
  return {Pinned<char>(layer, kCountersOffset), num_q_heads_, world_size_};
}

uint64_t CudaPolicyLog::Visited(int32_t layer, int32_t list) const {
  const CudaPolicyCounters counters = CountersOf(layer);
  uint64_t visited = 0;
  for (int rank = 0; rank < world_size_; ++rank) visited += counters.slot(rank).visited[list];
  return visited;
}

absl::Status CudaPolicyLog::Copy(int32_t layer, const CudaPolicyCounters& counters,
                                 const kernels::CudaSelection& ranges, cudaStream_t stream) {
  const auto copy = [&](void* to, const void* from, size_t bytes) {
    if (from == nullptr || bytes == 0) return absl::OkStatus();
    return FromKernels(kernels::CudaStoreToHost(from, to, static_cast<int64_t>(bytes), stream), "a report");
  };
  const Layer& of = layers_[static_cast<size_t>(layer)];
  if (of.kind == Layer::Kind::kRanges) {
    Own* const own = OwnOf(layer);
    HW_RETURN_IF_ERROR(copy(&own->visited, ranges.visited, sizeof(own->visited)));
    return copy(&own->overflows, ranges.overflows, sizeof(own->overflows));
  }
  if (of.kind != Layer::Kind::kLists) return absl::OkStatus();
  return copy(CountersOf(layer).slots, counters.slots,
              CudaPolicyCounters::Bytes(num_q_heads_, world_size_, of.rows));
}

std::vector<GroupMeasure> CudaPolicyLog::Groups(int32_t layer) const {
  const Layer& of = layers_[static_cast<size_t>(layer)];
  const CudaPolicyCounters counters = CountersOf(layer);
  const int32_t lists = of.num_lists / num_kv_heads_, pack = num_q_heads_ / num_kv_heads_;
  const absl::Span<const float> recalls(counters.recall, static_cast<size_t>(of.rows * num_q_heads_));
  std::vector<GroupMeasure> groups(static_cast<size_t>(num_kv_heads_));
  for (int32_t head = 0; head < num_kv_heads_; ++head) {
    uint64_t visited = 0;
    for (int32_t list = head * lists; list < (head + 1) * lists; ++list) visited += Visited(layer, list);
    GroupMeasure& group = groups[static_cast<size_t>(head)];
    group.density = Ratio(visited, of.possible * static_cast<uint64_t>(lists));
    group.enough = counters.enough[head];
    group.recall = EstimateRecall(recalls, num_q_heads_, head * pack, pack);
  }
  return groups;
}

void CudaPolicyLog::TakeGroups(int32_t layer) {
  const Layer& of = layers_[static_cast<size_t>(layer)];
  const CudaPolicyCounters counters = CountersOf(layer);
  const std::vector<GroupMeasure> measures = Groups(layer);
  const int32_t lists = of.num_lists / num_kv_heads_;
  uint32_t overflows = 0;
  for (int rank = 0; rank < world_size_; ++rank) overflows += *counters.slot(rank).overflows;
  for (int32_t head = 0; head < num_kv_heads_; ++head) {
    const auto i = static_cast<size_t>(head);
    v1::AttentionGroup* const group = report_.add_groups();
    group->set_layer(static_cast<uint32_t>(layer));
    group->set_kv_head(static_cast<uint32_t>(head));
    group->set_density(measures[i].density);
    if (of.rows > 0) {
      group->set_recall(measures[i].recall.mean);
      group->set_recall_p1(measures[i].recall.p1);
    }
    GroupTiles tiles{0, of.usual_dense_tiles, overflows};
    for (int rank = 0; rank < world_size_; ++rank) {
      const uint32_t* const dense_tiles = counters.slot(rank).dense_tiles;
      tiles.dense += std::accumulate(dense_tiles + head * lists, dense_tiles + (head + 1) * lists, 0u);
    }
    ReportLists(i < of.outcomes.size() ? &of.outcomes[i] : nullptr, tiles, group);
  }
}

CudaPolicyLog::Read CudaPolicyLog::Take(int32_t layer) {
  const Layer& of = layers_[static_cast<size_t>(layer)];
  if (of.kind == Layer::Kind::kNone) return {};
  Read read;
  read.by_policy = !of.by_loop;
  if (of.kind == Layer::Kind::kLists) {
    const CudaPolicyCounters counters = CountersOf(layer);
    uint64_t visited = 0;
    for (int32_t list = 0; list < of.num_lists; ++list) visited += Visited(layer, list);
    read.density = Ratio(visited, of.possible * static_cast<uint64_t>(of.num_lists));
    read.overflows = *counters.slot(rank_).overflows;
    const int64_t count = int64_t{of.rows} * num_q_heads_;
    for (int64_t i = 0; i < count; ++i) {
      recalls_.push_back(counters.recall[i]);
      recall_sum_ += static_cast<double>(counters.recall[i]);
    }
    report_.set_sampled_queries(std::max(report_.sampled_queries(), static_cast<uint32_t>(of.rows)));
    TakeGroups(layer);
    return read;
  }
  v1::AttentionGroup* const whole = report_.add_groups();
  whole->set_layer(static_cast<uint32_t>(layer));
  if (of.kind == Layer::Kind::kRanges) {
    read.density = Ratio(OwnOf(layer)->visited, of.possible);
    read.overflows = OwnOf(layer)->overflows;
    ReportRanges(read.overflows, whole);
  } else {
    ReportDense(whole);
  }
  whole->set_density(read.density);
  return read;
}

v1::AttentionReport CudaPolicyLog::Report() const {
  v1::AttentionReport report = report_;
  if (!recalls_.empty()) {
    report.set_recall_mean(recall_sum_ / static_cast<double>(recalls_.size()));
    report.set_recall_p1(FirstPercentile(recalls_));
  }
  return report;
}

}  // namespace headwater
