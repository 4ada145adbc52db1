#include "worker/cuda/cuda_sequences.h"

#include <variant>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kernels/cuda/block_stats.h"
#include "model/kernel_status.h"
#include "worker/cuda/cuda_plan.h"
#include "worker/exchange.h"

namespace headwater {
namespace {

absl::Status CheckRanks(const PrefillJob& job, int world_size) {
  if (job.world_size() == world_size) return CudaEgress::CheckBlocks(job);
  return absl::InvalidArgumentError(
      absl::StrCat("a job of ", job.world_size(), " ranks in a group of ", world_size));
}

absl::Status CheckJob(const PrefillJob& job, const ModelConfig& config, int world_size) {
  HW_RETURN_IF_ERROR(CheckRanks(job, world_size));
  if (world_size == 1) return absl::OkStatus();
  HW_RETURN_IF_ERROR(
      CheckShared(config, *job.policy, static_cast<int64_t>(job.tokens.size()), world_size, job.strategy));
  const uint32_t block_tokens = job.geometry->layout().block_tokens();
  if (block_tokens % kernels::kStatsBlockTokens == 0) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat("KV blocks of ", block_tokens, " tokens over ", world_size,
                                               " GPUs; a multiple of ", kernels::kStatsBlockTokens,
                                               " is wanted"));
}

}  // namespace

bool MayShare(const ModelConfig& config, const kernels::PolicyParameters& parameters) {
  if (std::holds_alternative<kernels::DenseParameters>(parameters) ||
      std::holds_alternative<kernels::ProbeParameters>(parameters) ||
      kernels::CudaPolicyTakesRanges(parameters)) {
    return true;
  }
  return kernels::CudaPolicyListsBlocks(parameters) &&
         kernels::kStatsBlockTokens % (config.num_q_heads / config.num_kv_heads) == 0;
}

absl::StatusOr<CudaPrefillPlan> PlanCudaRank(const ModelConfig& config, int64_t chunk_tokens,
                                             const kernels::PolicyParameters& parameters,
                                             const CudaRankSize& size) {
  HW_ASSIGN_OR_RETURN(const auto policy, MakePolicyFor(config, parameters, size.num_tokens));
  CudaPolicyPlan searched;
  const bool of_part =
      policy != nullptr && size.world_size > 1 && !kernels::CudaPolicyTakesRanges(parameters);
  if (of_part) {
    searched = PlanCudaPolicyOfPart(*policy, config, size.num_tokens);
  } else if (policy != nullptr) {
    searched = PlanCudaPolicy(*policy, config, size.num_tokens);  // a rank's ranges take no more
  }
  CudaPrefillPlan plan =
      PlanCudaPrefill(config, chunk_tokens, size.num_tokens, 1, searched, size.local_tokens);
  if (of_part) plan.all_q = AllQueryBytes(config, size.num_tokens);
  if (size.world_size > 1 && size.checkpoint_layers > 0 && size.num_tokens >= kLeastCheckpointTokens) {
    plan.checkpoints = CheckpointDeviceBytes(size.local_tokens, size.max_rank_tokens, config.hidden_size,
                                             size.checkpoint_layers, config.num_layers);
  }
  return plan;
}

absl::Status CheckShared(const ModelConfig& config, const kernels::PatternPolicy& policy, int64_t num_tokens,
                         int world_size, v1::Strategy strategy) {
  if (strategy != v1::STRATEGY_ALLGATHER && strategy != v1::STRATEGY_RING) {
    return absl::UnimplementedError(
        absl::StrCat("strategy ", StrategyName(strategy), " over GPUs, which have allgather and ring"));
  }
  if (num_tokens < kernels::DenseBelowTokens(policy.parameters()) || MayShare(config, policy.parameters())) {
    return absl::OkStatus();
  }
  return absl::UnimplementedError(absl::StrCat("policy '", policy.name(), "' over ", world_size,
                                               " GPUs with ", config.num_q_heads, " query and ",
                                               config.num_kv_heads, " KV heads"));
}

bool IsDense(const PrefillJob& job) {
  return static_cast<int64_t>(job.tokens.size()) < kernels::DenseBelowTokens(job.policy->parameters());
}

