#include "worker/finisher.h"

#include <utility>

namespace headwater {

Finisher::~Finisher() {
  WaitUntil(0, absl::InfiniteDuration());
  Reap();
}

void Finisher::Add(std::function<void()> work) {
  Reap();
  absl::MutexLock lock(&mutex_);
  Work* const entry = &works_.emplace_back();
  ++unfinished_;
  entry->thread = std::thread([this, entry, work = std::move(work)]() mutable {
    work();
    // What it holds goes before it counts as ended.
    work = nullptr;
    absl::MutexLock end(&mutex_);
    entry->ended = true;
    --unfinished_;
  });
}

bool Finisher::WaitUntil(size_t most, absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  const auto few = [this, most]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return unfinished_ <= most; };
  return mutex_.AwaitWithTimeout(absl::Condition(&few), timeout);
}

void Finisher::Reap() {
  std::list<Work> ended;
  {
    absl::MutexLock lock(&mutex_);
    for (auto it = works_.begin(); it != works_.end();) {
      const auto next = std::next(it);
      if (it->ended) ended.splice(ended.end(), works_, it);
      it = next;
    }
  }
  for (Work& work : ended) work.thread.join();
}

}  // namespace headwater
