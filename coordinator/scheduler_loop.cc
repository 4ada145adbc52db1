#include "coordinator/scheduler_loop.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/clock.h"

namespace headwater {
namespace {

constexpr size_t kMaxWaitingClients = 4096;

}  // namespace

void SchedulerLoop::Start(std::function<void()> tick) {
  tick_ = std::move(tick);
  ticked_at_ = absl::ToUnixNanos(Clock::Real()->Now());
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
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_ || work_.size() >= limit) return false;
    work_.push_back(std::move(work));
  }
  changed_.notify_one();
  return true;
}

absl::Duration SchedulerLoop::TickAge() const {
  return Clock::Real()->Now() - absl::FromUnixNanos(ticked_at_);
}

void SchedulerLoop::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void SchedulerLoop::Run() {
  const Clock* const clock = Clock::Real();
  absl::Time next_tick = clock->Now() + interval_;
  for (;;) {
    std::function<void()> work;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      const absl::Duration left = std::max(absl::ZeroDuration(), next_tick - clock->Now());
      changed_.wait_for(lock, absl::ToChronoMicroseconds(left),
                        [this] { return stopping_ || !work_.empty(); });
      if (stopping_ && work_.empty()) return;
      if (!work_.empty()) {
        work = std::move(work_.front());
        work_.pop_front();
      }
    }
    if (work) work();
    if (clock->Now() < next_tick) continue;
    tick_();
    ticked_at_ = absl::ToUnixNanos(clock->Now());
    next_tick = clock->Now() + interval_;
  }
}

}  // namespace headwater
