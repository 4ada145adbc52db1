#include "worker/cuda/cuda_prefill.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kernels/cuda/attention.h"
#include "model/cuda/device_buffer.h"
#include "model/kernel_status.h"
#include "worker/cuda/gpu_pacer.h"

namespace headwater {
namespace {

constexpr uint64_t kPartAlignment = 256;
// Of one call of the attention kernel, about 18 ms of an H100 (its last tiles leave part of the device idle
// for up to 1 ms); and it takes at least so many queries.
constexpr double kFlopPerCall = 12e12;
constexpr int64_t kLeastQueries = 1024;
constexpr int kKvBuffers = 2;

uint64_t Aligned(uint64_t bytes) { return (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment; }

uint64_t Bytes(int64_t rows, int64_t width, int64_t size) {
  return static_cast<uint64_t>(rows) * static_cast<uint64_t>(width) * static_cast<uint64_t>(size);
}

// Queries from `begin` on whose causal attention takes kFlopPerCall.
int64_t QueriesOfCall(double flop_per_pair, int64_t begin) {
  const auto from = static_cast<double>(begin);
  const double count = std::sqrt(from * from + 2 * kFlopPerCall / flop_per_pair) - from;
  return std::max(kLeastQueries, static_cast<int64_t>(count) / 128 * 128);
}

int64_t Chunks(int64_t chunk_tokens, int64_t num_tokens) {
  return (num_tokens + chunk_tokens - 1) / chunk_tokens;
}

kernels::CudaAttentionArgs AttentionShape(const ModelConfig& config) {
  kernels::CudaAttentionArgs args;
  args.num_q_heads = config.num_q_heads;
  args.num_kv_heads = config.num_kv_heads;
  args.head_dim = config.head_dim;
  args.softmax_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(config.head_dim)));
  return args;
}

// Owns an event.
class Event {
 public:
  Event() = default;
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  ~Event() {
    if (event_ != nullptr) (void)cudaEventDestroy(event_);
  }
  absl::Status Create(unsigned flags) {
    return FromCuda(cudaEventCreateWithFlags(&event_, flags), "an event");
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaPrefillLoop {
 public:
  CudaPrefillLoop(const PrefillJob& job, const CudaPrefillContext& context)
      : job_(job),
        context_(context),
        model_(context.model),
        config_(model_->config()),
        num_tokens_(static_cast<int64_t>(job.tokens.size())),
        q_width_(int64_t{config_.num_q_heads} * config_.head_dim),
        kv_width_(int64_t{config_.num_kv_heads} * config_.head_dim),
        pacer_(context.control) {}

  // Nothing may be running on the device when its memory goes.
  ~CudaPrefillLoop() {
    egress_.reset();
    if (stream_ != nullptr) {
      (void)cudaStreamSynchronize(stream_);
      (void)cudaStreamDestroy(stream_);
    }
  }

  absl::StatusOr<PrefillResult> Run() {
    HW_RETURN_IF_ERROR(Prepare());
    HW_RETURN_IF_ERROR(ForChunks(num_tokens_, [&](int64_t begin, int64_t count) {
      return model_->Embed(ids_ + begin, count, Hidden(begin), stream_);
    }));
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      HW_RETURN_IF_ERROR(RunLayer(layer));
      result_.progress.layers_done = static_cast<uint32_t>(layer) + 1;
      if (context_.progress) context_.progress(result_.progress);
    }
    HW_RETURN_IF_ERROR(ScoreLastToken());
    HW_RETURN_IF_ERROR(egress_->Finish());
    return std::move(result_);
  }

 private:
  // Events of one layer: its begin, K and V ready, attention's end, its end.
  struct LayerEvents {
    Event begin, projected, attended, end;
  };

  absl::Status Prepare() {
    if (job_.world_size() != 1) return absl::UnimplementedError("context parallelism between GPUs");
    if (job_.policy->name() != "dense") {
      return absl::UnimplementedError(absl::StrCat("policy '", job_.policy->name(), "' on a GPU"));
    }
    HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(model_->device()), "cudaSetDevice"));
    const CudaPrefillPlan plan = PlanCudaPrefill(config_, model_->chunk_tokens(), num_tokens_);
    HW_ASSIGN_OR_RETURN(memory_, DeviceBuffer::Allocate(plan.total_bytes(), "the prompt"));
    char* at = memory_.data();
    const auto take = [&](uint64_t bytes) { return std::exchange(at, at + Aligned(bytes)); };
    ids_ = reinterpret_cast<int32_t*>(take(plan.tokens));
    hidden_ = reinterpret_cast<float*>(take(plan.hidden));
    q_ = take(plan.q);
    for (char*& kv : kv_) kv = take(plan.kv);
    logits_ = reinterpret_cast<float*>(take(plan.logits));
    bad_rows_ = reinterpret_cast<int64_t*>(take(plan.bad_rows));
    workspace_ = take(plan.workspace);
    workspace_bytes_ = plan.workspace;

    HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
    HW_RETURN_IF_ERROR(pacer_.Init(stream_));
    events_.resize(static_cast<size_t>(config_.num_layers));
    for (LayerEvents& events : events_) {
      for (Event* event : {&events.begin, &events.projected, &events.attended, &events.end}) {
        HW_RETURN_IF_ERROR(event->Create(cudaEventDefault));
      }
    }
    const int64_t chunks = Chunks(model_->chunk_tokens(), num_tokens_);
    HW_ASSIGN_OR_RETURN(host_bad_rows_, DeviceBuffer::AllocatePinned(
                                            Bytes(config_.num_layers, chunks, sizeof(int64_t)), "checks"));
    HW_RETURN_IF_ERROR(
        FromCuda(cudaMemcpyAsync(ids_, job_.tokens.data(), plan.tokens, cudaMemcpyHostToDevice, stream_),
                 "token ids"));
    HW_ASSIGN_OR_RETURN(egress_, CudaEgress::Start(job_, context_.sender, context_.control, context_.egress,
                                                   context_.stall_timeout));
    return absl::OkStatus();
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

  absl::Status Record(const Event& event) {
    return FromCuda(cudaEventRecord(event.get(), stream_), "an event");
  }

  absl::Status RunLayer(int32_t layer) {
    absl::Duration stalled;
    if (layer >= kKvBuffers) HW_RETURN_IF_ERROR(egress_->WaitCopied(layer - kKvBuffers, &stalled));
    HW_RETURN_IF_ERROR(CheckFinishedLayers());
    result_.egress_stall += stalled;
    LayerEvents& events = events_[static_cast<size_t>(layer)];
    char* const k = kv_[layer % kKvBuffers];
    char* const v = k + Bytes(num_tokens_, kv_width_, 2);
    HW_RETURN_IF_ERROR(Record(events.begin));
    HW_RETURN_IF_ERROR(ForChunks(
        num_tokens_,
        [&](int64_t begin, int64_t count) {
          return model_->BeforeAttention(layer, Hidden(begin), count, begin, Q(begin),
                                         k + begin * kv_width_ * 2, v + begin * kv_width_ * 2, {}, stream_);
        },
        2.0 * config_.hidden_size * static_cast<double>(q_width_ + 2 * kv_width_)));
    HW_RETURN_IF_ERROR(Record(events.projected));
    egress_->Send(layer, k, v, events.projected.get());

    const int64_t first = FirstRow(layer);
    HW_RETURN_IF_ERROR(Attend(k, v, first));
    HW_RETURN_IF_ERROR(Record(events.attended));
    HW_RETURN_IF_ERROR(FinishRows(layer, first));
    HW_RETURN_IF_ERROR(Record(events.end));
    if (context_.metrics != nullptr)
      context_.metrics->layer_egress_stall.Observe(absl::ToDoubleSeconds(stalled));
    return absl::OkStatus();
  }

  // Of those whose attention is computed: in the last layer only the last token's result is used.
  int64_t FirstRow(int32_t layer) const { return layer + 1 == config_.num_layers ? num_tokens_ - 1 : 0; }

