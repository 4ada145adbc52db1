// One epoch of a job: session, ranks, commit.
#include <algorithm>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/epoch_token.h"
#include "base/rpc/grpc_status.h"
#include "coordinator/destination.h"
#include "coordinator/scheduler.h"

namespace headwater {
namespace {

// The node may be away, or has more session calls than it takes at once, as when passes of prompts start
// together.
bool MayAnswerLater(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
         ReasonOf(status) == v1::ERROR_REASON_QUEUE_FULL;
}

bool SessionUnknown(const absl::Status& status) {
  return ReasonOf(status) == v1::ERROR_REASON_UNKNOWN_SESSION;
}

// The session or a checkpoint is gone: the next epoch cannot go on from there.
bool StateLost(const absl::Status& failure) {
  const v1::ErrorReason reason = ReasonOf(failure);
  return reason == v1::ERROR_REASON_UNKNOWN_SESSION || reason == v1::ERROR_REASON_DECODE_LOST ||
         reason == v1::ERROR_REASON_CHECKPOINT_LOST;
}

absl::Status DecodeLost(const Job& job, const absl::Status& why) {
  return WithRetryAfter(MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DECODE_LOST,
                                  absl::StrCat("decode node ", job.decode_node, " was lost during request ",
                                               job.key.request_id, ": ", why.message()),
                                  {{"decode_node", job.decode_node}}),
                        absl::Seconds(1));
}

// What a rank's failure means for its job; OK: another epoch may do better.
absl::Status Verdict(const Job& job, const absl::Status& failure) {
  const v1::ErrorReason reason = ReasonOf(failure);
  // The node is there, but has lost the session (the workers' senders say DECODE_LOST then): it is opened
  // anew.
  if (SessionUnknown(failure) || reason == v1::ERROR_REASON_DECODE_LOST) return absl::OkStatus();
  if (reason == v1::ERROR_REASON_KV_STREAM_STALLED) return DecodeLost(job, failure);
  if (absl::IsUnavailable(failure) || absl::IsAborted(failure)) return absl::OkStatus();
  return failure;
}

}  // namespace

// The node's address as of now: a restarted node may have another.
const std::string& Scheduler::KvAddress(Job& job) {
  if (const DecodeNode* node = cluster_.FindDecodeNode(job.decode_node)) {
    job.kv_address = node->registration.kv_address();
    job.decode_address = node->registration.decode_address();
  }
  return job.kv_address;
}

void Scheduler::OpenSession(Job& job) {
  v1::OpenSessionRequest request;
  request.set_session_id(job.session_id);
  request.set_request_id(job.key.request_id);
  request.set_epoch(job.epoch);
  request.set_resume_layer(job.resume_layer());
  *request.mutable_layout() = job.layout;
  request.set_session_token(job.session_token);
  const DecodeNode* const node = cluster_.FindDecodeNode(job.decode_node);
  job.epoch_tokens = node != nullptr && node->registration.epoch_tokens();
  request.set_epoch_tokens(job.epoch_tokens);
  request.set_traceparent(job.prepared.trace.Traceparent());
  job.session_maybe_open = true;
  job.call_in_flight = true;
  decode_->OpenSession(KvAddress(job), std::move(request), options_.open_timeout,
                       [this, serial = job.serial](const absl::Status& status) {
                         OnOpened(serial, Bounded(status));
                         Settle();
                       });
}

void Scheduler::OnOpened(uint64_t serial, const absl::Status& status) {
  Job* job = FindJob(serial);
  if (job == nullptr) return;
  job->call_in_flight = false;
  if (job->phase != JobPhase::kOpening) {
    CheckStopped(serial);
    return;
  }
  if (status.ok()) {
    job->away_since.reset();
    AssignRanks(*job);
  } else if (SessionUnknown(status) && job->resume.has_value()) {
    DropResume(*job, "the decode node has lost the session");
    OpenSession(*job);
  } else if (MayAnswerLater(status)) {
    HandleAwayNode(*job, status);
  } else {
    Stop(*job, status);
  }
}

