// What a pass has to do with other ranks, which have other tokens of its prompt.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "worker/agreement.h"
#include "worker/cuda/cuda_pass.h"
#include "worker/exchange.h"

namespace headwater {

absl::Status CudaPass::Agree() {
  if (!shared()) return absl::OkStatus();
  int32_t checkpoint_layers = 0;
  const std::string computes =
      absl::StrCat(model_->fingerprint(), " bf16, linear layers in ", NameOf(model_->linear()), ", ",
                   model_->chunk_tokens(), " tokens", context_.measure_recall ? ", measured" : "");
  return AgreeOnPlan(*sequences_[0].prompt->job, computes, context_.collectives,
                     sequences_[0].prompt->control, &checkpoint_layers);
}

absl::Status CudaPass::BeginExchange() {
  const PrefillJob& job = *sequences_[0].prompt->job;
  exchange_.emplace(job.partition, model_->chunk_tokens(), job.strategy, context_.devices);
  HW_RETURN_IF_ERROR(exchange_->Init());
  const auto row = static_cast<uint64_t>(kv_width_) * 2;
  const std::vector<SharedArray> kv = {{nullptr, row}, {nullptr, row}};
  layer_exchange_bytes_ = exchange_->ReceivedBytes(kv);
  layer_allgather_bytes_ =
      CudaKvExchange(job.partition, model_->chunk_tokens(), v1::STRATEGY_ALLGATHER, context_.devices)
          .ReceivedBytes(kv);
  policy_group_.emplace(job.partition, &*exchange_, context_.collectives, sequences_[0].prompt->control);
  return absl::OkStatus();
}

// The slowest rank's, where a time budget depends on it.
absl::StatusOr<ComputeSpeed> CudaPass::Speed() const {
  const PrefillJob& job = *sequences_[0].prompt->job;
  ComputeSpeed speed = *context_.speed;
  if (!shared() || job.quality.time_budget == absl::ZeroDuration()) return speed;
  HW_RETURN_IF_ERROR(policy_group_->Least(&speed.linear));
  HW_RETURN_IF_ERROR(policy_group_->Least(&speed.attention));
  return speed;
}

kernels::CudaBlockStats CudaPass::MeansOf() const {
  if (pattern_) return pattern_->stats();
  return shared() && policy_ != nullptr ? policy_->stats() : kernels::CudaBlockStats{};
}

std::vector<SharedArray> CudaPass::SharedArrays(char* k, char* v) const {
  const auto row = static_cast<uint64_t>(kv_width_) * 2;
  std::vector<SharedArray> arrays = {{k, row}, {v, row}};
  const kernels::CudaBlockStats means = MeansOf();
  for (float* const mean : {means.k_mean, means.v_mean}) {
    if (mean == nullptr) continue;
    // Whole on all ranks: coarse means reach over the end of what a rank sees.
    arrays.push_back({reinterpret_cast<char*>(mean), static_cast<uint64_t>(kv_width_) * sizeof(float),
                      kernels::kStatsBlockTokens, false});
  }
  return arrays;
}

void CudaPass::CountExchange() {
  PrefillResult& result = sequences_[0].result;
  result.exchange_bytes += layer_exchange_bytes_;
  result.exchange_bytes_allgather += layer_allgather_bytes_;
  if (context_.metrics != nullptr) {
    context_.metrics->CountExchange(StrategyName(sequences_[0].prompt->job->strategy), layer_exchange_bytes_,
                                    layer_allgather_bytes_);
  }
}

}  // namespace headwater