  // Queries from `first` on, some at a time; each call's output takes the place of its queries.
  absl::Status Attend(const char* k, const char* v, int64_t first) {
    const double flop_per_pair = 4.0 * static_cast<double>(q_width_);
    for (int64_t begin = first; begin < num_tokens_;) {
      const int64_t count = std::min(num_tokens_ - begin, QueriesOfCall(flop_per_pair, begin));
      kernels::CudaAttentionArgs args = AttentionShape(config_);
      args.q = args.out = Q(begin);
      args.k = k;
      args.v = v;
      args.total_q = count;
      args.total_k = begin + count;
      HW_RETURN_IF_ERROR(
          FromKernels(kernels::CudaAttention(args, workspace_, workspace_bytes_, stream_), "attention"));
      const double pairs =
          static_cast<double>(count) * (static_cast<double>(begin) + static_cast<double>(count) / 2);
      result_.progress.pairs_computed +=
          static_cast<uint64_t>(pairs) * static_cast<uint64_t>(config_.num_q_heads);
      begin += count;
      HW_RETURN_IF_ERROR(pacer_.Enqueued(flop_per_pair * pairs));
    }
    result_.progress.pairs_possible = result_.progress.pairs_computed;
    return absl::OkStatus();
  }

  absl::Status FinishRows(int32_t layer, int64_t first) {
    const int64_t chunks = Chunks(model_->chunk_tokens(), num_tokens_);
    int64_t* const bad = bad_rows_ + layer % kKvBuffers * chunks;
    const double flop_per_row =
        2.0 * config_.hidden_size * (static_cast<double>(q_width_) + 3.0 * config_.intermediate_size);
    HW_RETURN_IF_ERROR(ForChunks(
        num_tokens_ - first,
        [&](int64_t begin, int64_t count) {
          return model_->AfterAttention(layer, Q(first + begin), count, Hidden(first + begin),
                                        bad + begin / model_->chunk_tokens(), stream_);
        },
        flop_per_row));
    const int64_t used = Chunks(model_->chunk_tokens(), num_tokens_ - first);
    std::fill_n(HostBadRows(layer), chunks, -1);
    return FromCuda(cudaMemcpyAsync(HostBadRows(layer), bad, Bytes(used, 1, sizeof(int64_t)),
                                    cudaMemcpyDeviceToHost, stream_),
                    "checks");
  }

  int64_t* HostBadRows(int32_t layer) const {
    return reinterpret_cast<int64_t*>(host_bad_rows_.data()) +
           layer * Chunks(model_->chunk_tokens(), num_tokens_);
  }

  // Layers that have run since the last look: their values must be finite. Their times are taken, too.
  absl::Status CheckFinishedLayers() {
    for (; checked_ < config_.num_layers; ++checked_) {
      const LayerEvents& events = events_[static_cast<size_t>(checked_)];
      if (static_cast<uint32_t>(checked_) >= result_.progress.layers_done) break;
      const cudaError_t state = cudaEventQuery(events.end.get());
      if (state == cudaErrorNotReady) break;
      HW_RETURN_IF_ERROR(FromCuda(state, absl::StrCat("layer ", checked_)));
      const int64_t chunk = model_->chunk_tokens(), first = FirstRow(checked_);
      for (int64_t i = 0; i < Chunks(chunk, num_tokens_); ++i) {
        if (HostBadRows(checked_)[i] < 0) continue;
        return MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE,
                         absl::StrCat("layer ", checked_, ": non-finite hidden state in row ",
                                      first + i * chunk + HostBadRows(checked_)[i]),
                         {{"layer", absl::StrCat(checked_)}});
      }
      HW_RETURN_IF_ERROR(AddTimes(events));
    }
    return absl::OkStatus();
  }

