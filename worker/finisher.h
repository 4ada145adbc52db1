// Finisher: ends what a pass leaves behind while the next pass runs.
#ifndef HW_WORKER_FINISHER_H_
#define HW_WORKER_FINISHER_H_

#include <cstddef>
#include <functional>
#include <list>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace headwater {

// Works run on a thread each: one that waits for a slow decode node holds up no other. The caller bounds
// their number with WaitUntil(). Add() and WaitUntil() from one thread.
class Finisher {
 public:
  Finisher() = default;
  // Waits for all works.
  ~Finisher();
  Finisher(const Finisher&) = delete;
  Finisher& operator=(const Finisher&) = delete;

  void Add(std::function<void()> work);
  // Waits until at most `most` works have not ended; false: more had not after `timeout`.
  bool WaitUntil(size_t most, absl::Duration timeout);

 private:
  struct Work {
    std::thread thread;
    bool ended = false;
  };
  void Reap();

  absl::Mutex mutex_;
  size_t unfinished_ ABSL_GUARDED_BY(mutex_) = 0;
  std::list<Work> works_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headwater

#endif  // HW_WORKER_FINISHER_H_
