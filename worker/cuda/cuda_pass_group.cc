// What a pass has to do with other ranks, which have other tokens of its prompt.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/agreement.h"
#include "worker/checkpoint.h"
#include "worker/cuda/cuda_pass.h"
#include "worker/exchange.h"
#include "worker/memory_budget.h"

namespace headwater {

absl::Status CudaPass::Agree() {
  if (!shared()) return absl::OkStatus();
  checkpoint_layers_ = WantedCheckpointLayers();
  const std::string computes =
      absl::StrCat(model_->fingerprint(), " bf16, linear layers in ", NameOf(model_->linear()), ", ",
                   model_->chunk_tokens(), " tokens");
  return AgreeOnPlan(*sequences_[0].prompt->job, computes, context_.collectives,
                     sequences_[0].prompt->control, &checkpoint_layers_);
}

int CudaPass::WantedCheckpointLayers() const {
  const PrefillJob& job = *sequences_[0].prompt->job;
  if (context_.checkpoints == nullptr || context_.checkpoint_layers == 0) return 0;
  if (num_tokens_ < context_.least_checkpoint_tokens) return 0;
  const uint64_t needed = CheckpointHostBytes(job.partition, config_.hidden_size);
  absl::StatusOr<uint64_t> available = AvailableMemoryBytes();
  // What an earlier prompt has left there goes before this one's come.
  if (available.ok()) *available += context_.checkpoints->bytes();
  if (available.ok() && needed <= *available / 2) return context_.checkpoint_layers;
  if (context_.metrics != nullptr) context_.metrics->checkpoints_left_out.Increment();
  HW_LOG(WARNING).Field("request_id", job.request_id)
      << "no checkpoints of this prompt: they take " << needed << " bytes of host memory, and half of "
      << (available.ok() ? *available : 0) << " are there for them";
  return 0;
}

absl::Status CudaPass::BeginCheckpoints(char* memory) {
  const PrefillJob& job = *sequences_[0].prompt->job;
  HW_ASSIGN_OR_RETURN(copier_, DeviceToHostCopier::Start());
  CudaCheckpointOptions options;
  options.partition = &job.partition;
  options.rank = job.rank;
  options.hidden_size = config_.hidden_size;
  options.first_layer = first_layer_;
  options.num_layers = config_.num_layers;
  options.checkpoint_layers = checkpoint_layers_;
  options.store = context_.checkpoints;
  options.exchange = &*exchange_;
  options.copier = copier_.get();
  options.metrics = context_.metrics;
  options.memory = memory;
  options.step = [this] { return Step(); };
  checkpoints_.emplace(options);
  return checkpoints_->Init();
}

absl::Status CudaPass::FinishCheckpoints() {
  if (!checkpoints_) return absl::OkStatus();
  HW_ASSIGN_OR_RETURN(std::vector<uint32_t> taken, checkpoints_->Taken());
  // Blocks that the sender has not been given would be missed.
  const auto handed = static_cast<uint32_t>(egress_->handed_below());
  while (!taken.empty() && taken.back() > handed) taken.pop_back();
  ReportCheckpoint(taken, *sequences_[0].prompt->sender, &sequences_[0].result.progress);
  return absl::OkStatus();
}

absl::Status CudaPass::Resume() {
  const absl::Time start = SteadyNow();
  const CudaPrefillPrompt& prompt = *sequences_[0].prompt;
  const auto row_bytes = static_cast<size_t>(config_.hidden_size) * sizeof(float);
  HW_RETURN_IF_ERROR(LoadCheckpoint(
      *prompt.job, config_.hidden_size, *context_.checkpoints, context_.collectives, prompt.control,
      [&](int64_t row, const float* rows, int64_t count) {
        // The rows may go with the call; no work of the stream has come to this memory yet.
        return FromCuda(
            cudaMemcpy(Hidden(row), rows, static_cast<size_t>(count) * row_bytes, cudaMemcpyHostToDevice),
            "a checkpoint");
      }));
  context_.checkpoints->Clear();
  if (context_.metrics != nullptr) {
    context_.metrics->resume_exchange.Observe(absl::ToDoubleSeconds(SteadyNow() - start));
  }
  return absl::OkStatus();
}

absl::Status CudaPass::BeginExchange() {
  const PrefillJob& job = *sequences_[0].prompt->job;
  exchange_.emplace(job.partition, model_->chunk_tokens(), job.strategy, context_.devices,
                    sequences_[0].prompt->control);
  HW_RETURN_IF_ERROR(exchange_->Init());
  policy_group_.emplace(job.partition, &*exchange_, context_.collectives, sequences_[0].prompt->control);
  // Workers may be started with other flags; what is sampled must be the same.
  double measures = measure_recall_ ? 1 : 0;
  HW_RETURN_IF_ERROR(policy_group_->Least(&measures));
  measure_recall_ = measures > 0;
  return absl::OkStatus();
}

// Two exchanges of arrays whose content is of no matter yet: the ranks' streams meet in the first, the second
// is timed.
absl::Status CudaPass::ProbeLink() {
  if (!shared() || !context_.measure_link) return absl::OkStatus();
  double most_bytes = -static_cast<double>(layer_exchange_bytes_);
  HW_RETURN_IF_ERROR(policy_group_->Least(&most_bytes));
  most_bytes = -most_bytes;
  if (most_bytes < static_cast<double>(context_.least_probe_bytes)) return absl::OkStatus();
  const std::vector<SharedArray> arrays = SharedArrays(kv_[0], kv_[0] + num_tokens_ * kv_width_ * 2);
  CudaEvent begin, end;
  HW_RETURN_IF_ERROR(begin.Create(cudaEventDefault));
  HW_RETURN_IF_ERROR(end.Create(cudaEventDefault));
  HW_RETURN_IF_ERROR(exchange_->Finish(arrays, stream_));
  HW_RETURN_IF_ERROR(begin.Record(stream_));
  HW_RETURN_IF_ERROR(exchange_->Finish(arrays, stream_));
  HW_RETURN_IF_ERROR(end.Record(stream_));
  HW_RETURN_IF_ERROR(pacer_.Drain());
  float milliseconds = 0;
  HW_RETURN_IF_ERROR(FromCuda(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()), "an event"));
  double longest = -std::max(1e-6, 1e-3 * static_cast<double>(milliseconds));
  HW_RETURN_IF_ERROR(policy_group_->Least(&longest));
  sequences_[0].result.link_bytes_per_s = most_bytes / -longest;
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
  const bool causal = !SelectsForAll();
  std::vector<SharedArray> arrays = {{k, row, 1, causal}, {v, row, 1, causal}};
  if (all_q_ != nullptr) arrays.push_back({all_q_, static_cast<uint64_t>(q_width_) * 2, 1, false});
  const kernels::CudaBlockStats means = MeansOf();
  for (float* const mean : {means.k_mean, means.v_mean}) {
    if (mean == nullptr) continue;
    // Whole on all ranks: coarse means reach over the end of what a rank sees.
    arrays.push_back({reinterpret_cast<char*>(mean), static_cast<uint64_t>(kv_width_) * sizeof(float),
                      kernels::kStatsBlockTokens, false});
  }
  return arrays;
}

