#include "worker/assignment_queue.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

// Ended assignments that an abort may still be on the way for.
constexpr size_t kEndedRemembered = 64;

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
    : runner_(runner), max_waiting_(max_waiting), send_(std::move(send)), thread_([this] { RunAll(); }) {}

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
  if (running_ != nullptr) here.push_back(&running_->assignment);
  for (const Job& job : waiting_) here.push_back(&job.assignment);
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
  Job job;
  job.stream = stream;
  job.assignment = std::move(*assignment);
  job.control = std::make_unique<JobControl>(Clock::Real(), deadline);
  waiting_.push_back(std::move(job));
  return absl::OkStatus();
}

void AssignmentQueue::Abort(uint64_t stream, const v1::AbortAssignment& abort) {
  const JobName name(abort.request_id(), abort.epoch());
  const absl::Status cancelled = MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED,
                                           "the coordinator aborted the assignment");
  uint32_t rank = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (running_ != nullptr && NameOf(running_->assignment) == name) {
      running_->control->Cancel(cancelled);
      return;
    }
    if (std::find(ended_.begin(), ended_.end(), name) != ended_.end()) return;
    const auto it = std::find_if(waiting_.begin(), waiting_.end(),
                                 [&](const Job& job) { return NameOf(job.assignment) == name; });
    if (it != waiting_.end()) {
      rank = it->assignment.rank();
      waiting_.erase(it);
    }
  }
  send_(stream, MakeRankFailed(abort.request_id(), abort.epoch(), rank, cancelled));
}

void AssignmentQueue::DropAll(const absl::Status& why) {
  absl::MutexLock lock(&mutex_);
  waiting_.clear();
  ended_.clear();
  if (running_ != nullptr) running_->control->Cancel(why);
}

void AssignmentQueue::StartDraining() {
  std::deque<Job> refused;
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    refused.swap(waiting_);
  }
  for (const Job& job : refused) {
    send_(job.stream,
          MakeRankFailed(job.assignment.request_id(), job.assignment.epoch(), job.assignment.rank(),
                         MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING,
                                   "this worker is draining")));
  }
}

bool AssignmentQueue::WaitIdle(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  const auto is_idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return running_ == nullptr && waiting_.empty();
  };
  return mutex_.AwaitWithTimeout(absl::Condition(&is_idle), timeout);
}

void AssignmentQueue::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    waiting_.clear();
    if (running_ != nullptr) {
      running_->control->Cancel(
          MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED, "this worker is stopping"));
    }
  }
  if (thread_.joinable()) thread_.join();
}

absl::Duration AssignmentQueue::EnforceDeadline() {
  absl::MutexLock lock(&mutex_);
  if (running_ == nullptr) return absl::InfiniteDuration();
  const absl::Status status = running_->control->status();
  if (!status.ok()) {
    running_->control->Cancel(status);
    return absl::InfiniteDuration();
  }
  return running_->control->deadline() - Clock::Real()->Now();
}

absl::Duration AssignmentQueue::StepAge() const {
  absl::MutexLock lock(&mutex_);
  return running_ == nullptr ? absl::ZeroDuration() : running_->control->StepAge();
}

bool AssignmentQueue::idle() const {
  absl::MutexLock lock(&mutex_);
  return running_ == nullptr && waiting_.empty();
}

void AssignmentQueue::RunAll() {
  while (true) {
    Job job;
    {
      absl::MutexLock lock(&mutex_, absl::Condition(this, &AssignmentQueue::HasWork));
      if (stopping_) return;
      job = std::move(waiting_.front());
      waiting_.pop_front();
      running_ = &job;
    }
    v1::ConnectRequest result = runner_->Run(job.assignment, job.control.get(),
                                             [this, stream = job.stream](const v1::RankProgress& progress) {
                                               v1::ConnectRequest message;
                                               *message.mutable_progress() = progress;
                                               send_(stream, std::move(message));
                                             });
    // Before it counts as ended, so that an idle queue has sent all its results.
    send_(job.stream, std::move(result));
    absl::MutexLock lock(&mutex_);
    running_ = nullptr;
    ended_.push_back(NameOf(job.assignment));
    if (ended_.size() > kEndedRemembered) ended_.pop_front();
  }
}

}  // namespace headwater
