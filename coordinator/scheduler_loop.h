// The thread that runs the scheduler.
#ifndef HW_COORDINATOR_SCHEDULER_LOOP_H_
#define HW_COORDINATOR_SCHEDULER_LOOP_H_

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"

namespace headwater {

// Runs closures one after the other in the order in which they were posted, and `tick` every `interval`.
// Post, TryPost: thread-safe, never block.
class SchedulerLoop {
 public:
  explicit SchedulerLoop(absl::Duration interval) : interval_(interval) {}
  // Stops.
  ~SchedulerLoop();

  // Starts the thread; what was posted before runs then. Once.
  void Start(std::function<void()> tick);
  // For sources that bring one message at a time and wait for it to be processed: streams and answers. What
  // waits is thus bounded by their number. False: stopped, and `work` will not run.
  bool Post(std::function<void()> work);
  // For clients, of whom there may be any number. False: stopped, or 4096 closures wait already.
  bool TryPost(std::function<void()> work);
  // Since the last tick, or since Start().
  absl::Duration TickAge() const;
  // Runs what was posted before, then ends the thread. Idempotent; not from the loop's own thread.
  void Stop();

 private:
  bool Enqueue(std::function<void()> work, size_t limit);
  void Run();

  const absl::Duration interval_;
  std::function<void()> tick_;
  std::atomic<int64_t> ticked_at_{0};  // nanoseconds since 1970
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SCHEDULER_LOOP_H_
