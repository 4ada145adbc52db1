#include "worker/prefill.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kernels/attention/block_index.h"
#include "model/kernel_status.h"
#include "worker/agreement.h"
#include "worker/egress.h"
#include "worker/layer_kv.h"
#include "worker/link_probe.h"
#include "worker/ring.h"
#include "worker/ring_attention.h"

namespace headwater {
namespace {

using kernels::kQueryTileTokens;

// Consecutive local tokens: rows [row, row + range.size()) of the local buffers.
struct Segment {
  TokenRange range;
  int64_t row = 0;
};

// Names the reason of what the model reports as not finite.
absl::Status ModelError(const absl::Status& status, int32_t layer) {
  if (!absl::IsInternal(status) || !absl::StrContains(status.message(), "non-finite")) return status;
  return MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE, status.message(),
                   {{"layer", absl::StrCat(layer)}});
}

class PrefillLoop {
 public:
  PrefillLoop(const PrefillJob& job, const PrefillContext& context)
      : job_(job),
        context_(context),
        config_(context.model->config()),
        shape_(context.model->attention_shape()),
        compute_(context.model->compute()),
        num_tokens_(static_cast<int64_t>(job.tokens.size())),
        local_tokens_(NumTokens(job.local())),
        q_row_(static_cast<int64_t>(shape_.num_q_heads) * shape_.head_dim),
        all_queries_(job.partition, job.partition),
        last_query_(job.partition, OnlyLastToken(job.partition, num_tokens_)),
        first_layer_(job.resume.has_value() ? job.resume->layer : 0),
        checkpoint_layers_(context.checkpoints != nullptr ? context.checkpoint_layers : 0),
        kv_(compute_, job, context.sender),
        egress_(TakeBuffers(), context.stall_timeout) {
    exchange_.strategy = job.strategy;
    exchange_.shape = shape_;
    exchange_.dtype = compute_;
    exchange_.rank = job.rank;
    exchange_.num_tokens = num_tokens_;
    exchange_.keys = &job.partition;
    exchange_.collectives = context.collectives;
    exchange_.control = context.control;
    int64_t row = 0;
    for (const TokenRange& range : job.local()) {
      segments_.push_back({range, row});
      row += range.size();
    }
  }

  absl::StatusOr<PrefillResult> Run() {
    HW_RETURN_IF_ERROR(
        AgreeOnPlan(job_, absl::StrCat(context_.model->fingerprint(), " ", kernels::NameOf(compute_)),
                    context_.collectives, context_.control, &checkpoint_layers_));
    HW_RETURN_IF_ERROR(ProbeLink());
    HW_RETURN_IF_ERROR(job_.resume.has_value() ? Resume() : Embed());
    if (TakesCheckpoints()) {
      context_.checkpoints->Begin(job_.request_id, job_.epoch, job_.rank, job_.partition,
                                  config_.hidden_size);
    } else if (context_.checkpoints != nullptr) {
      context_.checkpoints->Clear();
    }
    for (int32_t layer = first_layer_; layer < config_.num_layers; ++layer) {
      HW_RETURN_IF_ERROR(StartCheckpoint(layer));
      const PrefillProgress& done = result_.progress;
      const uint64_t computed = done.pairs_computed, possible = done.pairs_possible;
      HW_RETURN_IF_ERROR(RunLayer(layer));
      // Ranks without the last token have nothing to read in the last layer.
      if (done.pairs_possible > possible) {
        result_.progress.layers.push_back({static_cast<float>(done.pairs_computed - computed) /
                                           static_cast<float>(done.pairs_possible - possible)});
      }
      HW_RETURN_IF_ERROR(FinishCheckpoint(layer));
      result_.progress.layers_done = static_cast<uint32_t>(layer) + 1;
      if (context_.progress) context_.progress(result_.progress);
    }
    HW_RETURN_IF_ERROR(ScoreLastToken());
    HW_RETURN_IF_ERROR(WaitForPeers(context_.collectives, context_.control));
    return std::move(result_);
  }

