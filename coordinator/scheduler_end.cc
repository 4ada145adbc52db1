// Giving up epochs and ending jobs.
#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/closed_text.h"
#include "base/rpc/grpc_status.h"
#include "coordinator/scheduler.h"

namespace headwater {
namespace {

bool IsWaiting(JobPhase phase) { return phase == JobPhase::kWaiting || phase == JobPhase::kQueued; }

double Seconds(const google::protobuf::Duration& duration) {
  return static_cast<double>(duration.seconds()) + 1e-9 * duration.nanos();
}

absl::Status OutOfEpochs(const Job& job, uint32_t max_epochs) {
  const v1::ErrorReason reason = ReasonOf(job.last_loss);
  const bool session = reason == v1::ERROR_REASON_UNKNOWN_SESSION || reason == v1::ERROR_REASON_DECODE_LOST;
  return WithRetryAfter(MakeError(absl::StatusCode::kUnavailable,
                                  session ? v1::ERROR_REASON_DECODE_LOST : v1::ERROR_REASON_WORKER_LOST,
                                  absl::StrCat("request ", job.key.request_id, " was given up after ",
                                               job.epoch, " epochs; the last one: ", job.last_loss.message()),
                                  {{"value", absl::StrCat(job.epoch)}, {"limit", absl::StrCat(max_epochs)}}),
                        absl::Seconds(5));
}

}  // namespace

void Scheduler::SetPhase(Job& job, JobPhase phase) {
  const QueueKey queue_key(-job.request().priority(), job.serial);
  if (job.phase == JobPhase::kQueued) {
    queue_.erase(queue_key);
    const auto queue = queues_.find(job.model.name());
    if (queue != queues_.end() && queue->second.erase(queue_key) > 0 && queue->second.empty())
      queues_.erase(queue);
  }
  const bool was_waiting = IsWaiting(job.phase);
  const bool waits = IsWaiting(phase);
  if (was_waiting && !waits) {
    --waiting_jobs_;
    waiting_tokens_ -= job.num_tokens();
    metrics_->requests_running.Increment();
    metrics_->tokens_running.Increment(static_cast<double>(job.num_tokens()));
  } else if (!was_waiting && waits) {
    ++waiting_jobs_;
    waiting_tokens_ += job.num_tokens();
    metrics_->requests_running.Decrement();
    metrics_->tokens_running.Decrement(static_cast<double>(job.num_tokens()));
  }
  metrics_->requests_waiting.Set(static_cast<double>(waiting_jobs_));
  metrics_->tokens_waiting.Set(static_cast<double>(waiting_tokens_));
  job.phase = phase;
  if (phase != JobPhase::kQueued) return;
  job.queued_at = clock_->Now();
  job.head_since.reset();
  job.unplannable_since.reset();
  queue_.emplace(queue_key, &job);
  queues_[job.model.name()].emplace(queue_key, &job);
  dirty_ = true;
}

void Scheduler::Notify(const Job& job, v1::PrefillResponse event) {
  const auto shared = std::make_shared<const v1::PrefillResponse>(std::move(event));
  for (const auto& watcher : job.watchers) watcher->OnEvent(shared);
}

void Scheduler::ReleaseWorker(const std::string& worker_id, const Job& job) {
  Worker* worker = cluster_.FindWorker(worker_id);
  if (worker != nullptr && worker->Release(job.key.request_id, job.serial, clock_->Now())) dirty_ = true;
}

void Scheduler::LoseWorker(const std::string& worker_id, const absl::Status& why) {
  const std::optional<Worker> worker = cluster_.RemoveWorker(worker_id);
  if (!worker.has_value()) return;
  HW_LOG(INFO)
          .Field("worker", worker_id)
          .Field("requests", static_cast<int64_t>(worker->held.size()))
          .Field("why", why.message())
      << "worker lost";
  metrics_->workers.Set(static_cast<double>(cluster_.workers().size()));
  metrics_->draining_workers.Set(static_cast<double>(cluster_.NumDraining()));
  history_.AddLostWorker(worker_id, why, clock_->Now());
  cluster_changed_ = true;
  worker->link->Close(why);
  for (const auto& [request_id, held] : worker->held) {
    // The end of one job may be that of others.
    if (Job* job = FindJob(held.serial)) LoseRank(*job, worker_id, why);
  }
}

void Scheduler::LoseRank(Job& job, const std::string& worker_id, const absl::Status& why) {
  for (Rank& rank : job.ranks) {
    if (rank.worker_id == worker_id && rank.state != Rank::State::kCompleted) {
      rank.state = Rank::State::kStopped;
    }
  }
  if (job.phase == JobPhase::kStopping) {
    CheckStopped(job.serial);
  } else {
    job.last_loss = why;
    Stop(job, absl::OkStatus());
  }
}

void Scheduler::Stop(Job& job, const absl::Status& status) {
  switch (job.phase) {
    case JobPhase::kWaiting:
      Fail(job, status);
      return;
    case JobPhase::kQueued:
      CloseSession(job, status);
      return;
    case JobPhase::kStopping:
      if (job.stop_status.ok()) job.stop_status = status;
      return;
    case JobPhase::kClosing:
      return;
    case JobPhase::kCommitting:
      if (job.call_in_flight) {
        // The cache may be committed already: the answer decides.
        if (job.stop_status.ok()) job.stop_status = status;
        return;
      }
      break;
    case JobPhase::kOpening:
    case JobPhase::kRunning:
      break;
  }
  const uint64_t serial = job.serial;
  job.epoch_traces.back().set_given_up(ReasonName(ReasonOf(status.ok() ? job.last_loss : status)));
  SetPhase(job, JobPhase::kStopping);
  job.stop_status = status;
  job.stop_deadline = clock_->Now() + options_.abort_wait;
  v1::ConnectResponse abort;
  abort.mutable_abort()->set_request_id(job.key.request_id);
  abort.mutable_abort()->set_epoch(job.epoch);
  std::vector<std::string> unreachable;
  for (Rank& rank : job.ranks) {
    if (rank.state == Rank::State::kReserved) {
      rank.state = Rank::State::kStopped;
      ReleaseWorker(rank.worker_id, job);
    } else if (rank.state == Rank::State::kAssigned) {
      Worker* worker = cluster_.FindWorker(rank.worker_id);
      HW_CHECK(worker != nullptr);
      if (!worker->link->Send(abort)) unreachable.push_back(rank.worker_id);
    }
  }
  for (const std::string& id : unreachable) {
    LoseWorker(id, MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST,
                             absl::StrCat("worker ", id, " cannot be reached")));
  }
  CheckStopped(serial);
}

