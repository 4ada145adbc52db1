#include "coordinator/scheduler.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

JobKey KeyOf(const v1::PrefillRequest& request) { return {request.tenant(), request.request_id()}; }

absl::Duration ToDuration(const google::protobuf::Duration& duration) {
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

absl::Status Draining() {
  return WithRetryAfter(MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING,
                                  "the coordinator is shutting down"),
                        absl::Seconds(1));
}

absl::Status QueueFull(absl::string_view what, uint64_t value, uint64_t limit) {
  return WithRetryAfter(
      MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_FULL,
                absl::StrCat("the queue would hold ", value, " ", what, "; at most ", limit, " are allowed"),
                {{"value", absl::StrCat(value)}, {"limit", absl::StrCat(limit)}}),
      absl::Seconds(1));
}

absl::Status UnknownRequest(const JobKey& key) {
  return MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_REQUEST,
                   absl::StrCat("request_id \"", Printable(key.request_id), "\" is not known"),
                   {{"value", Printable(key.request_id)}});
}

}  // namespace

Scheduler::Scheduler(const CoordinatorOptions& options, const Clock* clock, DecodeClient* decode,
                     CoordinatorMetrics* metrics)
    : options_(options),
      clock_(clock),
      decode_(decode),
      metrics_(metrics),
      table_(options.retention, options.max_retained),
      traces_(options.trace_memory),
      history_(clock->Now()) {}

Job* Scheduler::FindJob(uint64_t serial) {
  const auto it = jobs_.find(serial);
  return it == jobs_.end() ? nullptr : it->second.get();
}

void Scheduler::Reject(const std::shared_ptr<JobWatcher>& watcher, const absl::Status& status) {
  metrics_->CountRejection(status);
  watcher->OnRejected(status);
}

void Scheduler::Submit(PreparedRequest prepared, std::shared_ptr<JobWatcher> watcher) {
  SubmitUnsettled(std::move(prepared), std::move(watcher));
  Settle();
}

void Scheduler::SubmitUnsettled(PreparedRequest prepared, std::shared_ptr<JobWatcher> watcher) {
  const absl::Time now = clock_->Now();
  table_.Expire(now);
  const JobKey key = KeyOf(*prepared.request);
  if (const RequestTable::Record* record = table_.Find(key)) {
    if (record->content_hash != prepared.content_hash) {
      Reject(watcher, MakeError(absl::StatusCode::kAlreadyExists, v1::ERROR_REASON_REQUEST_ID_CONFLICT,
                                absl::StrCat("request_id ", key.request_id,
                                             " is known with other content; a new request needs a new id"),
                                {{"value", key.request_id}, {"limit", "one content per id"}}));
      return;
    }
    if (record->terminal == nullptr) {
      Attach(*FindJob(record->serial), std::move(prepared), std::move(watcher));
      return;
    }
    if (!record->restartable) {
      watcher->OnEvent(record->terminal);
      return;
    }
    table_.Forget(key);
  }
  if (draining_) {
    Reject(watcher, Draining());
    return;
  }

  auto owned = std::make_unique<Job>();
  Job& job = *owned;
  job.serial = next_serial_++;
  job.key = key;
  job.prepared = std::move(prepared);
  job.detached = job.prepared.detached;
  job.arrived = now;
  job.arrived_wall = WallNow();
  absl::StatusOr<bool> ready = Judge(job);
  const absl::Status room = ready.ok() ? CheckQueueRoom(job) : ready.status();
  if (!room.ok()) {
    Reject(watcher, room);
    return;
  }
  job.watchers.push_back(std::move(watcher));
  table_.Start(job.key, job.prepared.content_hash, job.serial);
  jobs_.emplace(job.serial, std::move(owned));
  ++waiting_jobs_;
  waiting_tokens_ += job.num_tokens();
  SetPhase(job, JobPhase::kWaiting);
  if (*ready) Accept(job);
}

absl::Status Scheduler::CheckQueueRoom(const Job& job) const {
  if (waiting_jobs_ + 1 > options_.max_queue_requests) {
    return QueueFull("requests", waiting_jobs_ + 1, options_.max_queue_requests);
  }
  if (waiting_tokens_ + job.num_tokens() > options_.max_queue_tokens) {
    return QueueFull("tokens", waiting_tokens_ + job.num_tokens(), options_.max_queue_tokens);
  }
  return absl::OkStatus();
}

void Scheduler::Attach(Job& job, PreparedRequest prepared, std::shared_ptr<JobWatcher> watcher) {
  if (job.abandoned) {
    job.successors.emplace_back(std::move(prepared), std::move(watcher));
    return;
  }
  job.detached = job.detached || prepared.detached;
  if (job.accepted) watcher->OnEvent(std::make_shared<v1::PrefillResponse>(MakeAccepted(job)));
  job.watchers.push_back(std::move(watcher));
}

