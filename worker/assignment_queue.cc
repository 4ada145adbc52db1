#include "worker/assignment_queue.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

// Ended assignments that an abort may still be on the way for.
constexpr size_t kEndedRemembered = 1024;

}  // namespace

v1::ConnectRequest MakeRankFailed(const std::string& request_id, uint32_t epoch, uint32_t rank,
                                  const absl::Status& status) {
  v1::ConnectRequest message;
  v1::RankFailed* const failed = message.mutable_failed();
  failed->set_request_id(request_id);
  failed->set_epoch(epoch);
  failed->set_rank(rank);
  *failed->mutable_error() = ToRpcStatus(status);
  return message;
}

AssignmentQueue::AssignmentQueue(AssignmentRunner* runner, uint32_t max_waiting, Send send)
    : runner_(runner),
      pack_limits_(runner->pack_limits()),
      max_waiting_(max_waiting),
      send_(std::move(send)),
      thread_([this] { RunAll(); }) {}

AssignmentQueue::~AssignmentQueue() { Stop(); }

void AssignmentQueue::Add(uint64_t stream, v1::PrefillAssignment assignment) {
  const absl::Status status = Enqueue(stream, &assignment);
  if (status.ok()) return;
  HW_LOG(WARNING).Field("request_id", assignment.request_id()).Field("epoch", assignment.epoch())
      << "assignment refused: " << status.message();
  send_(stream, MakeRankFailed(assignment.request_id(), assignment.epoch(), assignment.rank(), status));
}

absl::Status AssignmentQueue::Enqueue(uint64_t stream, v1::PrefillAssignment* assignment) {
  absl::Time deadline = absl::InfiniteFuture();
  if (assignment->deadline_ms() > 0) {
    // Later than a year is no deadline; so large numbers cannot overflow.
    const auto limit = static_cast<uint64_t>(absl::ToInt64Milliseconds(absl::Hours(24 * 365)));
    if (assignment->deadline_ms() < limit) {
      deadline = Clock::Real()->Now() + absl::Milliseconds(static_cast<int64_t>(assignment->deadline_ms()));
    }
  }
  absl::MutexLock lock(&mutex_);
  if (draining_ || stopping_) {
    return MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING, "this worker is draining");
  }
  std::vector<const v1::PrefillAssignment*> here;
  for (const auto& [name, job] : running_) {
    if (job->stream == stream) here.push_back(&job->assignment);
  }
  for (const auto& job : waiting_) {
    if (job->stream == stream) here.push_back(&job->assignment);
  }
  for (const v1::PrefillAssignment* other : here) {
    if (other->request_id() != assignment->request_id() || other->epoch() < assignment->epoch()) continue;
    if (other->epoch() == assignment->epoch()) return absl::OkStatus();
    return MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_STALE_EPOCH,
                     absl::StrCat("epoch ", assignment->epoch(), " comes after epoch ", other->epoch()));
  }
  if (waiting_.size() >= max_waiting_) {
    return MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_FULL,
                     absl::StrCat(waiting_.size(), " assignments wait here already, the most there may be"));
  }
  auto job = std::make_unique<Job>();
  job->stream = stream;
  job->assignment = std::move(*assignment);
  job->control = std::make_unique<JobControl>(Clock::Real(), deadline);
  waiting_.push_back(std::move(job));
  return absl::OkStatus();
}

void AssignmentQueue::Abort(uint64_t stream, const v1::AbortAssignment& abort) {
  const JobName name(stream, abort.request_id(), abort.epoch());
  const absl::Status cancelled = MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED,
                                           "the coordinator aborted the assignment");
  uint32_t rank = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (const auto running = running_.find(name); running != running_.end()) {
      running->second->control->Cancel(cancelled);
      return;
    }
    if (std::find(ended_.begin(), ended_.end(), name) != ended_.end()) return;
    const auto it =
        std::find_if(waiting_.begin(), waiting_.end(), [&](const auto& job) { return NameOf(*job) == name; });
    if (it != waiting_.end()) {
      rank = (*it)->assignment.rank();
      waiting_.erase(it);
    }
  }
  send_(stream, MakeRankFailed(abort.request_id(), abort.epoch(), rank, cancelled));
}

void AssignmentQueue::DropAll(const absl::Status& why) {
  absl::MutexLock lock(&mutex_);
  waiting_.clear();
  ended_.clear();
  CancelRunning(why);
}

void AssignmentQueue::CancelRunning(const absl::Status& why) {
  for (const auto& [name, job] : running_) job->control->Cancel(why);
}

