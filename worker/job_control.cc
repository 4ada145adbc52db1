#include "worker/job_control.h"

#include <utility>

#include "base/log.h"
#include "base/rpc/grpc_status.h"

namespace headwater {

JobControl::JobControl(const Clock* clock, absl::Time deadline)
    : clock_(clock),
      deadline_(deadline),
      created_(clock->Now()),
      last_step_nanos_(absl::ToUnixNanos(created_)) {}

void JobControl::Cancel(absl::Status why) {
  HW_CHECK(!why.ok());
  absl::MutexLock lock(&mutex_);
  if (!why_.ok()) return;
  why_ = std::move(why);
  for (CancelHook* hook = hooks_; hook != nullptr; hook = hook->next_) hook->stop_();
}

void JobControl::Stamp() {
  last_step_nanos_.store(absl::ToUnixNanos(clock_->Now()), std::memory_order_relaxed);
}

absl::Status JobControl::Step() {
  Stamp();
  return status();
}

absl::Status JobControl::status() const {
  {
    absl::MutexLock lock(&mutex_);
    if (!why_.ok()) return why_;
  }
  if (clock_->Now() < deadline_) return absl::OkStatus();
  return MakeError(absl::StatusCode::kDeadlineExceeded, v1::ERROR_REASON_DEADLINE,
                   "the request's deadline passed during the prefill");
}

absl::Duration JobControl::StepAge() const {
  if (waiting_.load() > 0) return absl::ZeroDuration();
  return clock_->Now() - absl::FromUnixNanos(last_step_nanos_.load(std::memory_order_relaxed));
}

JobControl::CancelHook::CancelHook(JobControl* control, std::function<void()> stop)
    : control_(control), stop_(std::move(stop)) {
  absl::MutexLock lock(&control_->mutex_);
  next_ = control_->hooks_;
  control_->hooks_ = this;
  if (!control_->why_.ok()) stop_();
}

JobControl::CancelHook::~CancelHook() {
  absl::MutexLock lock(&control_->mutex_);
  CancelHook** link = &control_->hooks_;
  while (*link != this) link = &(*link)->next_;
  *link = next_;
}

}  // namespace headwater
