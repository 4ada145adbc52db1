// AssignmentRunner: what the control client hands assignments to.
#ifndef HW_WORKER_ASSIGNMENT_RUNNER_H_
#define HW_WORKER_ASSIGNMENT_RUNNER_H_

#include <cstdint>
#include <functional>

#include "headwater/v1/worker.pb.h"
#include "worker/job_control.h"

namespace headwater {

class AssignmentRunner {
 public:
  virtual ~AssignmentRunner() = default;

  // Runs one assignment to its end and returns RankCompleted or RankFailed. Calls `progress` now and then.
  // Ends soon after control->Cancel(). Called from one thread.
  virtual v1::ConnectRequest Run(const v1::PrefillAssignment& assignment, JobControl* control,
                                 const std::function<void(const v1::RankProgress&)>& progress) = 0;

  // Of the assignment that is running; from any thread.
  struct KvBytes {
    uint64_t acked = 0;
    uint64_t unacked = 0;
  };
  virtual KvBytes kv_bytes() const = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_ASSIGNMENT_RUNNER_H_
