#include "worker/cuda/cuda_prefill.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/agreement.h"
#include "worker/cuda/cuda_pass.h"
#include "worker/cuda/cuda_time_budget.h"
#include "worker/exchange.h"
#include "worker/ring_attention.h"

namespace headwater {
namespace {

// What probe searches is taken to be so dense until a layer has told.
constexpr double kFirstDensity = 0.25;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

CudaPass::CudaPass(absl::Span<const CudaPrefillPrompt> prompts, const CudaPrefillContext& context)
    : context_(context),
      model_(context.model),
      config_(model_->config()),
      q_width_(int64_t{config_.num_q_heads} * config_.head_dim),
      kv_width_(int64_t{config_.num_kv_heads} * config_.head_dim),
      start_(SteadyNow()),
      pacer_([this] { return Step(); }, context.devices != nullptr),
      measure_recall_(context.measure_recall),
      first_layer_(prompts[0].job->resume.has_value() ? prompts[0].job->resume->layer : 0) {
  sequences_ = MakeSequences(prompts, &num_tokens_);
  tokens_ = shared() ? prompts[0].job->local() : RankTokens{{0, num_tokens_}};
  num_rows_ = NumTokens(tokens_);
  chunks_ = ChunksOf(tokens_, model_->chunk_tokens());
}

CudaPass::~CudaPass() {
  egress_.reset();
  copier_.reset();
  exchange_.reset();
  if (stream_ != nullptr) {
    (void)cudaStreamSynchronize(stream_);
    (void)cudaStreamDestroy(stream_);
  }
}

std::vector<absl::StatusOr<PrefillResult>> CudaPass::Run() {
  const absl::Status pass = RunLayers();
  if (shared() && !pass.ok()) {
    // What is enqueued must end although the other ranks may not come to it.
    context_.devices->Abort();
    context_.collectives->Abort();
    if (context_.metrics != nullptr) context_.metrics->collective_aborts.Increment();
  }
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

absl::Status CudaPass::RunLayers() {
  HW_RETURN_IF_ERROR(Agree());
  HW_RETURN_IF_ERROR(Prepare());
  // Memory is made while no rank waits for another on its device: that might wait for it in turn.
  HW_RETURN_IF_ERROR(WaitForPeers(context_.collectives, sequences_[0].prompt->control));
  HW_RETURN_IF_ERROR(ProbeLink());
  HW_RETURN_IF_ERROR(first_layer_ > 0 ? Resume() : Embed());
  if (checkpoints_) {
    const PrefillJob& job = *sequences_[0].prompt->job;
    context_.checkpoints->Begin(job.request_id, job.epoch, job.rank, job.partition, config_.hidden_size);
  } else if (context_.checkpoints != nullptr) {
    context_.checkpoints->Clear();
  }
  for (int32_t layer = first_layer_; layer < config_.num_layers; ++layer) {
    HW_RETURN_IF_ERROR(RunLayer(layer));
    ++layers_done_;
    HW_RETURN_IF_ERROR(FinishCheckpoints());
    for (CudaSequence& sequence : sequences_) {
      sequence.result.progress.layers_done = static_cast<uint32_t>(layers_done_);
      if (sequence.status.ok() && sequence.prompt->progress)
        sequence.prompt->progress(sequence.result.progress);
    }
  }
  HW_RETURN_IF_ERROR(ScoreLastTokens());
  FillReports();
  HW_RETURN_IF_ERROR(egress_->Finish([this] { return Step(); }));
  HW_RETURN_IF_ERROR(Step());
  return WaitForPeers(context_.collectives, sequences_[0].prompt->control);
}

absl::Status CudaPass::Embed() {
  return ForTokens([&](const CudaChunk& chunk) {
    return model_->Embed(ids_ + chunk.tokens.begin, chunk.tokens.size(), Hidden(chunk.row), stream_);
  });
}

absl::Status CudaPass::Step() {
  HW_RETURN_IF_ERROR(StepSequences(egress_.get(), &sequences_));
  if (!shared()) return absl::OkStatus();
  const absl::Status status = context_.devices->Check();
  return status.ok() ? status : CollectiveError(status, *sequences_[0].prompt->control);
}

absl::Status CudaPass::Prepare() {
  HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(model_->device()), "cudaSetDevice"));
  const PrefillJob& job = *sequences_[0].prompt->job;
  if (shared()) HW_RETURN_IF_ERROR(BeginExchange());
  if (context_.speed != nullptr) {
    HW_ASSIGN_OR_RETURN(speed_, Speed());
    HW_RETURN_IF_ERROR(CheckTimeBudget(job, config_, speed_, IsDense(job)));
  }
  CudaPolicyPlan policy;
  if (!packed()) {
    HW_ASSIGN_OR_RETURN(policy_, MakePolicyFor(config_, job.policy->parameters(), num_tokens_));
  }
  if (SelectsForAll()) {
    policy = PlanCudaPolicyOfPart(*policy_, config_, num_tokens_);
  } else if (policy_ != nullptr && shared()) {
    policy =
        PlanCudaPolicy(*policy_, config_, num_tokens_, policy_group_->ranges(), policy_group_->world_size());
  } else if (policy_ != nullptr) {
    policy_group_.emplace(num_tokens_);
    policy = PlanCudaPolicy(*policy_, config_, num_tokens_);
  }
  CudaPrefillPlan plan = PlanCudaPrefill(config_, model_->chunk_tokens(), num_tokens_,
                                         static_cast<int64_t>(sequences_.size()), policy, num_rows_);
  if (SelectsForAll()) plan.all_q = AllQueryBytes(config_, num_tokens_);
  if (TakesCheckpoints()) {
    plan.checkpoints = CheckpointDeviceBytes(num_rows_, MostTokens(job.partition), config_.hidden_size,
                                             checkpoint_layers_, config_.num_layers);
  }
  HW_ASSIGN_OR_RETURN(memory_, DeviceBuffer::Allocate(plan.total_bytes(), "the prompt"));
  char* at = memory_.data();
  const auto take = [&](uint64_t bytes) { return std::exchange(at, at + AlignedCudaPart(bytes)); };
  ids_ = reinterpret_cast<int32_t*>(take(plan.tokens));
  positions_ = packed() ? reinterpret_cast<int32_t*>(take(plan.positions)) : nullptr;
  cu_seqlens_ = packed() ? reinterpret_cast<int32_t*>(take(plan.cu_seqlens)) : nullptr;
  hidden_ = reinterpret_cast<float*>(take(plan.hidden));
  q_ = take(plan.q);
  if (plan.all_q > 0) all_q_ = take(plan.all_q);
  for (char*& kv : kv_) kv = take(plan.kv);
  logits_ = reinterpret_cast<float*>(take(plan.logits));
  bad_rows_ = reinterpret_cast<int64_t*>(take(plan.bad_rows));
  workspace_ = take(plan.workspace);
  workspace_bytes_ = plan.workspace;
  HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
  HW_RETURN_IF_ERROR(pacer_.Init(stream_));
  HW_RETURN_IF_ERROR(BeginPattern(plan, at));
  at += plan.pattern.total_bytes() + plan.policy.total_bytes();
  if (TakesCheckpoints()) HW_RETURN_IF_ERROR(BeginCheckpoints(at));
  const int64_t searches = CeilDiv(num_rows_, kLeastQueries) + static_cast<int64_t>(tokens_.size());
  stalls_.resize(static_cast<size_t>(config_.num_layers));
  HW_RETURN_IF_ERROR(log_.Init(config_.num_layers, std::max<int64_t>(1, RowChunks(num_rows_)),
                               pattern_ ? searches : 0, shared()));
  if (shared()) PlanExchange();
  HW_RETURN_IF_ERROR(Upload());
  std::vector<CudaEgressItem> items;
  for (const CudaSequence& sequence : sequences_) {
    items.push_back({sequence.prompt->job, sequence.prompt->sender, sequence.first_row});
  }
  HW_ASSIGN_OR_RETURN(egress_, CudaEgress::Start(std::move(items), context_.egress));
  return absl::OkStatus();
}

// memory: for the pattern, then for the policy.
absl::Status CudaPass::BeginPattern(const CudaPrefillPlan& plan, char* memory) {
  const PrefillJob& job = *sequences_[0].prompt->job;
  if (const kernels::ProbeParameters* probe = ProbeOf(job)) {
    int num_sms = 0;
    HW_RETURN_IF_ERROR(
        FromCuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, model_->device()),
                 "the device's multiprocessors"));
    pattern_.emplace(config_, *probe, num_tokens_, num_sms, memory);
    density_ = probe->forced_density > 0 ? probe->forced_density : kFirstDensity;
  }
  if (policy_ == nullptr) return absl::OkStatus();
  CudaPolicyPassOptions options;
  options.config = &config_;
  options.job = &job;
  options.policy = policy_.get();
  if (SelectsForAll()) {
    options.group = &policy_of_all_.emplace(num_tokens_);
    options.parts = policy_group_->ranges();
    options.part_out = q_;
    options.gather_lse = [this](float* lse_ln) { return GatherRows(lse_ln); };
  } else {
    options.group = &*policy_group_;
  }
  options.plan = plan.policy;
  options.memory = memory + plan.pattern.total_bytes();
  options.stream = stream_;
  options.measure_recall = measure_recall_;
  options.speed = shared() || context_.speed == nullptr ? &speed_ : context_.speed;
  options.step = [this] { return Step(); };
  options.start = start_;
  HW_ASSIGN_OR_RETURN(policy_pass_, CudaPolicyPass::Begin(options));
  return absl::OkStatus();
}

