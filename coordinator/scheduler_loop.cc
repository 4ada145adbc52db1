#include "coordinator/scheduler_loop.h"

#include <limits>
#include <utility>

#include "absl/time/clock.h"

namespace headwater {
namespace {

constexpr size_t kMaxWaitingClients = 4096;

}  // namespace

void SchedulerLoop::Start(std::function<void()> tick) {
  tick_ = std::move(tick);
  thread_ = std::thread([this] { Run(); });
}

SchedulerLoop::~SchedulerLoop() { Stop(); }

bool SchedulerLoop::Post(std::function<void()> work) {
  return Enqueue(std::move(work), std::numeric_limits<size_t>::max());
}

bool SchedulerLoop::TryPost(std::function<void()> work) {
  return Enqueue(std::move(work), kMaxWaitingClients);
}

bool SchedulerLoop::Enqueue(std::function<void()> work, size_t limit) {
  absl::MutexLock lock(&mutex_);
  if (stopping_ || work_.size() >= limit) return false;
  work_.push_back(std::move(work));
  return true;
}

void SchedulerLoop::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void SchedulerLoop::Run() {
  // Steps of the wall clock at most move a tick; the scheduler judges time by its own Clock.
  absl::Time next_tick = absl::Now() + interval_;
  for (;;) {
    std::function<void()> work;
    bool ended = false;
    {
      absl::MutexLock lock(&mutex_);
      const auto ready = [this]()
                             ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stopping_ || !work_.empty(); };
      mutex_.AwaitWithDeadline(absl::Condition(&ready), next_tick);
      ended = stopping_ && work_.empty();
      if (!work_.empty()) {
        work = std::move(work_.front());
        work_.pop_front();
      }
    }
    if (ended) return;
    if (work) work();
    const absl::Time now = absl::Now();
    if (now >= next_tick || next_tick - now > interval_) {
      tick_();
      next_tick = absl::Now() + interval_;
    }
  }
}

}  // namespace headwater