 private:
  // In the order of the plan; returns the egress buffers.
  std::vector<char*> TakeBuffers() {
    const MemoryPlan& plan = job_.plan;
    Arena* const arena = context_.arena;
    hidden_ = reinterpret_cast<float*>(arena->Take(plan.hidden));
    attention_ = reinterpret_cast<float*>(arena->Take(plan.attention));
    lse_ = reinterpret_cast<float*>(arena->Take(plan.lse));
    q_ = arena->Take(plan.q);
    compute_kv_ = plan.compute_kv > 0 ? arena->Take(plan.compute_kv) : nullptr;
    std::vector<char*> egress;
    for (int i = 0; i < plan.num_egress; ++i) egress.push_back(arena->Take(plan.egress_kv));
    for (int i = 0; i < plan.num_receive; ++i) exchange_.receive_kv[i] = arena->Take(plan.receive_kv);
    if (plan.send_kv > 0) exchange_.send_kv = arena->Take(plan.send_kv);
    if (plan.selection > 0) exchange_.selection = reinterpret_cast<uint64_t*>(arena->Take(plan.selection));
    logits_ = reinterpret_cast<float*>(arena->Take(plan.logits));
    return egress;
  }

  absl::Status ProbeLink() {
    if (!context_.measure_link || context_.collectives == nullptr) return absl::OkStatus();
    const JobControl::Waiting waiting(context_.control);
    const absl::StatusOr<double> rate = MeasureLink(context_.collectives);
    if (!rate.ok()) return CollectiveError(rate.status(), *context_.control);
    result_.link_bytes_per_s = *rate;
    return absl::OkStatus();
  }

  bool HoldsLastToken() const { return !segments_.empty() && segments_.back().range.end == num_tokens_; }
  bool IsLastLayer(int32_t layer) const { return layer + 1 == config_.num_layers; }

