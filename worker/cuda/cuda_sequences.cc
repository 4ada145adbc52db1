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

absl::Status CheckJob(const PrefillJob& job, int world_size) {
  if (job.world_size() != world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("a job of ", job.world_size(), " ranks in a group of ", world_size));
  }
  HW_RETURN_IF_ERROR(CudaEgress::CheckBlocks(job));
  if (world_size == 1) return absl::OkStatus();
  HW_RETURN_IF_ERROR(
      CheckShared(*job.policy, static_cast<int64_t>(job.tokens.size()), world_size, job.strategy));
  const uint32_t block_tokens = job.geometry->layout().block_tokens();
  if (block_tokens % kernels::kStatsBlockTokens == 0) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat("KV blocks of ", block_tokens, " tokens over ", world_size,
                                               " GPUs; a multiple of ", kernels::kStatsBlockTokens,
                                               " is wanted"));
}

}  // namespace

absl::Status CheckShared(const kernels::PatternPolicy& policy, int64_t num_tokens, int world_size,
                         v1::Strategy strategy) {
  if (strategy != v1::STRATEGY_ALLGATHER && strategy != v1::STRATEGY_RING) {
    return absl::UnimplementedError(
        absl::StrCat("strategy ", StrategyName(strategy), " over GPUs, which have allgather and ring"));
  }
  if (num_tokens < kernels::DenseBelowTokens(policy.parameters()) ||
      std::holds_alternative<kernels::ProbeParameters>(policy.parameters()) ||
      kernels::CudaPolicyListsBlocks(policy.parameters())) {
    return absl::OkStatus();
  }
  return absl::UnimplementedError(absl::StrCat("policy '", policy.name(), "' over ", world_size, " GPUs"));
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
  return CheckJob(job, 1).ok() && IsDense(job) && !job.quality.any() && !job.resume.has_value();
}

absl::Status CheckPass(absl::Span<const CudaPrefillPrompt> prompts, int world_size) {
  for (const CudaPrefillPrompt& prompt : prompts) {
    HW_RETURN_IF_ERROR(CheckJob(*prompt.job, world_size));
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
