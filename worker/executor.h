// PrefillExecutor: one assignment from its check to its report.
#ifndef HW_WORKER_EXECUTOR_H_
#define HW_WORKER_EXECUTOR_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "kvtransfer/sender.h"
#include "worker/assignment.h"
#include "worker/assignment_runner.h"
#include "worker/backend.h"
#include "worker/collectives.h"
#include "worker/metrics.h"

namespace headwater {

// A group to be formed.
struct GroupSpec {
  std::string name;
  int rank = 0;
  int world_size = 1;
  std::string rendezvous_address;
  absl::Duration connect_timeout;  // of forming it
  absl::Duration timeout;          // of each operation
};

struct ExecutorOptions {
  PrefillBackend* backend = nullptr;
  std::string worker_id;
  int num_threads = 1;  // of the calling thread's OpenMP team
  int kv_channels = 2;
  absl::Duration collective_timeout = absl::Seconds(30);
  absl::Duration kv_stall_timeout = absl::Seconds(30);
  WorkerMetrics* metrics = nullptr;
  // Forms a group; ends soon after the job control's Cancel().
  std::function<absl::StatusOr<std::unique_ptr<Collectives>>(const GroupSpec&, JobControl*)> join_group;
  std::function<std::unique_ptr<KvSender>(const KvSenderOptions&, const KvGeometry&)> make_sender =
      KvSender::Create;
};

class PrefillExecutor final : public AssignmentRunner {
 public:
  // What the options point to must outlive it.
  explicit PrefillExecutor(ExecutorOptions options);

  v1::ConnectRequest Run(const v1::PrefillAssignment& assignment, JobControl* control,
                         const std::function<void(const v1::RankProgress&)>& progress) override;
  KvBytes kv_bytes() const override;

 private:
  struct Outcome {
    PrefillResult result;
    KvSenderStats sent;
    absl::Duration egress_tail;
  };

  absl::StatusOr<Outcome> RunChecked(const v1::PrefillAssignment& assignment, const PrefillJob& job,
                                     JobControl* control,
                                     const std::function<void(const v1::RankProgress&)>& progress);
  absl::StatusOr<std::unique_ptr<Collectives>> JoinGroup(const v1::PrefillAssignment& assignment,
                                                         const PrefillJob& job, JobControl* control);
  absl::Status RunWithSender(const v1::PrefillAssignment& assignment, const PrefillJob& job,
                             Collectives* collectives, JobControl* control,
                             const std::function<void(const v1::RankProgress&)>& progress, Outcome* outcome);
  void Show(KvSender* sender);

  const ExecutorOptions options_;
  // The group of the last job that completed: left only when the next one comes, when its other ranks are
  // done for sure.
  std::unique_ptr<Collectives> last_group_;
  mutable absl::Mutex mutex_;
  KvSender* sender_ ABSL_GUARDED_BY(mutex_) = nullptr;  // of the running job
};

// How much longer than the plain collective timeout a living peer may stay away: the time that the largest
// rank of a very slow machine (1 GFLOP/s) takes for its part of one layer.
absl::Duration SlowPeerAllowance(const ModelConfig& config, const PrefillJob& job);

}  // namespace headwater

#endif  // HW_WORKER_EXECUTOR_H_