  // Calls `work(position, row, count)` for the segments' tokens, a model chunk at a time.
  template <typename Work>
  absl::Status ForChunks(const std::vector<Segment>& segments, const Work& work) {
    const int64_t most = context_.model->chunk_tokens();
    for (const Segment& segment : segments) {
      for (int64_t done = 0; done < segment.range.size(); done += most) {
        HW_RETURN_IF_ERROR(context_.control->Step());
        HW_RETURN_IF_ERROR(work(segment.range.begin + done, segment.row + done,
                                std::min(most, segment.range.size() - done)));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Embed() {
    const absl::Span<const int32_t> tokens(job_.tokens);
    return ForChunks(segments_, [&](int64_t position, int64_t row, int64_t count) {
      return context_.model->Embed(tokens.subspan(static_cast<size_t>(position), static_cast<size_t>(count)),
                                   hidden_ + row * config_.hidden_size);
    });
  }

  absl::Status Resume() {
    const absl::Time start = clock_->Now();
    HW_RETURN_IF_ERROR(LoadCheckpoint(job_, config_.hidden_size, *context_.checkpoints, context_.collectives,
                                      context_.control, [&](int64_t row, const float* rows, int64_t count) {
                                        std::copy_n(rows, count * config_.hidden_size,
                                                    hidden_ + row * config_.hidden_size);
                                        return absl::OkStatus();
                                      }));
    context_.checkpoints->Clear();
    if (context_.metrics != nullptr) {
      context_.metrics->resume_exchange.Observe(absl::ToDoubleSeconds(clock_->Now() - start));
    }
    return absl::OkStatus();
  }

  bool TakesCheckpoints() const { return checkpoint_layers_ > 0 && job_.world_size() > 1; }

  // Begins to hand the layer's input to the right neighbour, who gets it while the layer is computed.
  absl::Status StartCheckpoint(int32_t layer) {
    // Layer 0's input is the embedding, which costs little to make again.
    if (!TakesCheckpoints() || layer == 0) return absl::OkStatus();
    if (layer % checkpoint_layers_ != 0 && layer != first_layer_) return absl::OkStatus();
    HW_ASSIGN_OR_RETURN(const CheckpointStore::Rows rows, context_.checkpoints->Start(layer));
    std::copy_n(hidden_, rows.own.size(), rows.own.begin());
    const auto bytes = [](absl::Span<float> values) {
      return absl::MakeSpan(reinterpret_cast<char*>(values.data()), values.size() * sizeof(float));
    };
    const int world = job_.world_size();
    checkpoint_ = context_.collectives->StartExchange((job_.rank + 1) % world, bytes(rows.own),
                                                      (job_.rank + world - 1) % world, bytes(rows.left));
    return absl::OkStatus();
  }

  // Ends what StartCheckpoint() has begun, and finds the newest checkpoint that an epoch can go on from.
  absl::Status FinishCheckpoint(int32_t layer) {
    if (checkpoint_ != nullptr) {
      const absl::Time start = clock_->Now();
      absl::Status status;
      {
        const JobControl::Waiting waiting(context_.control);
        status = checkpoint_->Wait();
      }
      checkpoint_.reset();
      if (!status.ok()) return CollectiveError(status, *context_.control);
      context_.checkpoints->Finish();
      taken_.push_back(static_cast<uint32_t>(layer));
      const absl::Duration waited = clock_->Now() - start;
      result_.exchange += waited;
      if (context_.metrics != nullptr) {
        context_.metrics->checkpoint_exchange.Observe(absl::ToDoubleSeconds(waited));
        context_.metrics->checkpoint_bytes.Set(static_cast<double>(context_.checkpoints->bytes()));
      }
    }
    ReportCheckpoint(taken_, *context_.sender, &result_.progress);
    return absl::OkStatus();
  }

  absl::Status RunLayer(int32_t layer) {
    absl::Duration stalled;
    char* egress = nullptr;
    HW_RETURN_IF_ERROR(egress_.Acquire(layer, context_.control, &egress, &stalled));
    char* const own_kv = compute_kv_ != nullptr ? compute_kv_ : egress;

    const absl::Time start = clock_->Now();
    HW_RETURN_IF_ERROR(Project(layer, own_kv, egress));
    const absl::Time projected = clock_->Now();
    RingTimes ring;
    HW_RETURN_IF_ERROR(Attend(layer, own_kv, &ring));
    const absl::Time attended = clock_->Now();
    HW_RETURN_IF_ERROR(FinishRows(layer));
    const LayerTimes times{
        layer, start, stalled, projected - start, ring.exchange, ring.attention, clock_->Now() - attended};
    result_.layers.push_back(times);

    result_.linear += times.linear();
    result_.attention += ring.attention;
    result_.exchange += ring.exchange;
    result_.exchange_bytes += ring.bytes;
    result_.exchange_bytes_allgather += ring.allgather_bytes;
    result_.egress_stall += stalled;
    if (context_.metrics != nullptr) {
      context_.metrics->layer_linear.Observe(absl::ToDoubleSeconds(times.linear()));
      context_.metrics->layer_attention.Observe(absl::ToDoubleSeconds(ring.attention));
      context_.metrics->layer_exchange.Observe(absl::ToDoubleSeconds(ring.exchange));
      context_.metrics->layer_egress_stall.Observe(absl::ToDoubleSeconds(stalled));
      if (job_.world_size() > 1) {
        context_.metrics->ring_exchange.Observe(absl::ToDoubleSeconds(ring.exchange));
        context_.metrics->CountExchange(StrategyName(job_.strategy), ring.bytes, ring.allgather_bytes);
      }
    }
    return absl::OkStatus();
  }

  // Q, K and V of the local tokens; each block leaves as soon as it is whole.
  absl::Status Project(int32_t layer, char* own_kv, char* egress) {
    const LayerKv::Buffers buffers{own_kv, egress};
    kv_.StartLayer(layer);
    return ForChunks(segments_, [&](int64_t position, int64_t row, int64_t count) -> absl::Status {
      HW_RETURN_IF_ERROR(ModelError(
          context_.model->BeforeAttention(layer, hidden_ + row * config_.hidden_size, count, position,
                                          q_ + static_cast<uint64_t>(row * q_row_) * SizeOf(compute_),
                                          kv_.K(own_kv, row), kv_.V(own_kv, row)),
          layer));
      return kv_.Submit(buffers, position, row, count, &egress_);
    });
  }

  // What of the segments the layer's attention is for: in the last layer only the last token's result is
  // used.
  std::vector<Segment> QueriesOf(int32_t layer) const {
    if (!IsLastLayer(layer)) return segments_;
    if (!HoldsLastToken()) return {};
    return {{{num_tokens_ - 1, num_tokens_}, local_tokens_ - 1}};
  }

  absl::Status Attend(int32_t layer, const char* own_kv, RingTimes* times) {
    const std::vector<Segment> segments = QueriesOf(layer);
    std::vector<kernels::BlockIndex> indices(segments.size());
    RingAttentionArgs args;
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& segment = segments[i];
      HW_RETURN_IF_ERROR(SelectBlocks(layer, segment.range, &indices[i]));
      QuerySegment query;
      query.chunk.q = q_ + static_cast<uint64_t>(segment.row * q_row_) * SizeOf(compute_);
      query.chunk.dtype = compute_;
      query.chunk.begin = segment.range.begin;
      query.chunk.num_tokens = segment.range.size();
      query.state.out = attention_ + segment.row * q_row_;
      query.state.lse_ln = lse_ + segment.row * shape_.num_q_heads;
      query.index = &indices[i];
      args.queries.push_back(query);
    }
    args.exchange = exchange_;
    args.exchange.own_kv = own_kv;
    args.exchange.schedule = IsLastLayer(layer) ? &last_query_ : &all_queries_;
    args.flop_per_step = context_.flop_per_step;
    return RingAttention(args, times);
  }

  absl::Status SelectBlocks(int32_t layer, const TokenRange& range, kernels::BlockIndex* index) {
    kernels::PatternInputs inputs;
    inputs.layer = layer;
    inputs.num_q_heads = config_.num_q_heads;
    inputs.num_kv_heads = config_.num_kv_heads;
    inputs.num_tokens = num_tokens_;
    inputs.first_q_tile = range.begin / kQueryTileTokens;
    inputs.num_q_tiles = (range.end - 1) / kQueryTileTokens + 1 - inputs.first_q_tile;
    HW_RETURN_IF_ERROR(FromKernels(job_.policy->Select(inputs, index),
                                   absl::StrCat("policy ", job_.policy->name(), " in layer ", layer)));
    const kernels::BlockCounts counts = kernels::CountBlocks(*index);
    const auto heads_per_list = static_cast<uint64_t>(config_.num_q_heads / index->num_lists);
    result_.progress.pairs_computed += counts.selected * heads_per_list;
    result_.progress.pairs_possible += counts.possible * heads_per_list;
    return absl::OkStatus();
  }

  absl::Status FinishRows(int32_t layer) {
    return ForChunks(QueriesOf(layer), [&](int64_t /*position*/, int64_t row, int64_t count) {
      return ModelError(context_.model->AfterAttention(layer, attention_ + row * q_row_, count,
                                                       hidden_ + row * config_.hidden_size),
                        layer);
    });
  }

  absl::Status ScoreLastToken() {
    if (!HoldsLastToken()) return absl::OkStatus();
    const float* const row = hidden_ + (local_tokens_ - 1) * config_.hidden_size;
    HW_RETURN_IF_ERROR(ModelError(context_.model->Logits(row, logits_), config_.num_layers));
    const absl::Span<const float> logits(logits_, static_cast<size_t>(config_.vocab_size));
    result_.top = TopTokens(logits, std::max(1, job_.top_logprobs));
    return absl::OkStatus();
  }

  const PrefillJob& job_;
  const PrefillContext& context_;
  const Clock* const clock_ = Clock::Real();
  const ModelConfig& config_;
  const kernels::AttentionShape shape_;
  const kernels::DType compute_;
  const int64_t num_tokens_;
  const int64_t local_tokens_;
  const int64_t q_row_;  // elements of one token's Q
  const RingSchedule all_queries_;
  const RingSchedule last_query_;
  const int32_t first_layer_;
  std::vector<Segment> segments_;
  std::unique_ptr<PendingExchange> checkpoint_;  // under way
  std::vector<uint32_t> taken_;                  // layers of the checkpoints
  int32_t checkpoint_layers_;
  float* hidden_ = nullptr;
  float* attention_ = nullptr;
  float* lse_ = nullptr;
  char* q_ = nullptr;
  char* compute_kv_ = nullptr;
  ExchangeArgs exchange_;  // but for what is the layer's
  float* logits_ = nullptr;
  LayerKv kv_;
  EgressRing egress_;
  PrefillResult result_;
};

}  // namespace

absl::StatusOr<PrefillResult> RunPrefill(const PrefillJob& job, const PrefillContext& context) {
  HW_CHECK((context.collectives != nullptr) == (job.world_size() > 1));
  absl::StatusOr<PrefillResult> result = PrefillLoop(job, context).Run();
  if (result.ok() || context.collectives == nullptr) return result;
  context.collectives->Abort();
  if (context.metrics != nullptr) context.metrics->collective_aborts.Increment();
  return result;
}

}  // namespace headwater