void AssignmentQueue::StartDraining() {
  std::deque<std::unique_ptr<Job>> refused;
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    refused.swap(waiting_);
  }
  for (const auto& job : refused) {
    send_(job->stream,
          MakeRankFailed(job->assignment.request_id(), job->assignment.epoch(), job->assignment.rank(),
                         MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING,
                                   "this worker is draining")));
  }
}

bool AssignmentQueue::WaitIdle(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  return mutex_.AwaitWithTimeout(absl::Condition(this, &AssignmentQueue::Idle), timeout);
}

void AssignmentQueue::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    waiting_.clear();
    CancelRunning(
        MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED, "this worker is stopping"));
  }
  if (thread_.joinable()) thread_.join();
  // The runner answers cancelled assignments soon, as it ends a cancelled Run().
  absl::MutexLock lock(&mutex_, absl::Condition(this, &AssignmentQueue::Idle));
}

absl::Duration AssignmentQueue::EnforceDeadline() {
  absl::MutexLock lock(&mutex_);
  absl::Duration left = absl::InfiniteDuration();
  for (const auto& [name, job] : running_) {
    const absl::Status status = job->control->status();
    if (status.ok()) {
      left = std::min(left, job->control->deadline() - Clock::Real()->Now());
    } else {
      job->control->Cancel(status);
    }
  }
  return left;
}

absl::Duration AssignmentQueue::StepAge() const {
  absl::MutexLock lock(&mutex_);
  absl::Duration age;
  for (const auto& [name, job] : running_) age = std::max(age, job->control->StepAge());
  return age;
}

bool AssignmentQueue::idle() const {
  absl::MutexLock lock(&mutex_);
  return Idle();
}

bool AssignmentQueue::MayPack(const v1::PrefillAssignment& assignment) const {
  if (pack_limits_.max_prompts <= 1 || assignment.plan().world_size() != 1 || assignment.has_quality() ||
      assignment.token_ids_size() > pack_limits_.max_tokens || !assignment.policy().parameters().empty()) {
    return false;
  }
  const auto dense_below = pack_limits_.dense_below.find(assignment.policy().name());
  return dense_below != pack_limits_.dense_below.end() && assignment.token_ids_size() < dense_below->second;
}

std::vector<AssignmentQueue::Job*> AssignmentQueue::TakePass() {
  std::vector<Job*> pass;
  int64_t tokens = 0;
  while (!waiting_.empty()) {
    const v1::PrefillAssignment& next = waiting_.front()->assignment;
    tokens += next.token_ids_size();
    const bool fits =
        pass.empty() || (MayPack(pass.front()->assignment) && MayPack(next) &&
                         pass.size() < pack_limits_.max_prompts && tokens <= pack_limits_.max_tokens);
    if (!fits) break;
    // It has not been stuck while it waited here; where it is cancelled, its runner sees so.
    (void)waiting_.front()->control->Step();
    pass.push_back(waiting_.front().get());
    running_.emplace(NameOf(*pass.back()), std::move(waiting_.front()));
    waiting_.pop_front();
  }
  return pass;
}

std::function<void(const v1::RankProgress&)> AssignmentQueue::ProgressOf(const Job& job) const {
  return [this, stream = job.stream](const v1::RankProgress& progress) {
    v1::ConnectRequest message;
    *message.mutable_progress() = progress;
    send_(stream, std::move(message));
  };
}

void AssignmentQueue::End(Job* job, v1::ConnectRequest result) {
  // Before it counts as ended, so that an idle queue has sent all its results.
  send_(job->stream, std::move(result));
  absl::MutexLock lock(&mutex_);
  ended_.push_back(NameOf(*job));
  if (ended_.size() > kEndedRemembered) ended_.pop_front();
  running_.erase(ended_.back());
}

void AssignmentQueue::RunAll() {
  while (true) {
    std::vector<Job*> pass;
    {
      absl::MutexLock lock(&mutex_, absl::Condition(this, &AssignmentQueue::HasWork));
      if (stopping_) return;
      pass = TakePass();
    }
    if (!MayPack(pass.front()->assignment)) {
      Job* const job = pass.front();
      End(job, runner_->Run(job->assignment, job->control.get(), ProgressOf(*job)));
      continue;
    }
    std::vector<AssignmentRunner::Task> tasks;
    for (Job* const job : pass) {
      tasks.push_back({&job->assignment, job->control.get(), ProgressOf(*job),
                       [this, job](v1::ConnectRequest result) { End(job, std::move(result)); }});
    }
    runner_->RunPacked(std::move(tasks));
  }
}

}  // namespace headwater
