#include "worker/cuda/cuda_pattern.h"

#include <algorithm>
#include <utility>

#include "base/status_macros.h"
#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/pattern.h"
#include "model/cuda/device_buffer.h"
#include "model/kernel_status.h"

namespace headwater {
namespace {

constexpr int64_t kBlock = kernels::kStatsBlockTokens;
constexpr int64_t kTileRows = 128;
constexpr int64_t kDenseLastTokens = 32;

}  // namespace

CudaPattern::CudaPattern(const ModelConfig& config, const kernels::ProbeParameters& probe, int64_t num_tokens,
                         int num_sms, char* memory)
    : config_(config),
      probe_(probe),
      num_tokens_(num_tokens),
      num_sms_(num_sms),
      plan_(PlanCudaPattern(config, num_tokens)) {
  const auto take = [&](uint64_t bytes) { return std::exchange(memory, memory + AlignedCudaPart(bytes)); };
  k_mean_ = reinterpret_cast<float*>(take(plan_.k_mean));
  k_table_ = take(plan_.k_table);
  search_ = take(plan_.search);
  counts_ = reinterpret_cast<int32_t*>(take(plan_.counts));
  offsets_ = reinterpret_cast<int64_t*>(take(plan_.offsets));
  blocks_ = reinterpret_cast<int32_t*>(take(plan_.blocks));
  counters_ = take(plan_.counters);
}

kernels::CudaBlockStats CudaPattern::stats() const {
  kernels::CudaBlockStats stats;
  stats.k_mean = k_mean_;
  return stats;
}

absl::Status CudaPattern::StartLayer(cudaStream_t stream) {
  kernels::CudaMeanTablesArgs args;
  args.k_mean = k_mean_;
  args.k_table = k_table_;
  args.total_k = num_tokens_;
  args.num_kv_heads = config_.num_kv_heads;
  args.head_dim = config_.head_dim;
  return FromKernels(kernels::CudaMeanTables(args, stream), "means of K");
}

absl::Status CudaPattern::Select(int64_t begin, kernels::CudaAttentionArgs* args, CudaPatternCounts* counts,
                                 cudaStream_t stream) {
  args->total_k = num_tokens_;
  args->query_position = static_cast<int32_t>(begin);
  kernels::CudaSearchArgs search = SearchArgs();
  search.q = args->q;
  search.total_q = args->total_q;
  search.query_position = args->query_position;
  search.dense_last_tokens = DenseLastTokens(begin + args->total_q);
  HW_RETURN_IF_ERROR(
      FromKernels(kernels::CudaSelectBlocks(search, search_, plan_.search, stream), "pattern search"));
  HW_RETURN_IF_ERROR(FromKernels(kernels::CudaStoreToHost(counters_, counts, 12, stream), "pattern search"));
  args->lists.num_lists = config_.num_kv_heads;
  args->lists.counts = counts_;
  args->lists.offsets = offsets_;
  args->lists.blocks = blocks_;
  return absl::OkStatus();
}

kernels::CudaSearchArgs CudaPattern::SearchArgs() const {
  kernels::CudaSearchArgs search;
  search.q = search.k_means = k_table_;
  search.total_q = search.total_k = num_tokens_;
  search.num_q_heads = config_.num_q_heads;
  search.num_kv_heads = config_.num_kv_heads;
  search.head_dim = config_.head_dim;
  search.softmax_scale = CudaPolicyShapeOf(config_).softmax_scale;
  search.threshold = static_cast<float>(probe_.threshold);
  search.forced_density = probe_.forced_density;
  search.counts = counts_;
  search.offsets = offsets_;
  search.blocks = blocks_;
  search.capacity = static_cast<int64_t>(plan_.blocks / sizeof(int32_t));
  search.used = reinterpret_cast<uint64_t*>(counters_);
  search.overflows = reinterpret_cast<uint32_t*>(counters_ + 8);
  return search;
}

int64_t CudaPattern::QueriesOfSearch(int64_t count) const {
  const int64_t whole = kernels::CudaSearchWaves(SearchArgs(), num_sms_, count) / 128 * 128;
  return whole > 0 && whole <= std::min(CudaPatternPlan::kMaxQueries, 2 * count) ? whole : count;
}

CudaPattern::Blocks CudaPattern::CountBlocks(int64_t begin, int64_t count,
                                             const CudaPatternCounts& counts) const {
  const int64_t positions = TilePositions(), dense_last = DenseLastTokens(begin + count);
  const int64_t first_dense =
      dense_last == 0 ? count : std::max<int64_t>(0, count - dense_last) / positions * positions;
  int64_t possible = 0, dense = 0, most = 0;
  for (int64_t at = 0; at < count; at += positions) {
    most = (begin + std::min(at + positions, count) + kBlock - 1) / kBlock;
    possible += most;
    if (at >= first_dense) dense += most;
  }
  const auto heads = static_cast<uint64_t>(config_.num_kv_heads);
  // Which tiles overflowed is not known here: the last ones see most.
  const uint64_t overflowed = uint64_t{counts.overflows} * static_cast<uint64_t>(most);
  return {counts.entries + static_cast<uint64_t>(dense) * heads + overflowed,
          static_cast<uint64_t>(possible) * heads};
}

int64_t CudaPattern::TilePositions() const {
  return kTileRows / (config_.num_q_heads / config_.num_kv_heads);
}

int32_t CudaPattern::DenseLastTokens(int64_t end) const {
  return static_cast<int32_t>(
      std::clamp<int64_t>(end - (num_tokens_ - kDenseLastTokens), 0, kDenseLastTokens));
}

}  // namespace headwater