void CudaPass::PlanExchange() {
  const PrefillJob& job = *sequences_[0].prompt->job;
  const std::vector<SharedArray> arrays = SharedArrays(kv_[0], kv_[0]);
  layer_exchange_bytes_ = exchange_->ReceivedBytes(arrays);
  layer_allgather_bytes_ =
      CudaKvExchange(job.partition, model_->chunk_tokens(), v1::STRATEGY_ALLGATHER, context_.devices, nullptr)
          .ReceivedBytes(arrays);
}

absl::Status CudaPass::GatherRows(float* values) {
  const PrefillJob& job = *sequences_[0].prompt->job;
  const auto row = static_cast<uint64_t>(config_.num_q_heads) * sizeof(float);
  const auto parts_of = [&](const RankTokens& tokens) {
    DeviceParts parts;
    for (const TokenRange& range : tokens) {
      parts.push_back({reinterpret_cast<char*>(values) + static_cast<uint64_t>(range.begin) * row,
                       static_cast<uint64_t>(range.size()) * row});
    }
    return parts;
  };
  std::vector<DeviceParts> send(job.partition.size()), receive(job.partition.size());
  for (size_t rank = 0; rank < job.partition.size(); ++rank) {
    if (rank == static_cast<size_t>(job.rank)) continue;
    send[rank] = parts_of(job.local());
    receive[rank] = parts_of(job.partition[rank]);
  }
  return exchange_->Swap(send, receive, "exchange of sums of softmax", stream_);
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