const kernels::ProbeParameters* ProbeOf(const PrefillJob& job) {
  return IsDense(job) ? nullptr : std::get_if<kernels::ProbeParameters>(&job.policy->parameters());
}

absl::StatusOr<std::unique_ptr<kernels::CudaPolicy>> MakePolicyFor(
    const ModelConfig& config, const kernels::PolicyParameters& parameters, int64_t num_tokens) {
  std::unique_ptr<kernels::CudaPolicy> policy;
  if (num_tokens < kernels::DenseBelowTokens(parameters) ||
      std::holds_alternative<kernels::ProbeParameters>(parameters)) {
    return policy;
  }
  HW_RETURN_IF_ERROR(
      FromKernels(kernels::MakeCudaPolicy(parameters, CudaPolicyShapeOf(config), &policy), "policy"));
  return policy;
}

bool MayPackCuda(const PrefillJob& job) {
  return CheckRanks(job, 1).ok() && IsDense(job) && !job.quality.any() && !job.resume.has_value();
}

absl::Status CheckPass(absl::Span<const CudaPrefillPrompt> prompts, const ModelConfig& config,
                       int world_size) {
  for (const CudaPrefillPrompt& prompt : prompts) {
    HW_RETURN_IF_ERROR(CheckJob(*prompt.job, config, world_size));
    if (prompts.size() > 1 && !MayPackCuda(*prompt.job)) {
      return absl::InvalidArgumentError(
          absl::StrCat("request ", prompt.job->request_id, " cannot share a pass: policy '",
                       prompt.job->policy->name(), "', ", prompt.job->tokens.size(), " tokens"));
    }
  }
  return absl::OkStatus();
}

std::vector<CudaSequence> MakeSequences(absl::Span<const CudaPrefillPrompt> prompts, int64_t* num_tokens) {
  std::vector<CudaSequence> sequences;
  *num_tokens = 0;
  for (const CudaPrefillPrompt& prompt : prompts) {
    const auto count = static_cast<int64_t>(prompt.job->tokens.size());
    sequences.push_back({&prompt, *num_tokens, count, {}, {}});
    *num_tokens += count;
  }
  return sequences;
}

CudaPassInputs MakePassInputs(const std::vector<CudaSequence>& sequences) {
  CudaPassInputs inputs;
  inputs.cu_seqlens.push_back(0);
  for (const CudaSequence& sequence : sequences) {
    const std::vector<int32_t>& tokens = sequence.prompt->job->tokens;
    inputs.ids.insert(inputs.ids.end(), tokens.begin(), tokens.end());
    for (int32_t i = 0; i < sequence.num_tokens; ++i) inputs.positions.push_back(i);
    inputs.cu_seqlens.push_back(static_cast<int32_t>(sequence.first_row + sequence.num_tokens));
  }
  return inputs;
}

absl::Status StepSequences(CudaEgress* egress, std::vector<CudaSequence>* sequences) {
  absl::Status ended;
  bool alive = false;
  for (size_t i = 0; i < sequences->size(); ++i) {
    CudaSequence& sequence = (*sequences)[i];
    if (sequence.status.ok()) {
      sequence.status = sequence.prompt->control->Step();
      if (sequence.status.ok() && egress != nullptr) sequence.status = egress->item_status(i);
      if (!sequence.status.ok()) {
        if (egress != nullptr) egress->Drop(i);
        if (sequence.prompt->ended) sequence.prompt->ended(sequence.status);
      }
    }
    if (sequence.status.ok()) {
      alive = true;
    } else {
      ended = sequence.status;
    }
  }
  return alive ? absl::OkStatus() : ended;
}

void EndNonFinite(CudaEgress* egress, int32_t layer, int64_t token, std::vector<CudaSequence>* sequences) {
  for (size_t i = 0; i < sequences->size(); ++i) {
    CudaSequence& sequence = (*sequences)[i];
    const int64_t own = token - sequence.first_row;
    if (own < 0 || own >= sequence.num_tokens || !sequence.status.ok()) continue;
    sequence.status =
        MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE,
                  absl::StrCat("layer ", layer, ": not finite at token ", own, " of the prompt"),
                  {{"layer", absl::StrCat(layer)}});
    egress->Drop(i);
  }
}

}  // namespace headwater
