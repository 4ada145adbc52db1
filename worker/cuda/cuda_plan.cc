#include "worker/cuda/cuda_plan.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/recall_threshold.h"
#include "worker/cuda/cuda_policy_log.h"

namespace headwater {
namespace {

constexpr uint64_t kPartAlignment = 256;
constexpr int64_t kTileRows = 128;
constexpr double kFlopPerCall = 12e12;

uint64_t Bytes(int64_t rows, int64_t width, int64_t size) {
  return static_cast<uint64_t>(rows) * static_cast<uint64_t>(width) * static_cast<uint64_t>(size);
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

uint64_t AlignedCudaPart(uint64_t bytes) {
  return (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
}

uint64_t CudaPatternPlan::total_bytes() const {
  uint64_t total = 0;
  for (const uint64_t part : {k_mean, k_table, search, counts, offsets, blocks, counters}) {
    total += AlignedCudaPart(part);
  }
  return total;
}

uint64_t CudaPolicyPlan::total_bytes() const {
  uint64_t total = 0;
  for (const uint64_t bytes : {policy, workspace, lse, out, counters, rows, mass, curve, part}) {
    total += AlignedCudaPart(bytes);
  }
  return total;
}

uint64_t CudaPrefillPlan::total_bytes() const {
  uint64_t total =
      static_cast<uint64_t>(num_kv) * AlignedCudaPart(kv) + pattern.total_bytes() + policy.total_bytes();
  for (const uint64_t part :
       {tokens, positions, cu_seqlens, hidden, q, logits, bad_rows, workspace, all_q, checkpoints}) {
    total += AlignedCudaPart(part);
  }
  return total;
}

CudaPatternPlan PlanCudaPattern(const ModelConfig& config, int64_t num_tokens) {
  const int64_t kv_heads = config.num_kv_heads, pack = config.num_q_heads / kv_heads;
  int64_t probes_per_tile = 1;  // a tile's probes fill a power of two
  while (probes_per_tile < pack) probes_per_tile *= 2;
  const int64_t blocks = kernels::CudaStatsBlocks(num_tokens);
  const int64_t tiles =
      CeilDiv(std::min(num_tokens, CudaPatternPlan::kMaxQueries), kTileRows / pack) * kv_heads;
  CudaPatternPlan plan;
  plan.k_mean = Bytes(blocks, kv_heads * config.head_dim, sizeof(float));
  plan.k_table = Bytes(kernels::CudaMeanTableRows(num_tokens), kv_heads * config.head_dim, 2);
  plan.search = Bytes(tiles * probes_per_tile, config.head_dim, 2);
  plan.counts = Bytes(tiles, 1, sizeof(int32_t));
  plan.offsets = Bytes(tiles, 1, sizeof(int64_t));
  plan.blocks = Bytes(std::min(CudaPatternPlan::kMaxEntries, tiles * blocks), 1, sizeof(int32_t));
  plan.counters = 16;
  return plan;
}

kernels::CudaPolicyShape CudaPolicyShapeOf(const ModelConfig& config) {
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(config.head_dim)));
  return {config.num_layers, config.num_q_heads, config.num_kv_heads, config.head_dim, scale};
}

CudaPolicyPlan PlanCudaPolicyOfPart(const kernels::CudaPolicy& policy, const ModelConfig& config,
                                    int64_t num_tokens) {
  CudaPolicyPlan plan = PlanCudaPolicy(policy, config, num_tokens);
  plan.out = 0;  // Q's place is another one anyway
  plan.part = kernels::CudaPartBytes(CudaPolicyShapeOf(config), num_tokens);
  return plan;
}

CudaPolicyPlan PlanCudaPolicy(const kernels::CudaPolicy& policy, const ModelConfig& config,
                              int64_t num_tokens, const std::vector<kernels::CudaQueryRange>& ranges,
                              int world_size) {
  CudaPolicyPlan plan = PlanCudaPolicy(policy, config, num_tokens);
  plan.policy = policy.RangesMemoryBytes(num_tokens, ranges);
  plan.counters = CudaPolicyCounters::Bytes(config.num_q_heads, world_size, plan.sampled_rows);
  return plan;
}

CudaPolicyPlan PlanCudaPolicy(const kernels::CudaPolicy& policy, const ModelConfig& config,
                              int64_t num_tokens) {
  const int64_t heads = config.num_q_heads;
  const uint64_t row_bytes = Bytes(heads, kernels::CudaStatsBlocks(num_tokens), sizeof(float));
  CudaPolicyPlan plan;
  plan.sampled_rows = static_cast<int32_t>(std::clamp<uint64_t>(CudaPolicyPlan::kMassBytes / row_bytes,
                                                                CudaPolicyPlan::kSampledRows,
                                                                CudaPolicyPlan::kMostSampledRows));
  const int64_t rows = plan.sampled_rows;
  plan.policy = policy.MemoryBytes(num_tokens);
  plan.workspace = kernels::CudaPolicyAttentionWorkspaceBytes(CudaPolicyShapeOf(config), num_tokens);
  if (policy.wants_lse()) {
    plan.lse = Bytes(num_tokens, heads, sizeof(float));
    plan.out = Bytes(num_tokens, heads * config.head_dim, 2);
  }
  plan.counters = CudaPolicyCounters::Bytes(heads, 1, rows);
  plan.rows = Bytes(rows, 1, sizeof(int64_t));
  plan.mass = static_cast<uint64_t>(rows) * row_bytes;
  plan.curve = Bytes(rows * config.num_kv_heads, kernels::kRecallSteps + 1, sizeof(float));
  return plan;
}

uint64_t AllQueryBytes(const ModelConfig& config, int64_t num_tokens) {
  return Bytes(num_tokens, int64_t{config.num_q_heads} * config.head_dim, 2);
}

CudaPrefillPlan PlanCudaPrefill(const ModelConfig& config, int64_t chunk_tokens, int64_t num_tokens,
                                int64_t num_prompts, const CudaPolicyPlan& policy, int64_t num_rows) {
  if (num_rows == kAllTokens) num_rows = num_tokens;
  const int64_t q_width = int64_t{config.num_q_heads} * config.head_dim;
  const int64_t kv_width = int64_t{config.num_kv_heads} * config.head_dim;
  CudaPrefillPlan plan;
  plan.policy = policy;
  plan.tokens = Bytes(num_tokens, 1, sizeof(int32_t));
  plan.hidden = Bytes(num_rows, config.hidden_size, sizeof(float));
  plan.q = Bytes(num_rows, q_width, 2);
  plan.kv = Bytes(num_tokens, 2 * kv_width, 2);
  plan.num_kv = kCudaKvBuffers;
  plan.logits = Bytes(num_prompts, config.vocab_size, sizeof(float));
  plan.bad_rows = Bytes(kCudaKvBuffers, CeilDiv(num_rows, chunk_tokens), sizeof(int64_t));
  plan.workspace = 4096 + Bytes(num_prompts, 1, 64);
  if (num_prompts > 1) {
    plan.positions = plan.tokens;
    plan.cu_seqlens = Bytes(num_prompts + 1, 1, sizeof(int32_t));
  } else {
    plan.pattern = PlanCudaPattern(config, num_tokens);
    plan.workspace += plan.pattern.counts;  // the attention kernel orders the tiles of lists
  }
  return plan;
}

int64_t QueriesOfCall(double flop_per_pair, int64_t begin, int64_t end, int64_t most,
                      const std::function<int64_t(int64_t)>& fit) {
  const auto from = static_cast<double>(begin);
  const double wanted = std::sqrt(from * from + 2 * kFlopPerCall / flop_per_pair) - from;
  int64_t count = std::min(most, std::max(kLeastQueries, static_cast<int64_t>(wanted) / 128 * 128));
  if (fit) count = fit(count);
  const int64_t left = end - begin;
  if (left <= count) return left;
  if (left - count >= count / 2) return count;
  return left <= most ? left : CeilDiv(CeilDiv(left, 2), 128) * 128;
}

}  // namespace headwater