absl::Status CudaPass::Upload() {
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

absl::Status CudaPass::RunLayer(int32_t layer) {
  absl::Duration stalled;
  if (layer >= first_layer_ + kCudaKvBuffers) {
    HW_RETURN_IF_ERROR(egress_->WaitCopied(
        layer - kCudaKvBuffers, [this] { return Step(); }, &stalled));
  }
  HW_RETURN_IF_ERROR(CheckFinishedLayers());
  for (CudaSequence& sequence : sequences_) sequence.result.egress_stall += stalled;
  stalls_[static_cast<size_t>(layer)] = stalled;
  if (layer == first_layer_) compute_begin_ = Clock::Real()->Now();
  if (checkpoints_) HW_RETURN_IF_ERROR(checkpoints_->StartLayer(layer, hidden_, stream_));
  const CudaLayerLog::Events& events = log_.events(layer);
  char* const k = kv_[layer % kCudaKvBuffers];
  char* const v = k + num_tokens_ * kv_width_ * 2;
  HW_RETURN_IF_ERROR(events.begin.Record(stream_));
  HW_RETURN_IF_ERROR(Project(layer, k, v));
  HW_RETURN_IF_ERROR(events.projected.Record(stream_));
  egress_->Send(layer, k, v, events.projected.get());
  if (shared()) {
    HW_RETURN_IF_ERROR(exchange_->Finish(SharedArrays(k, v), stream_));
    HW_RETURN_IF_ERROR(events.gathered.Record(stream_));
    CountExchange();
  }

  char* attention = Q(QueriesOf(layer).first);
  if (packed()) {
    HW_RETURN_IF_ERROR(AttendPacked(k, v));
  } else if (policy_pass_ != nullptr && !IsLast(layer)) {
    HW_RETURN_IF_ERROR(AttendPolicy(layer, k, v, &attention));
  } else {
    HW_RETURN_IF_ERROR(Attend(layer, k, v));
  }
  HW_RETURN_IF_ERROR(events.attended.Record(stream_));
  if (checkpoints_) HW_RETURN_IF_ERROR(checkpoints_->SendSlice());
  HW_RETURN_IF_ERROR(FinishRows(layer, attention));
  HW_RETURN_IF_ERROR(events.end.Record(stream_));
  if (context_.metrics != nullptr)
    context_.metrics->layer_egress_stall.Observe(absl::ToDoubleSeconds(stalled));
  return absl::OkStatus();
}

absl::Status CudaPass::Project(int32_t layer, char* k, char* v) {
  const kernels::CudaBlockStats stats = MeansOf();
  const std::vector<SharedArray> arrays = SharedArrays(k, v);
  size_t index = 0;
  return ForTokens(
      [&](const CudaChunk& chunk) -> absl::Status {
        const int64_t begin = chunk.tokens.begin;
        HW_RETURN_IF_ERROR(model_->BeforeAttention(
            layer, Hidden(chunk.row), chunk.tokens.size(), begin, packed() ? positions_ + begin : nullptr,
            Query(chunk.row, begin), k + begin * kv_width_ * 2, v + begin * kv_width_ * 2, stats, stream_));
        return shared() ? exchange_->ChunkReady(index++, arrays, stream_) : absl::OkStatus();
      },
      2.0 * config_.hidden_size * static_cast<double>(q_width_ + 2 * kv_width_));
}

int64_t CudaPass::TokenOf(int64_t row) const {
  for (const TokenRange& range : tokens_) {
    if (row < range.size()) return range.begin + row;
    row -= range.size();
  }
  return num_tokens_;
}

absl::Status CudaPass::FinishRows(int32_t layer, const char* attention) {
  const auto [first, rows] = QueriesOf(layer);
  int64_t* const bad = bad_rows_ + layer % kCudaKvBuffers * RowChunks(num_rows_);
  const double flop_per_row =
      2.0 * config_.hidden_size * (static_cast<double>(q_width_) + 3.0 * config_.intermediate_size);
  HW_RETURN_IF_ERROR(ForChunks(
      rows,
      [&, start = first](int64_t begin, int64_t count) {
        return model_->AfterAttention(layer, attention + begin * q_width_ * 2, count, Hidden(start + begin),
                                      bad + begin / model_->chunk_tokens(), stream_);
      },
      flop_per_row));
  return log_.CopyBadRows(layer, bad, RowChunks(rows), first, stream_);
}

absl::Status CudaPass::CheckFinishedLayers() {
  for (; checked_ < layers_done_; ++checked_) {
    bool has_run = false;
    HW_RETURN_IF_ERROR(log_.HasRun(checked_, &has_run));
    if (!has_run) break;
    for (const int64_t row : log_.NonFiniteRows(checked_, model_->chunk_tokens())) {
      // It spreads to all later tokens of its prompt. Another prompt's behind it in the chunk shows in that
      // one's logits at the latest.
      EndNonFinite(egress_.get(), checked_, TokenOf(row), &sequences_);
    }
    LayerTimes times;
    times.layer = checked_;
    times.egress_stall = stalls_[static_cast<size_t>(checked_)];
    HW_RETURN_IF_ERROR(log_.ReadTimes(checked_, first_layer_, compute_begin_, &times));
    for (CudaSequence& sequence : sequences_) {
      sequence.result.layers.push_back(times);
      sequence.result.linear += times.linear();
      sequence.result.exchange += times.exchange;
      sequence.result.attention += times.attention;
    }
    if (context_.metrics != nullptr) {
      context_.metrics->layer_linear.Observe(absl::ToDoubleSeconds(times.linear()));
      context_.metrics->layer_attention.Observe(absl::ToDoubleSeconds(times.attention));
      if (shared()) context_.metrics->layer_exchange.Observe(absl::ToDoubleSeconds(times.exchange));
    }
    NoteLayer(checked_);
    LearnSpeed(checked_, times.linear(), times.attention);
  }
  return absl::OkStatus();
}

absl::Status CudaPass::ScoreLastTokens() {
  std::vector<int64_t> rows;
  for (const CudaSequence& sequence : sequences_)
    rows.push_back(shared() ? num_rows_ - 1 : sequence.first_row + sequence.num_tokens - 1);
  if (HoldsLastToken()) HW_RETURN_IF_ERROR(model_->Logits(hidden_, rows, logits_, stream_));
  HW_RETURN_IF_ERROR(pacer_.Drain());
  HW_RETURN_IF_ERROR(CheckFinishedLayers());
  if (!HoldsLastToken()) return absl::OkStatus();
  std::vector<float> logits(static_cast<size_t>(config_.vocab_size));
  for (size_t i = 0; i < sequences_.size(); ++i) {
    HW_RETURN_IF_ERROR(Step());
    if (!sequences_[i].status.ok()) continue;
    HW_RETURN_IF_ERROR(FromCuda(cudaMemcpy(logits.data(), logits_ + i * logits.size(),
                                           logits.size() * sizeof(float), cudaMemcpyDeviceToHost),
                                "logits"));
    if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); })) {
      EndNonFinite(egress_.get(), config_.num_layers, TokenOf(rows[i]), &sequences_);
      continue;
    }
    sequences_[i].result.top = TopTokens(logits, std::max(1, sequences_[i].prompt->job->top_logprobs));
  }
  return absl::OkStatus();
}

