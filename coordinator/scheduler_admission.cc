// Judging, accepting and starting jobs.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "google/protobuf/util/message_differencer.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "base/status_macros.h"
#include "coordinator/destination.h"
#include "coordinator/explain.h"
#include "coordinator/scheduler.h"

namespace headwater {
namespace {

v1::KvLayout LayoutOf(const v1::PrefillRequest& request, const v1::ServedModel& model) {
  v1::KvLayout layout;
  layout.set_num_layers(model.num_layers());
  layout.set_num_kv_heads(model.num_kv_heads());
  layout.set_head_dim(model.head_dim());
  layout.set_num_tokens(static_cast<uint64_t>(request.token_ids_size()));
  layout.set_block_tokens(request.block_tokens() == 0 ? kDefaultBlockTokens : request.block_tokens());
  layout.set_dtype(request.kv_dtype());
  layout.set_model_fingerprint(model.fingerprint());
  return layout;
}

absl::Status UnknownModel(absl::StatusCode code, const std::string& name,
                          const std::vector<std::string>& served) {
  const std::string value = absl::StrCat("\"", Printable(name), "\"");
  const std::string limit = absl::StrCat("one of {", absl::StrJoin(served, ", "), "}");
  return MakeError(code, v1::ERROR_REASON_UNKNOWN_MODEL,
                   absl::StrCat("model is ", value, "; ", limit, " is wanted"),
                   {{"field", "model"}, {"value", value}, {"limit", limit}});
}

}  // namespace

// Nullopt: no living worker serves it, but one may come.
absl::StatusOr<std::optional<ModelView>> Scheduler::FindModelFor(const v1::PrefillRequest& request) const {
  const std::vector<std::string> living = cluster_.LivingModels();
  if (living.empty()) return std::nullopt;
  if (request.model().empty() && living.size() > 1) {
    return UnknownModel(absl::StatusCode::kInvalidArgument, "", living);
  }
  const std::string& name = request.model().empty() ? living.front() : request.model();
  std::optional<ModelView> view = cluster_.FindModel(name);
  if (!view.has_value() && !cluster_.WasServed(name)) {
    return UnknownModel(absl::StatusCode::kNotFound, name, living);
  }
  return view;
}

// True: `job` can be accepted, and knows its model, layout and provisional plan. False: too few workers are
// there to tell.
absl::StatusOr<bool> Scheduler::Judge(Job& job) {
  HW_ASSIGN_OR_RETURN(const std::optional<ModelView> view, FindModelFor(job.request()));
  if (!view.has_value()) {
    job.unplannable = absl::UnavailableError("no worker is registered");
    return false;
  }
  const v1::AttentionPolicy& asked = job.request().policy();
  const std::string policy = asked.name().empty() ? view->default_policy : asked.name();
  HW_RETURN_IF_ERROR(
      CheckAgainstModel(job.prepared, view->model, view->policies, policy, view->serves_quality));
  job.model = view->model;
  job.policy = policy;
  // Only with default parameters is it known when the policy goes dense.
  const bool as_known = policy == "dense" || (asked.parameters().empty() && !job.request().has_quality());
  const auto below = view->dense_below.find(policy);
  job.dense_below = as_known && below != view->dense_below.end() ? below->second : 0;
  job.layout = LayoutOf(job.request(), view->model);
  HW_RETURN_IF_ERROR(PickDecodeNode(job.request(), job.layout, cluster_).status());
  Planned planned = PlanOverLiving(job);
  if (absl::IsUnavailable(planned.plan.status())) {
    job.unplannable = planned.plan.status();
    return false;
  }
  if (!planned.plan.ok()) return planned.plan.status();
  job.plan = *std::move(planned.plan);
  job.explanation = std::move(planned.explanation);
  return true;
}

Scheduler::Planned Scheduler::PlanOverLiving(const Job& job) const {
  Planned planned;
  planned.needs = {job.model.name(), job.policy, job.request().has_quality()};
  std::vector<PlanWorker> living = cluster_.LivingWorkers(planned.needs);
  PlanSpec& spec = planned.spec;
  spec.num_tokens = job.num_tokens();
  // A wish for a number of workers is binding for the first epoch. After a loss the prompt goes on with those
  // that are left.
  spec.world_size = job.request().world_size();
  if (job.epoch > 0) spec.world_size = std::min(spec.world_size, static_cast<uint32_t>(living.size()));
  spec.partition = job.request().partition();
  spec.strategy = job.request().strategy();
  spec.block_tokens = job.layout.block_tokens();
  spec.context_parallel_min_tokens = options_.context_parallel_min_tokens;
  spec.policy = job.policy;
  spec.quality = planned.needs.quality;
  // An epoch that goes on wants all that hold a checkpoint, not the fastest.
  if (!job.resume.has_value()) spec.model = job.model;
  SetExpectedShares(job, &spec);
  spec.kv_bytes_per_token = KvBytes(job.layout) / job.num_tokens();
  v1::PlanExplanation* const explanation = job.request().explain() ? &planned.explanation : nullptr;
  planned.plan = MakePlan(spec, living, explanation);
  if (absl::IsFailedPrecondition(planned.plan.status()) && !job.request().policy().parameters().empty()) {
    // Nobody knows what a worker holds with these parameters but the worker, which says so if it is too much.
    planned.needs.by_limits = false;
    planned.plan = MakePlan(spec, cluster_.LivingWorkers(planned.needs), explanation);
  }
  return planned;
}

void Scheduler::SetExpectedShares(const Job& job, PlanSpec* spec) const {
  if (job.dense()) return;
  // With parameters or a quality of their own they may read anything: at most all.
  if (job.request().policy().parameters().empty() && !job.request().has_quality()) {
    const ShareHistory::Shares last = shares_.Find(job.model.name(), job.policy, job.num_tokens());
    spec->density = last.density;
    spec->selected = last.selected;
  }
  const double bound = job.request().quality().max_density();
  if (bound > 0) spec->density = std::min(spec->density, bound);
}

v1::PrefillResponse Scheduler::MakeAccepted(const Job& job) const {
  v1::PrefillResponse event;
  auto* accepted = event.mutable_accepted();
  accepted->set_request_id(job.key.request_id);
  *accepted->mutable_plan() = job.plan;
  accepted->set_trace_id(job.prepared.trace.trace_id);
  if (job.request().explain()) *accepted->mutable_explanation() = job.explanation;
  if (job.phase == JobPhase::kQueued) {
    const auto it = queue_.find(QueueKey(-job.request().priority(), job.serial));
    accepted->set_queue_position(static_cast<uint32_t>(std::distance(queue_.begin(), it)));
  }
  return event;
}

void Scheduler::Accept(Job& job) {
  const absl::Time now = clock_->Now();
  job.accepted = true;
  job.accepted_at = now;
  if (job.request().has_deadline()) {
    const auto& deadline = job.request().deadline();
    job.deadline = now + absl::Seconds(deadline.seconds()) + absl::Nanoseconds(deadline.nanos());
  }
  job.session_id = RandomId();
  job.session_token = RandomId();
  metrics_->request_prompt_tokens.Observe(static_cast<double>(job.num_tokens()));
  SetPhase(job, JobPhase::kQueued);
  Notify(job, MakeAccepted(job));
  dirty_ = true;
}

void Scheduler::AdmitWaiting() {
  std::vector<uint64_t> waiting;
  for (const auto& [serial, job] : jobs_) {
    if (job->phase == JobPhase::kWaiting) waiting.push_back(serial);
  }
  for (const uint64_t serial : waiting) {
    Job* job = FindJob(serial);
    if (job == nullptr) continue;
    const absl::StatusOr<bool> ready = Judge(*job);
    if (!ready.ok()) {
      Stop(*job, ready.status());
    } else if (*ready) {
      Accept(*job);
    }
  }
}

void Scheduler::Dispatch() {
  std::vector<std::string> models;
  for (const auto& [model, queue] : queues_) models.push_back(model);
  for (const std::string& model : models) DispatchModel(model);
}

// Looks at no more jobs than it starts, one that cannot start, and those that no living workers can run.
void Scheduler::DispatchModel(const std::string& model) {
  std::optional<QueueKey> last;
  for (;;) {
    const auto queue = queues_.find(model);
    if (queue == queues_.end()) return;
    const auto next = last.has_value() ? queue->second.upper_bound(*last) : queue->second.begin();
    if (next == queue->second.end()) return;
    last = next->first;
    if (TryStart(*next->second) == Start::kReserving) return;
  }
}

Scheduler::Start Scheduler::TryStart(Job& job) {
  const absl::Time now = clock_->Now();
  // As long as the workers are the same ones, so is the answer.
  if (job.unplannable_since.has_value() && job.unplannable_version == cluster_.version()) {
    return Start::kUnplannable;
  }
  auto [needs, spec, plan, explanation] = PlanOverLiving(job);
  if (!plan.ok()) {
    if (!job.unplannable_since.has_value()) job.unplannable_since = now;
    job.unplannable_version = cluster_.version();
    job.unplannable = plan.status();
    return Start::kUnplannable;
  }
  job.unplannable_since.reset();

  const bool free_choice = spec.world_size == 0;
  const PackedPrompt prompt{job.key.request_id, job.num_tokens()};
  const bool packable = plan->world_size() == 1 && job.dense();
  spec.world_size = plan->world_size();
  FreePlan free = PlanOverFree(job, needs, spec, packable ? &prompt : nullptr);
  if (!free.plan.ok()) {
    if (!job.head_since.has_value()) job.head_since = now;
    // Idle workers wait for the busy ones only so long; then the job takes what there is.
    if (free_choice && now - *job.head_since >= options_.reserve_wait) {
      spec.world_size = 0;
      free = PlanOverFree(job, needs, spec, nullptr);
      explanation = std::move(free.explanation);
    }
  }
  if (!free.plan.ok()) return Start::kReserving;
  job.explanation = std::move(explanation);
  const absl::Status status = StartEpoch(job, std::move(free));
  if (!status.ok()) Stop(job, status);
  return Start::kStarted;
}

Scheduler::FreePlan Scheduler::PlanOverFree(const Job& job, const WorkerNeeds& needs, const PlanSpec& spec,
                                            const PackedPrompt* prompt) {
  std::vector<PlanWorker> free = cluster_.FreeWorkers(needs, prompt);
  FreePlan resumed = PlanResumed(job, spec, free);
  if (resumed.providers.ok()) return resumed;
  FreePlan planned{absl::UnknownError(""), resumed.providers.status()};
  planned.plan = MakePlan(spec, free, job.request().explain() ? &planned.explanation : nullptr);
  return planned;
}

// Whether the plan's worker computes the prompt together with others.
bool Scheduler::IsPacked(const Job& job, const v1::PrefillPlan& plan) {
  return plan.world_size() == 1 && job.dense() &&
         cluster_.FindWorker(plan.worker_ids(0))->Packs(job.num_tokens());
}

absl::Status Scheduler::StartEpoch(Job& job, FreePlan free) {
  if (job.decode_node.empty() || cluster_.FindDecodeNode(job.decode_node) == nullptr) {
    absl::StatusOr<std::string> picked = PickDecodeNode(job.request(), job.layout, cluster_);
    if (absl::IsNotFound(picked.status())) {
      // It was there when the request was accepted.
      return MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DECODE_LOST,
                       picked.status().message());
    }
    if (!picked.ok()) return picked.status();
    job.decode_node = *std::move(picked);
    DropResume(job, "the decode node is another one");
  }
  if (job.epoch == 0) cluster_.FindDecodeNode(job.decode_node)->unreported_bytes += KvBytes(job.layout);