void Scheduler::CheckStopped(uint64_t serial) {
  Job* job = FindJob(serial);
  if (job == nullptr || job->phase != JobPhase::kStopping || job->call_in_flight) return;
  for (const Rank& rank : job->ranks) {
    if (rank.state == Rank::State::kAssigned || rank.state == Rank::State::kReserved) return;
  }
  job->epoch_traces.back().set_ended_us(TraceMicros(job->arrived, clock_->Now()));
  if (!job->stop_status.ok()) {
    CloseSession(*job, job->stop_status);
  } else if (job->epoch >= options_.max_epochs) {
    CloseSession(*job, OutOfEpochs(*job, options_.max_epochs));
  } else {
    metrics_->retries_total.Increment();
    UpdateResume(*job);
    SetPhase(*job, JobPhase::kQueued);
  }
}

void Scheduler::CloseSession(Job& job, const absl::Status& status) {
  job.stop_status = status;
  if (!job.session_maybe_open) {
    Fail(job, status);
    return;
  }
  SetPhase(job, JobPhase::kClosing);
  v1::AbortSessionRequest request;
  request.set_session_id(job.session_id);
  request.set_session_token(job.session_token);
  // A node that is away frees the session by its lease; the client does not wait for it.
  const DecodeNode* const node = cluster_.FindDecodeNode(job.decode_node);
  const bool away = node == nullptr || !node->connected;
  const absl::Duration timeout = away ? options_.abort_away_timeout : options_.abort_session_timeout;
  decode_->AbortSession(KvAddress(job), std::move(request), timeout,
                        [this, serial = job.serial](const absl::Status& answer) {
                          Job* closing = FindJob(serial);
                          if (closing == nullptr) return;
                          if (!answer.ok()) {
                            // The node's lease frees the session.
                            HW_LOG(INFO)
                                    .Field("request_id", closing->key.request_id)
                                    .Field("session_id", closing->session_id)
                                    .Field("error", answer.message())
                                << "session not aborted";
                          }
                          const absl::Status why = closing->stop_status;
                          Fail(*closing, why);
                          Settle();
                        });
}

// For the cost of prompts like it.
void Scheduler::LearnShares(const Job& job, const RankSums& sums) {
  if (!job.request().policy().parameters().empty() || job.request().has_quality()) return;
  shares_.SetDensity(job.model.name(), job.policy, job.num_tokens(), sums.density);
  if (job.plan.strategy() != v1::STRATEGY_SPARSE || sums.exchange_bytes_allgather == 0) return;
  shares_.SetSelected(
      job.model.name(), job.policy, job.num_tokens(),
      static_cast<double>(sums.exchange_bytes) / static_cast<double>(sums.exchange_bytes_allgather));
}