void CudaPass::FillReports() {
  for (CudaSequence& sequence : sequences_) {
    const PrefillJob& job = *sequence.prompt->job;
    if (job.policy->name() == "dense") continue;
    PrefillResult& result = sequence.result;
    v1::AttentionReport report;
    if (policy_pass_ != nullptr) report = policy_pass_->Report();
    report.set_policy(job.policy->name());
    if (IsDense(job)) report.set_fallback(v1::ATTENTION_FALLBACK_DENSE_SHORT_PROMPT);
    const auto possible = static_cast<double>(result.progress.pairs_possible);
    report.set_density(static_cast<double>(result.progress.pairs_computed) / std::max(1.0, possible));
    result.attention_report = std::move(report);
  }
}

std::vector<absl::StatusOr<PrefillResult>> RunCudaPrefill(absl::Span<const CudaPrefillPrompt> prompts,
                                                          const CudaPrefillContext& context) {
  if (prompts.empty()) return {};
  HW_CHECK((context.devices == nullptr) == (context.collectives == nullptr));
  const absl::Status status = CheckPass(prompts, context.model->config(),
                                        context.devices == nullptr ? 1 : context.devices->world_size());
  if (!status.ok()) return std::vector<absl::StatusOr<PrefillResult>>(prompts.size(), status);
  return CudaPass(prompts, context).Run();
}

}  // namespace headwater
