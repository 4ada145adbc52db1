// JobControl: how the threads around a running prefill stop it and see that it moves.
#ifndef HW_WORKER_JOB_CONTROL_H_
#define HW_WORKER_JOB_CONTROL_H_

#include <atomic>
#include <cstdint>
#include <functional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "base/clock.h"

namespace headwater {

// One per job. Thread-safe.
class JobControl {
 public:
  // The job fails with DEADLINE_EXCEEDED once `deadline` (of `clock`) has passed.
  explicit JobControl(const Clock* clock = Clock::Real(), absl::Time deadline = absl::InfiniteFuture());

  // Stops the job with `why` (not OK); the first call wins. Runs what OnCancel() has registered.
  void Cancel(absl::Status why);

  // The compute loop's heartbeat: stamps the step and returns why the job has to stop, or OK. Call it at
  // least every 50 ms of work.
  absl::Status Step();

  // Why the job has to stop, or OK; does not stamp.
  absl::Status status() const;

  // Time since the last Step(), or since construction; 0 while a Waiting lives.
  absl::Duration StepAge() const;
  absl::Time deadline() const { return deadline_; }
  // The receipt of the assignment.
  absl::Time created() const { return created_; }

  // Marks a wait for somebody else, which has a deadline of its own: the loop is not stuck meanwhile.
  class Waiting {
   public:
    explicit Waiting(JobControl* control) : control_(control) { control_->waiting_.fetch_add(1); }
    ~Waiting() {
      control_->Stamp();
      control_->waiting_.fetch_sub(1);
    }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    JobControl* const control_;
  };

  // While this lives, Cancel() runs `stop` (at once if the job is cancelled already). `stop` must return
  // quickly and must not call back into the JobControl. It is not running when the destructor has returned.
  class CancelHook {
   public:
    CancelHook(JobControl* control, std::function<void()> stop);
    ~CancelHook();
    CancelHook(const CancelHook&) = delete;
    CancelHook& operator=(const CancelHook&) = delete;

   private:
    friend class JobControl;
    JobControl* const control_;
    const std::function<void()> stop_;
    CancelHook* next_ = nullptr;
  };

 private:
  void Stamp();

  const Clock* const clock_;
  const absl::Time deadline_;
  const absl::Time created_;
  std::atomic<int> waiting_{0};
  std::atomic<int64_t> last_step_nanos_;
  mutable absl::Mutex mutex_;
  absl::Status why_ ABSL_GUARDED_BY(mutex_);
  CancelHook* hooks_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

}  // namespace headwater

#endif  // HW_WORKER_JOB_CONTROL_H_