void Scheduler::HandleAwayNode(Job& job, const absl::Status& status) {
  const absl::Time now = clock_->Now();
  if (!job.away_since.has_value()) job.away_since = now;
  if (now - *job.away_since >= options_.decode_grace) {
    Stop(job, DecodeLost(job, status));
  } else {
    job.retry_call_at = now + options_.decode_retry_interval;
  }
}

v1::PrefillAssignment Scheduler::MakeAssignment(const Job& job, uint32_t rank,
                                                const std::string& rendezvous) const {
  v1::PrefillAssignment out;
  out.set_request_id(job.key.request_id);
  out.set_epoch(job.epoch);
  out.set_rank(rank);
  *out.mutable_plan() = job.plan;
  if (job.plan.world_size() > 1) out.set_rendezvous_address(rendezvous);
  *out.mutable_token_ids() = job.request().token_ids();
  *out.mutable_policy() = job.request().policy();
  out.mutable_policy()->set_name(job.policy);
  if (job.request().has_quality()) *out.mutable_quality() = job.request().quality();
  *out.mutable_layout() = job.layout;
  auto* destination = out.mutable_destination();
  destination->set_decode_node(job.decode_node);
  destination->set_kv_address(job.kv_address);
  destination->set_session_id(job.session_id);
  destination->set_session_token(job.epoch_tokens ? EpochToken(job.session_token, job.session_id, job.epoch)
                                                  : job.session_token);
  out.set_top_logprobs(job.request().top_logprobs());
  out.set_tenant(job.key.tenant);
  out.set_traceparent(job.prepared.trace.Traceparent());
  out.set_tracestate(job.prepared.trace.state);
  if (job.resume.has_value()) *out.mutable_resume() = job.resume->point;
  out.set_measure_links(MeasuresLinks(job));
  if (job.deadline != absl::InfiniteFuture()) {
    out.set_deadline_ms(
        static_cast<uint64_t>(std::max<int64_t>(1, absl::ToInt64Milliseconds(job.deadline - clock_->Now()))));
  }
  return out;
}

// Where all ranks can, and of one at least the last measurement is forgotten.
bool Scheduler::MeasuresLinks(const Job& job) const {
  if (job.ranks.size() < 2) return false;
  bool known = true;
  for (const Rank& rank : job.ranks) {
    const auto worker = cluster_.workers().find(rank.worker_id);
    if (worker == cluster_.workers().end() || !worker->second.registration.measures_links()) return false;
    known = known && worker->second.found.link_bytes_per_s() > 0;
  }
  return !known;
}

void Scheduler::AssignRanks(Job& job) {
  SetPhase(job, JobPhase::kRunning);
  if (job.resume.has_value()) metrics_->resumed_epochs_total.Increment();
  job.epoch_started_at = clock_->Now();
  job.epoch_traces.back().set_resume_layer(job.resume_layer());
  job.epoch_traces.back().set_assigned_us(TraceMicros(job.arrived, job.epoch_started_at));
  const Worker* first = cluster_.FindWorker(job.ranks.front().worker_id);
  HW_CHECK(first != nullptr);
  const std::string rendezvous = first->registration.rendezvous_address();
  std::vector<std::string> unreachable;
  for (size_t rank = 0; rank < job.ranks.size(); ++rank) {
    Worker* worker = cluster_.FindWorker(job.ranks[rank].worker_id);
    HW_CHECK(worker != nullptr && worker->held.contains(job.key.request_id));
    job.ranks[rank].state = Rank::State::kAssigned;
    job.ranks[rank].connection = worker->connection;
    v1::ConnectResponse message;
    *message.mutable_assignment() = MakeAssignment(job, static_cast<uint32_t>(rank), rendezvous);
    if (!worker->link->Send(std::move(message))) unreachable.push_back(job.ranks[rank].worker_id);
  }
  if (!job.plan_announced) EmitProgress(job, clock_->Now());
  for (const std::string& id : unreachable) {
    LoseWorker(id, MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST,
                             absl::StrCat("worker ", id, " cannot be reached")));
  }
}

