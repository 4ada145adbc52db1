// AssignmentRunner: what the control client hands assignments to.
#ifndef HW_WORKER_ASSIGNMENT_RUNNER_H_
#define HW_WORKER_ASSIGNMENT_RUNNER_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "base/log.h"
#include "headwater/v1/worker.pb.h"
#include "worker/backend.h"
#include "worker/job_control.h"

namespace headwater {

class AssignmentRunner {
 public:
  virtual ~AssignmentRunner() = default;

  // Runs one assignment to its end and returns RankCompleted or RankFailed. Calls `progress` now and then.
  // Ends soon after control->Cancel(). Called from one thread.
  virtual v1::ConnectRequest Run(const v1::PrefillAssignment& assignment, JobControl* control,
                                 const std::function<void(const v1::RankProgress&)>& progress) = 0;

  // One of the assignments of a pass, with what Run() takes.
  struct Task {
    const v1::PrefillAssignment* assignment = nullptr;
    JobControl* control = nullptr;
    std::function<void(const v1::RankProgress&)> progress;
    // Takes what Run() returns; assignment and control may be gone when it has returned.
    std::function<void(v1::ConnectRequest)> done;
  };

  // What RunPacked() takes at most.
  virtual PackLimits pack_limits() const { return {}; }

  // Runs the assignments, each of one rank, in one pass. Calls each `done` once: soon after its control's
  // Cancel(), and maybe from another thread and after this has returned. Called from Run()'s thread, and only
  // where pack_limits() lets prompts share a pass.
  virtual void RunPacked(std::vector<Task> tasks) { HW_CHECK(tasks.empty()); }

  // From any thread.
  struct KvBytes {
    uint64_t acked = 0;    // of the assignment that Run() runs; 0: it runs none
    uint64_t unacked = 0;  // of all
  };
  virtual KvBytes kv_bytes() const = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_ASSIGNMENT_RUNNER_H_
