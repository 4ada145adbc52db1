// What benchmarks of a whole prefill share: jobs of one rank, and a receiver that costs nothing.
#ifndef HW_BENCH_PREFILL_JOB_H_
#define HW_BENCH_PREFILL_JOB_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "kernels/pattern/policy.h"
#include "kvtransfer/discarding_sender.h"
#include "model/config.h"
#include "model/kernel_status.h"
#include "worker/policy_tables.h"
#include "worker/prefill.h"
#include "worker/quality.h"

namespace headwater {

struct BenchPolicy {
  std::string name = "dense";
  double density = 0;                        // forced; 0: what the policy finds
  std::map<std::string, double> parameters;  // others, by name
};

// The only place where a benchmark's flags become a policy's parameters. INVALID_ARGUMENT names --policy.
inline absl::StatusOr<std::shared_ptr<const kernels::PatternPolicy>> MakeBenchPolicy(
    const BenchPolicy& wanted, const PolicyTables& tables = {}, const QualityBound& quality = {}) {
  std::map<std::string, double> given = wanted.parameters;
  if (wanted.density > 0) given["density"] = wanted.density;
  kernels::PolicyParameters parameters;
  HW_RETURN_IF_ERROR(FromKernels(kernels::ParsePolicyParameters(wanted.name, given, &parameters),
                                 absl::StrCat("--policy=", wanted.name)));
  AddPolicyTables(tables, given, &parameters);
  AddBound(quality, given, &parameters);
  return std::shared_ptr<const kernels::PatternPolicy>(
      kernels::MakePolicy(wanted.name, std::move(parameters)));
}

// The same ones every time.
inline std::vector<int32_t> RandomPrompt(const ModelConfig& config, int64_t num_tokens) {
  std::vector<int32_t> tokens;
  std::mt19937 random(1);
  for (int64_t i = 0; i < num_tokens; ++i) {
    tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(config.vocab_size)));
  }
  return tokens;
}

// One rank, blocks of 256 tokens; without a memory plan.
inline absl::StatusOr<PrefillJob> MakeBenchJob(const ModelConfig& config, std::vector<int32_t> tokens,
                                               v1::KvDtype dtype, const BenchPolicy& policy,
                                               const PolicyTables& tables = {},
                                               const QualityBound& quality = {}) {
  constexpr uint32_t kBlockTokens = 256;
  const auto num_tokens = static_cast<int64_t>(tokens.size());
  PrefillJob job;
  job.request_id = "bench";
  job.epoch = 1;
  job.tokens = std::move(tokens);
  v1::KvLayout layout;
  layout.set_num_layers(static_cast<uint32_t>(config.num_layers));
  layout.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  layout.set_head_dim(static_cast<uint32_t>(config.head_dim));
  layout.set_num_tokens(static_cast<uint64_t>(num_tokens));
  layout.set_block_tokens(kBlockTokens);
  layout.set_dtype(dtype);
  HW_ASSIGN_OR_RETURN(job.partition, PartitionTokens(num_tokens, 1, v1::PARTITION_CONTIGUOUS, kBlockTokens));
  HW_ASSIGN_OR_RETURN(KvGeometry geometry, KvGeometry::Create(layout));
  job.geometry = std::make_shared<const KvGeometry>(std::move(geometry));
  HW_ASSIGN_OR_RETURN(job.policy, MakeBenchPolicy(policy, tables, quality));
  job.quality = quality;
  return job;
}

}  // namespace headwater

#endif  // HW_BENCH_PREFILL_JOB_H_