void Scheduler::Watch(const JobKey& key, std::shared_ptr<JobWatcher> watcher) {
  table_.Expire(clock_->Now());
  const RequestTable::Record* record = table_.Find(key);
  if (record == nullptr) {
    watcher->OnRejected(UnknownRequest(key));
    return;
  }
  if (record->terminal != nullptr) {
    watcher->OnEvent(record->terminal);
    return;
  }
  Job& job = *FindJob(record->serial);
  if (job.accepted) watcher->OnEvent(std::make_shared<v1::PrefillResponse>(MakeAccepted(job)));
  job.watchers.push_back(std::move(watcher));
}

absl::StatusOr<v1::PrefillResponse> Scheduler::Get(const JobKey& key) {
  const absl::Time now = clock_->Now();
  table_.Expire(now);
  const RequestTable::Record* record = table_.Find(key);
  if (record == nullptr) return UnknownRequest(key);
  if (record->terminal != nullptr) return *record->terminal;
  const Job& job = *FindJob(record->serial);
  v1::PrefillResponse last;
  if (job.accepted && job.phase == JobPhase::kRunning) {
    *last.mutable_progress() = MakeProgress(job, now);
  } else if (job.accepted) {
    last = MakeAccepted(job);
  }
  return last;
}

void Scheduler::Detach(const std::vector<JobWatch>& watches) {
  for (const JobWatch& watch : watches) DetachUnsettled(watch);
  Settle();
}

void Scheduler::DetachUnsettled(const JobWatch& watch) {
  const RequestTable::Record* record = table_.Find(watch.key);
  Job* job = record == nullptr ? nullptr : FindJob(record->serial);
  if (job == nullptr) return;
  const auto successor = std::find_if(job->successors.begin(), job->successors.end(),
                                      [&](const auto& entry) { return entry.second == watch.watcher; });
  if (successor != job->successors.end() && !successor->first.detached) job->successors.erase(successor);
  const auto it = std::find(job->watchers.begin(), job->watchers.end(), watch.watcher);
  if (it == job->watchers.end()) return;
  job->watchers.erase(it);
  if (!job->watchers.empty() || job->detached) return;
  job->abandoned = true;
  Stop(*job, MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED,
                       absl::StrCat("the client of request ", watch.key.request_id, " went away")));
}

void Scheduler::Cancel(const JobKey& key, std::function<void(absl::StatusOr<bool>)> done) {
  const RequestTable::Record* record = table_.Find(key);
  if (record == nullptr) {
    done(UnknownRequest(key));
    return;
  }
  Job* job = FindJob(record->serial);
  if (job == nullptr) {
    done(false);
    return;
  }
  job->cancel_waiters.emplace_back(std::move(done));
  Stop(*job, MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED,
                       absl::StrCat("request ", key.request_id, " was cancelled")));
  Settle();
}

void Scheduler::Tick() {
  const absl::Time now = clock_->Now();
  TickPeers(now);
  std::vector<uint64_t> serials;
  serials.reserve(jobs_.size());
  for (const auto& [serial, job] : jobs_) serials.push_back(serial);
  for (const uint64_t serial : serials) {
    if (Job* job = FindJob(serial)) TickJob(*job, now);
  }
  table_.Expire(now);
  if (!queue_.empty()) dirty_ = true;
  last_tick_ = now;
  Settle();
}

void Scheduler::TickPeers(absl::Time now) {
  const absl::Duration silence = options_.heartbeat_interval * 3.5;
  // Where this process itself stood still, the heartbeats wait in its own buffers.
  const bool stood_still = last_tick_.has_value() && now - *last_tick_ > options_.heartbeat_interval;
  std::vector<std::string> lost;
  for (auto& [id, worker] : cluster_.workers()) {
    if (stood_still) worker.last_heard = std::max(worker.last_heard, now - options_.heartbeat_interval);
    if (now - worker.last_heard > silence) lost.push_back(id);
  }
  for (const std::string& id : lost) {
    LoseWorker(id, MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST,
                             absl::StrCat("worker ", id, " has not been heard of for ",
                                          absl::FormatDuration(silence))));
  }
  cluster_.ForgetLinks(now);
  auto& nodes = cluster_.decode_nodes();
  for (auto it = nodes.begin(); it != nodes.end();) {
    DecodeNode& node = it->second;
    if (stood_still) node.last_heard = std::max(node.last_heard, now - options_.heartbeat_interval);
    if (node.connected && now - node.last_heard > silence) {
      node.link->Close(absl::UnavailableError("no heartbeat came in time"));
      OnDecodeClosed(node.connection);
    }
    const bool forget = !node.connected && now - node.disconnected_at > options_.decode_grace;
    it = forget ? nodes.erase(it) : std::next(it);
  }
}