  absl::Status AddTimes(const LayerEvents& events) {
    float before = 0, attention = 0, after = 0;
    HW_RETURN_IF_ERROR(
        FromCuda(cudaEventElapsedTime(&before, events.begin.get(), events.projected.get()), "times"));
    HW_RETURN_IF_ERROR(
        FromCuda(cudaEventElapsedTime(&attention, events.projected.get(), events.attended.get()), "times"));
    HW_RETURN_IF_ERROR(
        FromCuda(cudaEventElapsedTime(&after, events.attended.get(), events.end.get()), "times"));
    result_.linear += absl::Milliseconds(before + after);
    result_.attention += absl::Milliseconds(attention);
    if (context_.metrics != nullptr) {
      context_.metrics->layer_linear.Observe((before + after) / 1e3);
      context_.metrics->layer_attention.Observe(attention / 1e3);
    }
    return absl::OkStatus();
  }

  absl::Status ScoreLastToken() {
    HW_RETURN_IF_ERROR(model_->Logits(Hidden(num_tokens_ - 1), logits_, stream_));
    std::vector<float> logits(static_cast<size_t>(config_.vocab_size));
    HW_RETURN_IF_ERROR(pacer_.Drain());
    HW_RETURN_IF_ERROR(CheckFinishedLayers());
    HW_RETURN_IF_ERROR(FromCuda(
        cudaMemcpy(logits.data(), logits_, logits.size() * sizeof(float), cudaMemcpyDeviceToHost), "logits"));
    if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); })) {
      return MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE, "non-finite logits",
                       {{"layer", absl::StrCat(config_.num_layers)}});
    }
    result_.top = TopTokens(logits, std::max(1, job_.top_logprobs));
    return absl::OkStatus();
  }

  float* Hidden(int64_t row) const { return hidden_ + row * config_.hidden_size; }
  char* Q(int64_t row) const { return q_ + row * q_width_ * 2; }

  const PrefillJob& job_;
  const CudaPrefillContext& context_;
  CudaModel* const model_;
  const ModelConfig& config_;
  const int64_t num_tokens_;
  const int64_t q_width_;
  const int64_t kv_width_;
  DeviceBuffer memory_;
  DeviceBuffer host_bad_rows_;
  int32_t* ids_ = nullptr;
  float* hidden_ = nullptr;
  char* q_ = nullptr;
  char* kv_[kKvBuffers] = {};
  float* logits_ = nullptr;
  int64_t* bad_rows_ = nullptr;
  char* workspace_ = nullptr;
  uint64_t workspace_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  GpuPacer pacer_;
  std::vector<LayerEvents> events_;
  int32_t checked_ = 0;
  std::unique_ptr<CudaEgress> egress_;
  PrefillResult result_;
};

}  // namespace

uint64_t CudaPrefillPlan::total_bytes() const {
  return Aligned(tokens) + Aligned(hidden) + Aligned(q) + static_cast<uint64_t>(num_kv) * Aligned(kv) +
         Aligned(logits) + Aligned(bad_rows) + Aligned(workspace);
}

CudaPrefillPlan PlanCudaPrefill(const ModelConfig& config, int64_t chunk_tokens, int64_t num_tokens) {
  const int64_t q_width = int64_t{config.num_q_heads} * config.head_dim;
  const int64_t kv_width = int64_t{config.num_kv_heads} * config.head_dim;
  CudaPrefillPlan plan;
  plan.tokens = Bytes(num_tokens, 1, sizeof(int32_t));
  plan.hidden = Bytes(num_tokens, config.hidden_size, sizeof(float));
  plan.q = Bytes(num_tokens, q_width, 2);
  plan.kv = Bytes(num_tokens, 2 * kv_width, 2);
  plan.num_kv = kKvBuffers;
  plan.logits = Bytes(config.vocab_size, 1, sizeof(float));
  plan.bad_rows = Bytes(kKvBuffers, Chunks(chunk_tokens, num_tokens), sizeof(int64_t));
  plan.workspace = 4096;  // dense attention's: a few bytes
  return plan;
}

absl::StatusOr<PrefillResult> RunCudaPrefill(const PrefillJob& job, const CudaPrefillContext& context) {
  return CudaPrefillLoop(job, context).Run();
}

}  // namespace headwater
