#include "worker/cuda/cuda_prefill.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/status_macros.h"
#include "kernels/cuda/attention.h"
#include "model/cuda/device_buffer.h"
#include "model/kernel_status.h"
#include "worker/cuda/cuda_layer_log.h"
#include "worker/cuda/cuda_pattern.h"
#include "worker/cuda/cuda_sequences.h"
#include "worker/cuda/gpu_pacer.h"

namespace headwater {
namespace {

// Of one call of the attention kernel, about 18 ms of an H100 (its last tiles leave part of the device idle
// for up to 1 ms); and it takes at least so many queries.
constexpr double kFlopPerCall = 12e12;
constexpr int64_t kLeastQueries = 1024;
// What is searched is taken to be so dense until a layer has told.
constexpr double kFirstDensity = 0.25, kLeastDensity = 0.002;

// Queries from `begin` on whose causal attention takes kFlopPerCall.
int64_t QueriesOfCall(double flop_per_pair, int64_t begin) {
  const auto from = static_cast<double>(begin);
  const double count = std::sqrt(from * from + 2 * kFlopPerCall / flop_per_pair) - from;
  return std::max(kLeastQueries, static_cast<int64_t>(count) / 128 * 128);
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

class CudaPass {
 public:
  CudaPass(absl::Span<const CudaPrefillPrompt> prompts, const CudaPrefillContext& context)
      : context_(context),
        model_(context.model),
        config_(model_->config()),
        q_width_(int64_t{config_.num_q_heads} * config_.head_dim),
        kv_width_(int64_t{config_.num_kv_heads} * config_.head_dim),
        pacer_([this] { return Step(); }) {
    sequences_ = MakeSequences(prompts, &num_tokens_);
  }

  // Nothing may be running on the device when its memory goes.
  ~CudaPass() {
    egress_.reset();
    if (stream_ != nullptr) {
      (void)cudaStreamSynchronize(stream_);
      (void)cudaStreamDestroy(stream_);
    }
  }

  std::vector<absl::StatusOr<PrefillResult>> Run() {
    const absl::Status pass = RunLayers();
    std::vector<absl::StatusOr<PrefillResult>> results;
    for (CudaSequence& sequence : sequences_) {
      if (sequence.status.ok()) sequence.status = pass;
      if (sequence.status.ok()) {
        results.emplace_back(std::move(sequence.result));
      } else {
        results.emplace_back(sequence.status);
      }
    }
    return results;
  }

 private:
  absl::Status RunLayers() {
    HW_RETURN_IF_ERROR(Prepare());
    HW_RETURN_IF_ERROR(ForChunks(num_tokens_, [&](int64_t begin, int64_t count) {
      return model_->Embed(ids_ + begin, count, Hidden(begin), stream_);
    }));
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      HW_RETURN_IF_ERROR(RunLayer(layer));
      ++layers_done_;
      for (CudaSequence& sequence : sequences_) {
        sequence.result.progress.layers_done = static_cast<uint32_t>(layers_done_);
        if (sequence.status.ok() && sequence.prompt->progress)
          sequence.prompt->progress(sequence.result.progress);
      }
    }
    HW_RETURN_IF_ERROR(ScoreLastTokens());
    HW_RETURN_IF_ERROR(egress_->Finish([this] { return Step(); }));
    return Step();
  }

  absl::Status Step() { return StepSequences(egress_.get(), &sequences_); }

  bool packed() const { return sequences_.size() > 1; }

  absl::Status Prepare() {
    HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(model_->device()), "cudaSetDevice"));
    const CudaPrefillPlan plan = PlanCudaPrefill(config_, model_->chunk_tokens(), num_tokens_,
                                                 static_cast<int64_t>(sequences_.size()));
    HW_ASSIGN_OR_RETURN(memory_, DeviceBuffer::Allocate(plan.total_bytes(), "the prompt"));
    char* at = memory_.data();
    const auto take = [&](uint64_t bytes) { return std::exchange(at, at + AlignedCudaPart(bytes)); };
    ids_ = reinterpret_cast<int32_t*>(take(plan.tokens));
    positions_ = packed() ? reinterpret_cast<int32_t*>(take(plan.positions)) : nullptr;
    cu_seqlens_ = packed() ? reinterpret_cast<int32_t*>(take(plan.cu_seqlens)) : nullptr;
    hidden_ = reinterpret_cast<float*>(take(plan.hidden));
    q_ = take(plan.q);
    for (char*& kv : kv_) kv = take(plan.kv);
    logits_ = reinterpret_cast<float*>(take(plan.logits));
    bad_rows_ = reinterpret_cast<int64_t*>(take(plan.bad_rows));
    workspace_ = take(plan.workspace);
    workspace_bytes_ = plan.workspace;
    chunks_ = CeilDiv(num_tokens_, model_->chunk_tokens());
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
    HW_RETURN_IF_ERROR(pacer_.Init(stream_));
    if (const kernels::ProbeParameters* probe = ProbeOf(*sequences_[0].prompt->job)) {
      pattern_.emplace(config_, *probe, num_tokens_, at);
      density_ = probe->forced_density > 0 ? probe->forced_density : kFirstDensity;
    }
    HW_RETURN_IF_ERROR(
        log_.Init(config_.num_layers, chunks_, pattern_ ? CeilDiv(num_tokens_, kLeastQueries) : 0));
    HW_RETURN_IF_ERROR(Upload());
    std::vector<CudaEgressItem> items;
    for (const CudaSequence& sequence : sequences_) {
      items.push_back({sequence.prompt->job, sequence.prompt->sender, sequence.first_row});
    }
    HW_ASSIGN_OR_RETURN(egress_, CudaEgress::Start(std::move(items), context_.egress));
    return absl::OkStatus();
  }

