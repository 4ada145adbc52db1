#include "worker/executor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "base/trace_context.h"
#include "kernels/ops/linear.h"
#include "worker/assignment_queue.h"
#include "worker/link_probe.h"
#include "worker/prefill.h"
#include "worker/rank_trace.h"
#include "worker/ring_attention.h"

namespace headwater {
namespace {

// Work between two looks at the job control: about 50 ms of a slow core.
constexpr double kFlopPerStepAndThread = 1.5e9;
constexpr double kSlowestFlopPerSecond = 1e9;
constexpr absl::Duration kLongestAllowance = absl::Hours(24);

void SetDuration(absl::Duration duration, google::protobuf::Duration* out) {
  const int64_t nanos = absl::ToInt64Nanoseconds(duration);
  out->set_seconds(nanos / 1'000'000'000);
  out->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
}

// What the job sends.
uint64_t LocalKvBytes(const PrefillJob& job) {
  const KvGeometry& geometry = *job.geometry;
  const auto first = static_cast<uint64_t>(job.resume.has_value() ? job.resume->layer : 0);
  return 2 * (geometry.layout().num_layers() - first) * static_cast<uint64_t>(NumTokens(job.local())) *
         geometry.token_bytes();
}

// Where the request has one.
std::string TraceIdOf(const v1::PrefillAssignment& assignment) {
  if (assignment.traceparent().empty()) return "";
  return ContinueTrace(assignment.traceparent(), "").trace_id;
}

// To RankProgress or RankCompleted.
template <typename Message>
void FillLayers(const PrefillProgress& progress, Message* out) {
  const bool measured = progress.recalls > 0;
  for (const PrefillProgress::Layer& layer : progress.layers) {
    out->add_layer_densities(layer.density);
    if (measured) out->add_layer_recalls(layer.recall);
  }
}

void FillCompleted(const PrefillJob& job, const PrefillResult& result, const KvSenderStats& sent,
                   absl::Duration egress_tail, absl::Duration total, v1::RankCompleted* completed) {
  completed->set_request_id(job.request_id);
  completed->set_epoch(job.epoch);
  completed->set_rank(static_cast<uint32_t>(job.rank));
  completed->set_kv_digest_share(sent.digest.Bytes());
  completed->set_kv_bytes(sent.bytes_acked);
  completed->set_kv_blocks(sent.blocks_acked);
  completed->set_kv_blocks_resent(sent.blocks_resent);
  completed->set_kv_stream_resumes(sent.stream_resumes);
  completed->set_pairs_computed(result.progress.pairs_computed);
  completed->set_pairs_possible(result.progress.pairs_possible);
  FillLayers(result.progress, completed);
  if (result.attention_report.has_value()) *completed->mutable_attention() = *result.attention_report;
  v1::StageTimes* const stages = completed->mutable_stages();
  SetDuration(result.linear, stages->mutable_linear());
  SetDuration(result.attention, stages->mutable_attention());
  SetDuration(result.exchange, stages->mutable_exchange());
  SetDuration(result.egress_stall, stages->mutable_egress_stall());
  SetDuration(egress_tail, stages->mutable_egress_tail());
  SetDuration(total, stages->mutable_total());
  completed->set_exchange_bytes(result.exchange_bytes);
  completed->set_exchange_bytes_allgather(result.exchange_bytes_allgather);
  if (result.top.empty()) return;
  completed->set_first_token(static_cast<uint32_t>(result.top[0].token));
  const size_t reported = std::min(result.top.size(), static_cast<size_t>(job.top_logprobs));
  for (size_t i = 0; i < reported; ++i) {
    v1::TokenLogprob* const candidate = completed->add_top_logprobs();
    candidate->set_token_id(static_cast<uint32_t>(result.top[i].token));
    candidate->set_logprob(result.top[i].logprob);
  }
}

}  // namespace

absl::Duration SlowPeerAllowance(const ModelConfig& config, const PrefillJob& job) {
  double tokens = 0;
  for (const RankTokens& rank : job.partition)
    tokens = std::max(tokens, static_cast<double>(NumTokens(rank)));
  const double q_width = static_cast<double>(config.num_q_heads) * config.head_dim;
  const double kv_width = static_cast<double>(config.num_kv_heads) * config.head_dim;
  const double weights = config.hidden_size * (2 * q_width + 2 * kv_width + 3.0 * config.intermediate_size);
  const double seconds = (2 * weights * tokens + 4 * q_width * tokens * tokens) / kSlowestFlopPerSecond;
  return std::min(absl::Seconds(seconds), kLongestAllowance);
}

PrefillExecutor::PrefillExecutor(ExecutorOptions options) : options_(std::move(options)) {}

AssignmentRunner::KvBytes PrefillExecutor::kv_bytes() const {
  absl::MutexLock lock(&mutex_);
  KvBytes bytes;
  for (const KvSender* const sender : senders_) {
    const KvSenderStats stats = sender->Stats();
    bytes.unacked += stats.bytes_submitted - std::min(stats.bytes_submitted, stats.bytes_acked);
    if (sender == alone_) bytes.acked = stats.bytes_acked;
  }
  return bytes;
}

std::unique_ptr<KvSender> PrefillExecutor::MakeSender(const v1::PrefillAssignment& assignment,
                                                      const PrefillJob& job, int num_channels) {
  KvSenderOptions options;
  options.address = assignment.destination().kv_address();
  options.session_id = assignment.destination().session_id();
  options.session_token = assignment.destination().session_token();
  options.request_id = job.request_id;
  if (!assignment.traceparent().empty()) {
    const TraceContext trace = ContinueTrace(assignment.traceparent(), assignment.tracestate());
    options.traceparent = trace.Traceparent();
    options.tracestate = trace.state;
  }
  options.epoch = job.epoch;
  options.rank = static_cast<uint32_t>(job.rank);
  options.num_channels = num_channels;
  options.stall_timeout = options_.kv_stall_timeout;
  options.metrics = options_.metrics->registry;
  options.transport = options_.transport;
  std::unique_ptr<KvSender> sender = options_.make_sender(options, *job.geometry);
  absl::MutexLock lock(&mutex_);
  senders_.insert(sender.get());
  return sender;
}

void PrefillExecutor::EndSender(std::unique_ptr<KvSender> sender) {
  absl::MutexLock lock(&mutex_);
  senders_.erase(sender.get());
  if (alone_ == sender.get()) alone_ = nullptr;
}

PrefillContext PrefillExecutor::MakeContext(const PrefillJob& job, KvSender* sender, JobControl* control,
                                            std::function<void(const v1::RankProgress&)> progress) const {
  PrefillContext context;
  context.sender = sender;
  context.control = control;
  context.metrics = options_.metrics;
  context.stall_timeout = options_.kv_stall_timeout;
  context.flop_per_step = kFlopPerStepAndThread * options_.num_threads;
  context.progress = [&job, sender, bytes_total = LocalKvBytes(job),
                      progress = std::move(progress)](const PrefillProgress& done) {
    v1::RankProgress message;
    message.set_request_id(job.request_id);
    message.set_epoch(job.epoch);
    message.set_rank(static_cast<uint32_t>(job.rank));
    message.set_layers_done(done.layers_done);
    message.set_bytes_acked(sender->Stats().bytes_acked);
    message.set_bytes_total(bytes_total);
    message.set_pairs_computed(done.pairs_computed);
    message.set_pairs_possible(done.pairs_possible);
    FillLayers(done, &message);
    if (done.checkpoint.has_value()) {
      v1::RankCheckpoint* const checkpoint = message.mutable_checkpoint();
      checkpoint->set_layer(done.checkpoint->layer);
      checkpoint->set_kv_digest_share(done.checkpoint->share.digest.Bytes());
      checkpoint->set_kv_bytes(done.checkpoint->share.bytes);
      checkpoint->set_kv_blocks(done.checkpoint->share.blocks);
    }
    if (done.recalls > 0) {
      message.mutable_attention()->set_policy(job.policy->name());
      message.mutable_attention()->set_recall_mean(done.recall_sum / static_cast<double>(done.recalls));
    }
    progress(message);
  };
  return context;
}

v1::ConnectRequest PrefillExecutor::Report(const v1::PrefillAssignment& assignment, const PrefillJob* job,
                                           const absl::StatusOr<Outcome>& outcome, absl::Time start) {
  options_.metrics->CountPrefill(outcome.status());
  if (!outcome.ok()) {
    HW_LOG(WARNING)
            .Field("request_id", assignment.request_id())
            .Field("epoch", assignment.epoch())
            .Field("rank", assignment.rank())
            .Field("trace_id", TraceIdOf(assignment))
        << "prefill ended: " << outcome.status().ToString(absl::StatusToStringMode::kWithNoExtraData);
    return MakeRankFailed(assignment.request_id(), assignment.epoch(), assignment.rank(), outcome.status());
  }
  const absl::Duration total = Clock::Real()->Now() - start;
  v1::ConnectRequest message;
  FillCompleted(*job, outcome->result, outcome->sent, outcome->egress_tail, total,
                message.mutable_completed());
  FillLinks(*outcome, total, message.mutable_completed());
  *message.mutable_completed()->mutable_trace() =
      MakeRankTrace(outcome->result.layers, outcome->sent_layers, outcome->received, start, start + total);
  options_.metrics->prompt_tokens.Increment(static_cast<double>(NumTokens(job->local())));
  const PrefillProgress& done = outcome->result.progress;
  if (done.pairs_possible > 0) {
    const auto& report = outcome->result.attention_report;
    options_.metrics->ObserveAttention(
        job->policy->name(),
        static_cast<double>(done.pairs_computed) / static_cast<double>(done.pairs_possible),
        report.has_value() ? &*report : nullptr);
  }
  HW_LOG(INFO)
          .Field("request_id", job->request_id)
          .Field("epoch", job->epoch)
          .Field("rank", job->rank)
          .Field("trace_id", TraceIdOf(assignment))
      << "prefilled " << NumTokens(job->local()) << " of " << job->tokens.size() << " tokens in "
      << absl::FormatDuration(total) << ", planned in " << job->plan.total_bytes() << " bytes";
  return message;
}

v1::ConnectRequest PrefillExecutor::Run(const v1::PrefillAssignment& assignment, JobControl* control,
                                        const std::function<void(const v1::RankProgress&)>& progress) {
  kernels::SetNumThreads(options_.num_threads);
  options_.metrics->epoch.Set(assignment.epoch());
  const absl::StatusOr<PrefillJob> job = CheckAssignment(assignment, {options_.backend, options_.worker_id});
  if (!job.ok()) return Report(assignment, nullptr, job.status(), Clock::Real()->Now());
  if (const absl::Status waited = WaitForPasses(control); !waited.ok()) {
    return Report(assignment, nullptr, waited, Clock::Real()->Now());
  }
  const absl::Time start = Clock::Real()->Now();
  if (job->resume.has_value()) {
    checkpoints_.KeepOnly(job->request_id, job->resume->epoch, job->resume->layer);
    if (const absl::Status has = CheckProvides(*job, checkpoints_); !has.ok()) {
      return Report(assignment, nullptr, has, start);
    }
  } else if (job->world_size() > 1 && options_.checkpoint_layers > 0) {
    // It takes some of its own, in the same memory.
    checkpoints_.Forget();
  } else {
    checkpoints_.Clear();
  }
  options_.metrics->planned_bytes.Set(static_cast<double>(job->plan.total_bytes()));
  const absl::StatusOr<Outcome> outcome = RunChecked(assignment, *job, control, progress);
  options_.metrics->planned_bytes.Set(0);
  options_.metrics->checkpoint_bytes.Set(static_cast<double>(checkpoints_.bytes()));
  return Report(assignment, &*job, outcome, start);
}

void PrefillExecutor::FillLinks(const Outcome& outcome, absl::Duration total,
                                v1::RankCompleted* completed) const {
  EgressRate egress;
  if (options_.measure_egress) {
    egress = MeasureEgress(outcome.sent.bytes_acked, outcome.sent_layers, outcome.result.egress_stall,
                           outcome.egress_tail, total);
  }
  if (outcome.result.link_bytes_per_s <= 0 && egress.bytes_per_s <= 0) return;
  v1::LinkRates* const links = completed->mutable_links();
  links->set_link_bytes_per_s(outcome.result.link_bytes_per_s);
  links->set_egress_bytes_per_s(egress.bytes_per_s);
  links->set_egress_waited(egress.waited);
}

GroupSpec PrefillExecutor::SpecOf(const v1::PrefillAssignment& assignment, const PrefillJob& job) const {
  GroupSpec spec;
  spec.name = absl::StrCat(job.request_id, "/", job.epoch);
  spec.rank = job.rank;
  spec.world_size = job.world_size();
  spec.rendezvous_address = assignment.rendezvous_address();
  spec.connect_timeout = options_.collective_timeout;
  spec.timeout = options_.collective_timeout + SlowPeerAllowance(options_.backend->config(), job);
  // A peer may wait for its decode node.
  spec.device_timeout = options_.collective_timeout + options_.kv_stall_timeout;
  spec.transport = options_.transport;
  return spec;
}

absl::StatusOr<std::unique_ptr<Collectives>> PrefillExecutor::JoinGroup(const GroupSpec& spec,
                                                                        JobControl* control) {
  if (spec.world_size == 1) return std::unique_ptr<Collectives>();
  const JobControl::Waiting waiting(control);
  const absl::Time start = Clock::Real()->Now();
  absl::StatusOr<std::unique_ptr<Collectives>> group = options_.join_group(spec, control);
  options_.metrics->connect_group.Observe(absl::ToDoubleSeconds(Clock::Real()->Now() - start));
  if (group.ok()) return group;
  options_.metrics->collective_aborts.Increment();
  return CollectiveError(group.status(), *control);
}

absl::StatusOr<PrefillExecutor::Outcome> PrefillExecutor::RunChecked(
    const v1::PrefillAssignment& assignment, const PrefillJob& job, JobControl* control,
    const std::function<void(const v1::RankProgress&)>& progress) {
  HW_RETURN_IF_ERROR(options_.backend->Reserve(job));
  last_group_.reset();
  const GroupSpec spec = SpecOf(assignment, job);
  HW_ASSIGN_OR_RETURN(std::unique_ptr<Collectives> collectives, JoinGroup(spec, control));
  Outcome outcome;
  const absl::Status status =
      RunWithSender(assignment, job, spec, collectives.get(), control, progress, &outcome);
  if (!status.ok()) {
    // Whatever broke on the way down, the cause is the cancellation.
    HW_RETURN_IF_ERROR(control->status());
    return status;
  }
  last_group_ = std::move(collectives);
  return outcome;
}

absl::Status PrefillExecutor::RunWithSender(const v1::PrefillAssignment& assignment, const PrefillJob& job,
                                            const GroupSpec& spec, Collectives* collectives,
                                            JobControl* control,
                                            const std::function<void(const v1::RankProgress&)>& progress,
                                            Outcome* outcome) {
  std::unique_ptr<KvSender> sender = MakeSender(assignment, job, options_.kv_channels);
  {
    absl::MutexLock lock(&mutex_);
    alone_ = sender.get();
  }
  PrefillContext context = MakeContext(job, sender.get(), control, progress);
  context.collectives = collectives;
  context.group = &spec;
  context.checkpoints = &checkpoints_;
  context.checkpoint_layers = options_.checkpoint_layers;
  context.measure_link = assignment.measure_links() && collectives != nullptr;
  absl::Status status;
  {
    const JobControl::CancelHook hook(control, [&] {
      sender->Cancel();
      if (collectives != nullptr) collectives->Abort();
    });
    absl::StatusOr<PrefillResult> result = options_.backend->Run(job, context);
    status = result.status();
    if (result.ok()) {
      outcome->result = *std::move(result);
      status = FinishSender(sender.get(), control, outcome);
    }
  }
  outcome->sent = sender->Stats();
  if (!status.ok()) sender->Cancel();
  EndSender(std::move(sender));
  return status;
}

absl::Status PrefillExecutor::FinishSender(KvSender* sender, JobControl* control, Outcome* outcome) {
  const absl::Time computed = Clock::Real()->Now();
  const JobControl::Waiting waiting(control);
  const absl::Status status = sender->Finish();
  outcome->sent_layers = sender->LayerTimes();
  outcome->received = control->created();
  outcome->egress_tail = Clock::Real()->Now() - computed;
  return status;
}

}  // namespace headwater