  const absl::Time now = clock_->Now();
  ++job.epoch;
  if (!job.started_at.has_value()) job.started_at = now;
  job.epoch_started_at = now;
  job.plan_announced =
      job.epoch == 1 && google::protobuf::util::MessageDifferencer::Equals(*free.plan, job.plan);
  job.plan = *std::move(free.plan);
  if (!free.providers.ok()) {
    DropResume(job, free.providers.status().message());
  } else if (job.resume.has_value()) {
    job.resume->point.mutable_providers()->Assign(free.providers->begin(), free.providers->end());
  }
  job.state_lost = false;
  job.ranks.clear();
  const bool packed = IsPacked(job, job.plan);
  for (const std::string& worker_id : job.plan.worker_ids()) {
    cluster_.FindWorker(worker_id)->Hold(job.key.request_id,
                                         {job.serial, job.epoch, job.num_tokens(), packed});
    job.ranks.emplace_back().worker_id = worker_id;
  }
  job.away_since.reset();
  v1::EpochTrace& trace = job.epoch_traces.emplace_back();
  trace.set_epoch(job.epoch);
  *trace.mutable_plan() = job.plan;
  trace.set_started_us(TraceMicros(job.arrived, now));
  SetPhase(job, JobPhase::kOpening);
  HW_LOG(INFO)
          .Field("request_id", job.key.request_id)
          .Field("epoch", job.epoch)
          .Field("tokens", static_cast<int64_t>(job.num_tokens()))
          .Field("plan", DescribePlan(job.plan))
          .Field("workers", absl::StrJoin(job.plan.worker_ids(), ","))
          .Field("decode_node", job.decode_node)
          .Field("resume_layer", job.resume_layer())
          .Field("trace_id", job.prepared.trace.trace_id)
      << "epoch started";
  OpenSession(job);
  return absl::OkStatus();
}

}  // namespace headwater