// Null: the report is not of an assignment that the worker has (late, or invented) and means nothing.
Rank* Scheduler::FindRank(const Worker& worker, const std::string& request_id, uint32_t epoch, uint32_t rank,
                          Job** job) {
  const auto held = worker.held.find(request_id);
  if (held == worker.held.end() || held->second.epoch != epoch) return nullptr;
  *job = FindJob(held->second.serial);
  if (*job == nullptr) return nullptr;
  auto& ranks = (*job)->ranks;
  if (rank >= ranks.size() || ranks[rank].worker_id != worker.registration.worker_id()) return nullptr;
  return ranks[rank].state == Rank::State::kAssigned ? &ranks[rank] : nullptr;
}

void Scheduler::OnRankProgress(Worker& worker, const v1::RankProgress& progress) {
  Job* job = nullptr;
  Rank* rank = FindRank(worker, progress.request_id(), progress.epoch(), progress.rank(), &job);
  if (rank == nullptr) return;
  if (progress.layers_done() > job->model.num_layers() ||
      progress.layers_done() < rank->progress.layers_done()) {
    return;
  }
  if (progress.has_checkpoint()) {
    // A rank alone has nobody to hand its state to.
    const bool possible =
        job->ranks.size() > 1 && KeepCheckpoint(progress.checkpoint(), job->resume_layer(),
                                                job->model.num_layers(), &rank->checkpoints);
    if (!possible) return;
  }
  rank->progress = progress;
  rank->progress.clear_checkpoint();
  rank->progress.mutable_attention()->clear_groups();  // progress carries none, and they would be kept
  BoundLayers(*job, rank->progress.mutable_layer_densities(), rank->progress.mutable_layer_recalls());
  // Where the epoch is being given up, only the checkpoints count.
  if (job->phase != JobPhase::kRunning) return;
  job->progress_pending = true;
  EmitProgress(*job, clock_->Now());
}

void Scheduler::EmitProgress(Job& job, absl::Time now) {
  if (job.plan_announced && now - job.last_progress_at < options_.progress_interval) return;
  v1::PrefillResponse event;
  *event.mutable_progress() = MakeProgress(job, now);
  if (!job.plan_announced) {
    *event.mutable_progress()->mutable_plan() = job.plan;
    if (job.request().explain()) *event.mutable_progress()->mutable_explanation() = job.explanation;
  }
  job.plan_announced = true;
  job.progress_pending = false;
  job.last_progress_at = now;
  Notify(job, std::move(event));
}

void Scheduler::OnRankCompleted(Worker& worker, const v1::RankCompleted& completed) {
  Job* job = nullptr;
  Rank* rank = FindRank(worker, completed.request_id(), completed.epoch(), completed.rank(), &job);
  if (rank == nullptr) return;
  const absl::Status valid = CheckCompletion(*job, completed);
  AddRankTimeline(*job, completed.rank(), completed.trace(), clock_->Now(), &job->epoch_traces.back());
  rank->completed = completed;
  rank->completed.clear_trace();
  if (valid.ok()) cluster_.FoundLinks(&worker, completed.links(), clock_->Now());
  BoundLayers(*job, rank->completed.mutable_layer_densities(), rank->completed.mutable_layer_recalls());
  rank->state = valid.ok() ? Rank::State::kCompleted : Rank::State::kStopped;
  ReleaseWorker(rank->worker_id, *job);
  if (job->phase == JobPhase::kStopping) {
    CheckStopped(job->serial);
  } else if (!valid.ok()) {
    Stop(*job, valid);
  } else {
    const bool all = std::all_of(job->ranks.begin(), job->ranks.end(),
                                 [](const Rank& r) { return r.state == Rank::State::kCompleted; });
    if (all) StartCommit(*job);
  }
}

