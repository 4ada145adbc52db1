// AssignmentQueue: the thread that runs assignments, one after the other or as many as share a pass, and the
// few that wait.
#ifndef HW_WORKER_ASSIGNMENT_QUEUE_H_
#define HW_WORKER_ASSIGNMENT_QUEUE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "headwater/v1/worker.pb.h"
#include "worker/assignment_runner.h"
#include "worker/job_control.h"

namespace headwater {

// Thread-safe. Every assignment belongs to the control stream that it came over; `send` gets that stream's
// number with each message, from any of the callers' threads, the queue's own or the runner's, without a lock
// held.
//
// Assignments run in the order in which they came. Where the first may share a pass (one rank, policy
// "dense", within the runner's limits), those behind it run with it, up to the first that may not or does not
// fit.
class AssignmentQueue {
 public:
  using Send = std::function<void(uint64_t stream, v1::ConnectRequest message)>;

  AssignmentQueue(AssignmentRunner* runner, uint32_t max_waiting, Send send);
  ~AssignmentQueue();  // Stop()

  // Queues the assignment, or answers RankFailed: RESOURCE_EXHAUSTED, QUEUE_FULL; UNAVAILABLE, DRAINING;
  // ABORTED, STALE_EPOCH where a later epoch of the request is here already. The same (request_id, epoch)
  // again is ignored. What an earlier stream left running counts for neither.
  void Add(uint64_t stream, v1::PrefillAssignment assignment);

  // Cancels it if it runs, drops it if it waits; either way RankFailed (CANCELLED) follows. One that ended
  // has been answered; one that was never here is answered at once.
  void Abort(uint64_t stream, const v1::AbortAssignment& abort);

  // Forgets what waits and cancels what runs, after the stream broke.
  void DropAll(const absl::Status& why);

  // Refuses what waits and what comes from now on.
  void StartDraining();
  // False: something still runs after `timeout`.
  bool WaitIdle(absl::Duration timeout);

  // Cancels what runs, joins the thread, waits for what the runner has still to answer. Idempotent.
  void Stop();

  // Enforces the running assignments' deadlines even where the runner waits for somebody else; returns the
  // time until the next of them (infinite: none).
  absl::Duration EnforceDeadline();
  // Of the running assignment that is the longest without a step; 0 while idle.
  absl::Duration StepAge() const;
  bool idle() const;

 private:
  struct Job {
    uint64_t stream = 0;
    v1::PrefillAssignment assignment;
    std::unique_ptr<JobControl> control;
  };
  // With the stream: after it broke, a cancelled job may still run when the next one brings its name again.
  using JobName = std::tuple<uint64_t, std::string, uint32_t>;

  static JobName NameOf(const Job& job) {
    return {job.stream, job.assignment.request_id(), job.assignment.epoch()};
  }
  absl::Status Enqueue(uint64_t stream, v1::PrefillAssignment* assignment) ABSL_LOCKS_EXCLUDED(mutex_);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stopping_ || !waiting_.empty(); }
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_.empty() && waiting_.empty(); }
  void RunAll();
  bool MayPack(const v1::PrefillAssignment& assignment) const;
  // Makes the first, and those that share its pass, running ones.
  std::vector<Job*> TakePass() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::function<void(const v1::RankProgress&)> ProgressOf(const Job& job) const;
  // Sends the result; the job is gone then.
  void End(Job* job, v1::ConnectRequest result) ABSL_LOCKS_EXCLUDED(mutex_);
  void CancelRunning(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  AssignmentRunner* const runner_;
  const PackLimits pack_limits_;
  const uint32_t max_waiting_;
  const Send send_;
  mutable absl::Mutex mutex_;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<std::unique_ptr<Job>> waiting_ ABSL_GUARDED_BY(mutex_);
  // The jobs themselves are the runner's; others read their names and use their controls.
  std::map<JobName, std::unique_ptr<Job>> running_ ABSL_GUARDED_BY(mutex_);
  std::deque<JobName> ended_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

// RankFailed of an assignment.
v1::ConnectRequest MakeRankFailed(const std::string& request_id, uint32_t epoch, uint32_t rank,
                                  const absl::Status& status);

}  // namespace headwater

#endif  // HW_WORKER_ASSIGNMENT_QUEUE_H_