  absl::Status Upload() {
    const CudaPassInputs inputs = MakePassInputs(sequences_);
    const auto upload = [&](int32_t* to, const std::vector<int32_t>& from) {
      return FromCuda(
          cudaMemcpyAsync(to, from.data(), from.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream_),
          "token ids");
    };
    HW_RETURN_IF_ERROR(upload(ids_, inputs.ids));
    if (packed()) {
      HW_RETURN_IF_ERROR(upload(positions_, inputs.positions));
      HW_RETURN_IF_ERROR(upload(cu_seqlens_, inputs.cu_seqlens));
    }
    return pacer_.Drain();
  }

  // Calls work(begin, count) for rows [0, num_rows), a model chunk at a time, at the device's pace.
  template <typename Work>
  absl::Status ForChunks(int64_t num_rows, const Work& work, double flop_per_row = 0) {
    for (int64_t begin = 0; begin < num_rows; begin += model_->chunk_tokens()) {
      const int64_t count = std::min(model_->chunk_tokens(), num_rows - begin);
      HW_RETURN_IF_ERROR(work(begin, count));
      HW_RETURN_IF_ERROR(pacer_.Enqueued(flop_per_row * static_cast<double>(count)));
    }
    return absl::OkStatus();
  }

  absl::Status RunLayer(int32_t layer) {
    absl::Duration stalled;
    if (layer >= kCudaKvBuffers) {
      HW_RETURN_IF_ERROR(egress_->WaitCopied(
          layer - kCudaKvBuffers, [this] { return Step(); }, &stalled));
    }
    HW_RETURN_IF_ERROR(CheckFinishedLayers());
    for (CudaSequence& sequence : sequences_) sequence.result.egress_stall += stalled;
    const CudaLayerLog::Events& events = log_.events(layer);
    char* const k = kv_[layer % kCudaKvBuffers];
    char* const v = k + num_tokens_ * kv_width_ * 2;
    HW_RETURN_IF_ERROR(events.begin.Record(stream_));
    const kernels::CudaBlockStats stats = pattern_ ? pattern_->stats() : kernels::CudaBlockStats{};
    HW_RETURN_IF_ERROR(ForChunks(
        num_tokens_,
        [&](int64_t begin, int64_t count) {
          return model_->BeforeAttention(
              layer, Hidden(begin), count, begin, packed() ? positions_ + begin : nullptr, Q(begin),
              k + begin * kv_width_ * 2, v + begin * kv_width_ * 2, stats, stream_);
        },
        2.0 * config_.hidden_size * static_cast<double>(q_width_ + 2 * kv_width_)));
    HW_RETURN_IF_ERROR(events.projected.Record(stream_));
    egress_->Send(layer, k, v, events.projected.get());

    const int64_t first = FirstRow(layer);
    HW_RETURN_IF_ERROR(packed() ? AttendPacked(k, v) : Attend(layer, k, v, first));
    HW_RETURN_IF_ERROR(events.attended.Record(stream_));
    HW_RETURN_IF_ERROR(FinishRows(layer, first));
    HW_RETURN_IF_ERROR(events.end.Record(stream_));
    if (context_.metrics != nullptr)
      context_.metrics->layer_egress_stall.Observe(absl::ToDoubleSeconds(stalled));
    return absl::OkStatus();
  }

  // Of those whose attention is computed: in the last layer only the last token's result is used.
  int64_t FirstRow(int32_t layer) const {
    return layer + 1 == config_.num_layers && !packed() ? num_tokens_ - 1 : 0;
  }