void Scheduler::OnRankFailed(Worker& worker, const v1::RankFailed& failed) {
  Job* job = nullptr;
  Rank* rank = FindRank(worker, failed.request_id(), failed.epoch(), failed.rank(), &job);
  if (rank == nullptr) return;
  absl::Status failure = Bounded(FromRpcStatus(failed.error()));
  if (failure.ok()) {
    failure = MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL,
                        absl::StrCat("worker ", rank->worker_id, " failed without saying why"));
  }
  HW_LOG(INFO)
          .Field("request_id", job->key.request_id)
          .Field("epoch", job->epoch)
          .Field("rank", failed.rank())
          .Field("worker", rank->worker_id)
          .Field("error", failure.ToString(absl::StatusToStringMode::kWithNoExtraData))
          .Field("trace_id", job->prepared.trace.trace_id)
      << "rank failed";
  if (ReasonOf(failure) == v1::ERROR_REASON_DRAINING) SetDraining(&worker, "it refused an assignment");
  if (StateLost(failure)) job->state_lost = true;
  rank->state = Rank::State::kStopped;
  ReleaseWorker(rank->worker_id, *job);
  const absl::Status verdict = Verdict(*job, failure);
  if (job->phase == JobPhase::kStopping) {
    // The peers of a rank that fails for good may report their broken collective first.
    const bool answer = absl::IsCancelled(failure);
    if (job->stop_status.ok() && !answer && !verdict.ok()) job->stop_status = verdict;
    CheckStopped(job->serial);
    return;
  }
  job->last_loss = failure;
  Stop(*job, verdict);
}

void Scheduler::StartCommit(Job& job) {
  job.computed_at = clock_->Now();
  job.epoch_traces.back().set_computed_us(TraceMicros(job.arrived, job.computed_at));
  const absl::StatusOr<RankSums> sums = SumRanks(job);
  if (!sums.ok()) {
    Stop(job, sums.status());
    return;
  }
  job.away_since.reset();
  SetPhase(job, JobPhase::kCommitting);
  CommitSession(job);
}

void Scheduler::CommitSession(Job& job) {
  const absl::StatusOr<RankSums> sums = SumRanks(job);
  HW_CHECK(sums.ok());
  v1::CommitSessionRequest request;
  request.set_session_id(job.session_id);
  request.set_session_token(job.session_token);
  request.set_epoch(job.epoch);
  request.set_kv_digest(sums->kv.digest);
  request.set_first_token(sums->first_token);
  *request.mutable_token_ids() = job.request().token_ids();
  *request.mutable_top_logprobs() = sums->top_logprobs;
  job.call_in_flight = true;
  decode_->CommitSession(KvAddress(job), std::move(request), options_.commit_timeout,
                         [this, serial = job.serial](const absl::Status& status) {
                           OnCommitted(serial, Bounded(status));
                           Settle();
                         });
}

void Scheduler::OnCommitted(uint64_t serial, const absl::Status& status) {
  Job* job = FindJob(serial);
  if (job == nullptr) return;
  job->call_in_flight = false;
  if (job->phase != JobPhase::kCommitting) {
    CheckStopped(serial);
    return;
  }
  const absl::Status asked_to_stop = std::exchange(job->stop_status, absl::OkStatus());
  if (status.ok()) {
    Complete(*job);
  } else if (!asked_to_stop.ok()) {
    Stop(*job, asked_to_stop);
  } else if (SessionUnknown(status)) {
    job->last_loss = status;
    job->state_lost = true;
    Stop(*job, absl::OkStatus());
  } else if (MayAnswerLater(status)) {
    HandleAwayNode(*job, status);
  } else {
    Stop(*job, status);
  }
}

}  // namespace headwater