void Scheduler::TickJob(Job& job, absl::Time now) {
  const bool failing = job.phase == JobPhase::kClosing || !job.stop_status.ok();
  if (now >= job.deadline && !failing) {
    Stop(job, MakeError(absl::StatusCode::kDeadlineExceeded, v1::ERROR_REASON_DEADLINE,
                        absl::StrCat("request ", job.key.request_id, " passed its deadline"),
                        {{"limit", absl::FormatDuration(ToDuration(job.request().deadline()))}}));
    return;
  }
  switch (job.phase) {
    case JobPhase::kWaiting:
    case JobPhase::kQueued: {
      const std::optional<absl::Time> since =
          job.phase == JobPhase::kWaiting ? job.arrived : job.unplannable_since;
      if (since.has_value() && now - *since >= options_.worker_wait) {
        Stop(job,
             WithRetryAfter(
                 MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_NO_WORKERS,
                           absl::StrCat("no workers came in ", absl::FormatDuration(options_.worker_wait),
                                        " for request ", job.key.request_id, ": ", job.unplannable.message()),
                           {{"value", absl::FormatDuration(now - *since)},
                            {"limit", absl::FormatDuration(options_.worker_wait)}}),
                 absl::Seconds(5)));
      } else if (job.phase == JobPhase::kQueued && now - job.queued_at >= options_.max_queue_wait) {
        Stop(job, WithRetryAfter(
                      MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_TIMEOUT,
                                absl::StrCat("request ", job.key.request_id, " waited ",
                                             absl::FormatDuration(now - job.queued_at), " for free workers"),
                                {{"limit", absl::FormatDuration(options_.max_queue_wait)}}),
                      absl::Seconds(5)));
      }
      return;
    }
    case JobPhase::kOpening:
      if (!job.call_in_flight && now >= job.retry_call_at) OpenSession(job);
      return;
    case JobPhase::kCommitting:
      if (!job.call_in_flight && now >= job.retry_call_at) CommitSession(job);
      return;
    case JobPhase::kRunning:
      if (job.progress_pending) EmitProgress(job, now);
      return;
    case JobPhase::kStopping: {
      if (now < job.stop_deadline) return;
      std::vector<std::string> silent;
      for (const Rank& rank : job.ranks) {
        if (rank.state == Rank::State::kAssigned) silent.push_back(rank.worker_id);
      }
      const std::string limit = absl::FormatDuration(options_.abort_wait);
      for (const std::string& id : silent) {
        LoseWorker(id, MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST,
                                 absl::StrCat("worker ", id, " did not answer an abort in ", limit)));
      }
      return;
    }
    case JobPhase::kClosing:
      return;
  }
}

absl::StatusOr<v1::RequestTrace> Scheduler::GetTrace(const JobKey& key) const {
  const RequestTable::Record* const record = table_.Find(key);
  if (record != nullptr && record->terminal == nullptr) return MakeRequestTrace(*jobs_.at(record->serial));
  if (const v1::RequestTrace* const kept = traces_.Find(key)) return *kept;
  return MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_REQUEST,
                   absl::StrCat("no timeline of request ", Printable(key.request_id),
                                " is kept: it is unknown, or it ended too long ago"),
                   {{"value", Printable(key.request_id)}, {"limit", absl::StrCat(options_.trace_memory)}});
}

void Scheduler::BeginDrain() {
  draining_ = true;
  std::vector<uint64_t> waiting;
  for (const auto& [serial, job] : jobs_) {
    if (job->phase == JobPhase::kWaiting) waiting.push_back(serial);
  }
  for (const uint64_t serial : waiting) Stop(*FindJob(serial), Draining());
  Settle();
}

void Scheduler::CancelAll(const absl::Status& status) {
  draining_ = true;
  std::vector<uint64_t> serials;
  for (const auto& [serial, job] : jobs_) serials.push_back(serial);
  for (const uint64_t serial : serials) {
    if (Job* job = FindJob(serial)) Stop(*job, status);
  }
  Settle();
}

void Scheduler::EndAll(const absl::Status& status) {
  draining_ = true;
  while (!jobs_.empty()) Fail(*jobs_.begin()->second, status);
  Settle();
  for (auto& [id, worker] : cluster_.workers()) worker.link->Close(status);
  for (auto& [id, node] : cluster_.decode_nodes()) {
    if (node.connected) node.link->Close(status);
  }
}

void Scheduler::Settle() {
  if (settling_) return;
  settling_ = true;
  while (dirty_ || cluster_changed_ || !resubmissions_.empty()) {
    dirty_ = false;
    auto resubmissions = std::move(resubmissions_);
    resubmissions_.clear();
    for (auto& [prepared, watcher] : resubmissions) SubmitUnsettled(std::move(prepared), std::move(watcher));
    if (cluster_changed_) AdmitWaiting();
    cluster_changed_ = false;
    Dispatch();
  }
  settling_ = false;
}

}  // namespace headwater
