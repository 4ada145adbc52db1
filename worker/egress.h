// EgressRing: the buffers (of a layer, or of a piece of one) that the KV sender still reads. Compute waits
// here when the decode node is slow, so memory stays what the plan says.
#ifndef HW_WORKER_EGRESS_H_
#define HW_WORKER_EGRESS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "base/clock.h"
#include "worker/job_control.h"

namespace headwater {

class EgressRing {
 public:
  // The buffers' memory stays the caller's, who must not free it before every callback of Use() has run.
  EgressRing(std::vector<char*> buffers, absl::Duration stall_timeout, const Clock* clock = Clock::Real());

  // Waits until the buffer for use number `use` (use mod the number of buffers) is free and returns it.
  // UNAVAILABLE, KV_STREAM_STALLED: no block of any buffer was released for stall_timeout; or the job's
  // error. The time waited is added to *stalled.
  absl::Status Acquire(int64_t use, JobControl* control, char** buffer, absl::Duration* stalled);

  // Counts one more reader of `use`'s buffer, until the function returned is called (once). The function
  // may be called after the EgressRing has gone.
  std::function<void()> Use(int64_t use);

 private:
  struct State {
    explicit State(size_t num_buffers) : readers(num_buffers) {}
    absl::Mutex mutex;
    absl::CondVar released;
    std::vector<int64_t> readers ABSL_GUARDED_BY(mutex);
    absl::Time last_release ABSL_GUARDED_BY(mutex) = absl::InfinitePast();
  };

  const std::vector<char*> buffers_;
  const absl::Duration stall_timeout_;
  const Clock* const clock_;
  const std::shared_ptr<State> state_;
};

}  // namespace headwater

#endif  // HW_WORKER_EGRESS_H_