void Scheduler::Complete(Job& job) {
  const absl::Time now = clock_->Now();
  const absl::StatusOr<RankSums> sums = SumRanks(job);
  HW_CHECK(sums.ok());
  LearnShares(job, *sums);
  auto event = std::make_shared<v1::PrefillResponse>();
  auto* out = event->mutable_completed();
  out->set_request_id(job.key.request_id);
  out->set_epoch(job.epoch);
  out->set_num_tokens(job.num_tokens());
  out->set_decode_node(job.decode_node);
  out->set_decode_address(job.decode_address);
  out->set_session_id(job.session_id);
  out->set_first_token(sums->first_token);
  *out->mutable_top_logprobs() = sums->top_logprobs;
  *out->mutable_stages() = sums->stages;
  SetDuration(*job.started_at - job.accepted_at, out->mutable_stages()->mutable_queue());
  SetDuration(now - job.accepted_at, out->mutable_stages()->mutable_total());
  const double compute_seconds = absl::ToDoubleSeconds(job.computed_at - job.epoch_started_at);
  if (compute_seconds > 0) {
    const double computed = 1 - static_cast<double>(job.resume_layer()) / job.model.num_layers();
    out->set_tokens_per_second(static_cast<double>(job.num_tokens()) * computed / compute_seconds);
  }
  out->set_density(sums->density);
  *out->mutable_attention() = sums->attention;
  out->set_kv_bytes(sums->kv.bytes);
  out->set_kv_blocks(sums->kv.blocks);
  out->set_kv_blocks_resent(sums->kv_blocks_resent);
  out->set_kv_stream_resumes(sums->kv_stream_resumes);
  out->set_exchange_bytes(sums->exchange_bytes);
  out->set_exchange_bytes_allgather(sums->exchange_bytes_allgather);
  out->set_kv_digest(absl::BytesToHexString(sums->kv.digest));
  *out->mutable_layout() = job.layout;
  *out->mutable_plan() = job.plan;
  out->set_retries(job.epoch - 1);
  out->set_resume_layer(job.resume_layer());
  out->set_trace_id(job.prepared.trace.trace_id);
  job.epoch_traces.back().set_ended_us(TraceMicros(job.arrived, now));

  const double egress_seconds = Seconds(out->stages().egress_stall()) + Seconds(out->stages().egress_tail());
  metrics_->queue_seconds.Observe(Seconds(out->stages().queue()));
  metrics_->compute_seconds.Observe(std::max(0.0, compute_seconds - egress_seconds));
  metrics_->egress_seconds.Observe(egress_seconds);
  metrics_->total_seconds.Observe(Seconds(out->stages().total()));
  metrics_->attention_density_ratio.Observe(sums->density);
  metrics_->prompt_tokens_total.Increment(static_cast<double>(job.num_tokens()));
  End(job, std::move(event), absl::OkStatus());
}

void Scheduler::Fail(Job& job, const absl::Status& status) {
  auto event = std::make_shared<v1::PrefillResponse>();
  event->mutable_failed()->set_request_id(job.key.request_id);
  *event->mutable_failed()->mutable_error() = ToRpcStatus(WithClosedText(status));
  End(job, std::move(event), status);
}

void Scheduler::End(Job& job, const std::shared_ptr<const v1::PrefillResponse>& terminal,
                    const absl::Status& status) {
  for (const Rank& rank : job.ranks) ReleaseWorker(rank.worker_id, job);
  // Out of the queue, and out of the gauges.
  SetPhase(job, JobPhase::kClosing);
  metrics_->requests_running.Decrement();
  metrics_->tokens_running.Decrement(static_cast<double>(job.num_tokens()));
  const auto owned = std::move(jobs_.extract(job.serial).mapped());
  if (job.accepted) {
    metrics_->CountEnd(status);
    history_.AddEnded(job, *terminal, status, clock_->Now());
    const bool restartable = absl::IsUnavailable(status) || absl::IsResourceExhausted(status) ||
                             (job.abandoned && absl::IsCancelled(status));
    table_.End(job.key, terminal, restartable, clock_->Now());
    v1::RequestTrace trace = MakeRequestTrace(job);
    trace.set_ended_us(TraceMicros(job.arrived, clock_->Now()));
    trace.set_code(absl::StatusCodeToString(status.code()));
    if (!status.ok()) trace.set_reason(ReasonName(ReasonOf(status)));
    traces_.Put(job.key, std::move(trace));
    for (const auto& watcher : job.watchers) watcher->OnEvent(terminal);
  } else {
    table_.Forget(job.key);
    metrics_->CountRejection(status);
    for (const auto& watcher : job.watchers) watcher->OnRejected(status);
  }
  for (const auto& done : job.cancel_waiters) done(absl::IsCancelled(status));
  for (auto& successor : job.successors) resubmissions_.push_back(std::move(successor));
  HW_LOG(INFO)
          .Field("request_id", job.key.request_id)
          .Field("epoch", job.epoch)
          .Field("code", absl::StatusCodeToString(status.code()))
          .Field("reason", status.ok() ? "" : ReasonName(ReasonOf(status)))
          .Field("seconds", absl::ToDoubleSeconds(clock_->Now() - job.arrived))
          .Field("trace_id", job.prepared.trace.trace_id)
      << (status.ok() ? "request completed" : absl::StrCat("request failed: ", status.message()));
}

}  // namespace headwater