  kernels::CudaAttentionArgs AttentionArgs(const char* k, const char* v, int64_t begin, int64_t count) const {
    kernels::CudaAttentionArgs args;
    args.num_q_heads = config_.num_q_heads;
    args.num_kv_heads = config_.num_kv_heads;
    args.head_dim = config_.head_dim;
    args.softmax_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(config_.head_dim)));
    args.q = args.out = Q(begin);
    args.k = k;
    args.v = v;
    args.total_q = count;
    args.total_k = begin + count;
    return args;
  }

  absl::Status Launch(const kernels::CudaAttentionArgs& args) {
    return FromKernels(kernels::CudaAttention(args, workspace_, workspace_bytes_, stream_), "attention");
  }

  // Queries from `first` on, some at a time; each call's output takes the place of its queries.
  absl::Status Attend(int32_t layer, const char* k, const char* v, int64_t first) {
    const bool searched = pattern_.has_value() && first == 0;
    if (searched) HW_RETURN_IF_ERROR(pattern_->StartLayer(stream_));
    const double flop_per_pair = 4.0 * static_cast<double>(q_width_) * (searched ? density_ : 1);
    PrefillProgress& progress = sequences_[0].result.progress;
    for (int64_t begin = first; begin < num_tokens_;) {
      int64_t count = std::min(num_tokens_ - begin, QueriesOfCall(flop_per_pair, begin));
      if (searched) count = std::min(count, CudaPatternPlan::kMaxQueries);
      kernels::CudaAttentionArgs args = AttentionArgs(k, v, begin, count);
      if (searched) {
        HW_RETURN_IF_ERROR(pattern_->Select(begin, &args, log_.AddSearch(layer, begin, count), stream_));
      }
      HW_RETURN_IF_ERROR(Launch(args));
      const double pairs =
          static_cast<double>(count) * (static_cast<double>(begin) + static_cast<double>(count) / 2);
      if (!searched) {
        const uint64_t all = static_cast<uint64_t>(pairs) * static_cast<uint64_t>(config_.num_q_heads);
        progress.pairs_computed += all;
        progress.pairs_possible += all;
      }
      begin += count;
      HW_RETURN_IF_ERROR(pacer_.Enqueued(flop_per_pair * pairs));
    }
    return absl::OkStatus();
  }

  // All prompts at once.
  absl::Status AttendPacked(const char* k, const char* v) {
    kernels::CudaAttentionArgs args = AttentionArgs(k, v, 0, num_tokens_);
    args.num_sequences = static_cast<int32_t>(sequences_.size());
    args.cu_seqlens_q = args.cu_seqlens_k = cu_seqlens_;
    HW_RETURN_IF_ERROR(Launch(args));
    double flop = 0;
    for (CudaSequence& sequence : sequences_) {
      const auto count = static_cast<uint64_t>(sequence.num_tokens);
      const uint64_t pairs = count * (count + 1) / 2 * static_cast<uint64_t>(config_.num_q_heads);
      sequence.result.progress.pairs_computed += pairs;
      sequence.result.progress.pairs_possible += pairs;
      flop += 4.0 * config_.head_dim * static_cast<double>(pairs);
    }
    return pacer_.Enqueued(flop);
  }

  absl::Status FinishRows(int32_t layer, int64_t first) {
    int64_t* const bad = bad_rows_ + layer % kCudaKvBuffers * chunks_;
    const double flop_per_row =
        2.0 * config_.hidden_size * (static_cast<double>(q_width_) + 3.0 * config_.intermediate_size);
    HW_RETURN_IF_ERROR(ForChunks(
        num_tokens_ - first,
        [&](int64_t begin, int64_t count) {
          return model_->AfterAttention(layer, Q(first + begin), count, Hidden(first + begin),
                                        bad + begin / model_->chunk_tokens(), stream_);
        },
        flop_per_row));
    return log_.CopyBadRows(layer, bad, CeilDiv(num_tokens_ - first, model_->chunk_tokens()), first, stream_);
  }

  // Layers that have run since the last look: checks them and takes their times and densities.
  absl::Status CheckFinishedLayers() {
    for (; checked_ < layers_done_; ++checked_) {
      bool has_run = false;
      HW_RETURN_IF_ERROR(log_.HasRun(checked_, &has_run));
      if (!has_run) break;
      for (const int64_t row : log_.NonFiniteRows(checked_, model_->chunk_tokens())) {
        // It spreads to all later tokens of its prompt. Another prompt's behind it in the chunk shows in that
        // one's logits at the latest.
        EndNonFinite(egress_.get(), checked_, row, &sequences_);
      }
      CudaLayerLog::Times times;
      HW_RETURN_IF_ERROR(log_.ReadTimes(checked_, &times));
      for (CudaSequence& sequence : sequences_) {
        sequence.result.linear += times.linear;
        sequence.result.attention += times.attention;
      }
      if (context_.metrics != nullptr) {
        context_.metrics->layer_linear.Observe(absl::ToDoubleSeconds(times.linear));
        context_.metrics->layer_attention.Observe(absl::ToDoubleSeconds(times.attention));
      }
      if (pattern_) TakeDensity(checked_);
    }
    return absl::OkStatus();
  }

  void TakeDensity(int32_t layer) {
    constexpr uint64_t kPairs = uint64_t{128} * kernels::kStatsBlockTokens;
    const CudaLayerLog::Searches found = log_.CountSearches(layer, *pattern_);
    if (found.overflows > 0) {
      if (context_.metrics != nullptr) context_.metrics->search_overflows.Increment(found.overflows);
      if (!std::exchange(overflow_logged_, true)) {
        HW_LOG(WARNING).Field("request_id", sequences_[0].prompt->job->request_id)
            << "layer " << layer << ": the lists of " << found.overflows
            << " query tiles found no room among " << CudaPatternPlan::kMaxEntries
            << " entries; these tiles are computed densely";
      }
    }
    if (found.blocks.possible == 0) return;
    PrefillProgress& progress = sequences_[0].result.progress;
    progress.pairs_computed += found.blocks.computed * kPairs;
    progress.pairs_possible += found.blocks.possible * kPairs;
    density_ = std::max(kLeastDensity, static_cast<double>(found.blocks.computed) /
                                           static_cast<double>(found.blocks.possible));
  }

  absl::Status ScoreLastTokens() {
    std::vector<int64_t> rows;
    for (const CudaSequence& sequence : sequences_)
      rows.push_back(sequence.first_row + sequence.num_tokens - 1);
    HW_RETURN_IF_ERROR(model_->Logits(hidden_, rows, logits_, stream_));
    HW_RETURN_IF_ERROR(pacer_.Drain());
    HW_RETURN_IF_ERROR(CheckFinishedLayers());
    std::vector<float> logits(static_cast<size_t>(config_.vocab_size));
    for (size_t i = 0; i < sequences_.size(); ++i) {
      HW_RETURN_IF_ERROR(Step());
      if (!sequences_[i].status.ok()) continue;
      HW_RETURN_IF_ERROR(FromCuda(cudaMemcpy(logits.data(), logits_ + i * logits.size(),
                                             logits.size() * sizeof(float), cudaMemcpyDeviceToHost),
                                  "logits"));
      if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); })) {
        EndNonFinite(egress_.get(), config_.num_layers, rows[i], &sequences_);
        continue;
      }
      sequences_[i].result.top = TopTokens(logits, std::max(1, sequences_[i].prompt->job->top_logprobs));
    }
    return absl::OkStatus();
  }

  float* Hidden(int64_t row) const { return hidden_ + row * config_.hidden_size; }
  char* Q(int64_t row) const { return q_ + row * q_width_ * 2; }

  const CudaPrefillContext& context_;
  CudaModel* const model_;
  const ModelConfig& config_;
  const int64_t q_width_;
  const int64_t kv_width_;
  std::vector<CudaSequence> sequences_;
  int64_t num_tokens_ = 0;
  int64_t chunks_ = 0;
  DeviceBuffer memory_;
  int32_t* ids_ = nullptr;
  int32_t* positions_ = nullptr;
  int32_t* cu_seqlens_ = nullptr;
  float* hidden_ = nullptr;
  char* q_ = nullptr;
  char* kv_[kCudaKvBuffers] = {};
  float* logits_ = nullptr;
  int64_t* bad_rows_ = nullptr;
  char* workspace_ = nullptr;
  uint64_t workspace_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  GpuPacer pacer_;
  CudaLayerLog log_;
  std::optional<CudaPattern> pattern_;
  double density_ = 1;  // of the last layer that has run
  bool overflow_logged_ = false;
  int32_t layers_done_ = 0;
  int32_t checked_ = 0;
  std::unique_ptr<CudaEgress> egress_;
};

}  // namespace

std::vector<absl::StatusOr<PrefillResult>> RunCudaPrefill(absl::Span<const CudaPrefillPrompt> prompts,
                                                          const CudaPrefillContext& context) {
  if (prompts.empty()) return {};
  const absl::Status status = CheckPass(prompts);
  if (!status.ok()) return std::vector<absl::StatusOr<PrefillResult>>(prompts.size(), status);
  return CudaPass(prompts, context).Run();
}

}  // namespace headwater
