// PrefillExecutor: assignments from their check to their report, one by one or several in a pass.
#ifndef HW_WORKER_EXECUTOR_H_
#define HW_WORKER_EXECUTOR_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "kvtransfer/sender.h"
#include "worker/assignment.h"
#include "worker/assignment_runner.h"
#include "worker/backend.h"
#include "worker/checkpoint.h"
#include "worker/collectives.h"
#include "worker/finisher.h"
#include "worker/metrics.h"

namespace headwater {

class Transport;

struct ExecutorOptions {
  PrefillBackend* backend = nullptr;
  std::string worker_id;
  int num_threads = 1;  // of the calling thread's OpenMP team
  int kv_channels = 2;
  int checkpoint_layers = 0;   // see PrefillContext
  bool measure_egress = true;  // what the KV streams carry is reported
  absl::Duration collective_timeout = absl::Seconds(30);
  absl::Duration kv_stall_timeout = absl::Seconds(30);
  WorkerMetrics* metrics = nullptr;
  std::shared_ptr<const Transport> transport;  // to decode nodes and other workers; null: plaintext
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
  PackLimits pack_limits() const override { return options_.backend->pack_limits(); }
  // A bad assignment fails alone; one that goes on from a checkpoint, or whose job the backend does not pack,
  // runs alone, after the pass. Where
  // the backend overlaps egress, the tails of the KV streams run on while the next pass computes; those of
  // two passes at most, the one that computes included.
  void RunPacked(std::vector<Task> tasks) override;
  KvBytes kv_bytes() const override;

 private:
  struct Outcome {
    PrefillResult result;
    KvSenderStats sent;
    std::vector<KvLayerTimes> sent_layers;
    absl::Duration egress_tail;
    absl::Time received;  // the assignment
  };

  // A job of a pass, from its check to its report.
  struct PackedJob;
  using Pass = std::vector<std::shared_ptr<PackedJob>>;

  absl::StatusOr<Outcome> RunChecked(const v1::PrefillAssignment& assignment, const PrefillJob& job,
                                     JobControl* control,
                                     const std::function<void(const v1::RankProgress&)>& progress);
  GroupSpec SpecOf(const v1::PrefillAssignment& assignment, const PrefillJob& job) const;
  absl::StatusOr<std::unique_ptr<Collectives>> JoinGroup(const GroupSpec& spec, JobControl* control);
  absl::Status RunWithSender(const v1::PrefillAssignment& assignment, const PrefillJob& job,
                             const GroupSpec& spec, Collectives* collectives, JobControl* control,
                             const std::function<void(const v1::RankProgress&)>& progress, Outcome* outcome);

  std::unique_ptr<KvSender> MakeSender(const v1::PrefillAssignment& assignment, const PrefillJob& job,
                                       int num_channels);
  void EndSender(std::unique_ptr<KvSender> sender);
  static absl::Status FinishSender(KvSender* sender, JobControl* control, Outcome* outcome);
  // `job` must outlive the context.
  PrefillContext MakeContext(const PrefillJob& job, KvSender* sender, JobControl* control,
                             std::function<void(const v1::RankProgress&)> progress) const;
  void FillLinks(const Outcome& outcome, absl::Duration total, v1::RankCompleted* completed) const;
  // `job` may be null where the outcome is an error.
  v1::ConnectRequest Report(const v1::PrefillAssignment& assignment, const PrefillJob* job,
                            const absl::StatusOr<Outcome>& outcome, absl::Time start);

  // executor_packed.cc
  // Waits until no sender of a pass is left, or for the control's status.
  absl::Status WaitForPasses(JobControl* control);
  // Waits until the senders of earlier passes leave room for the pass's; what is cancelled meanwhile ends.
  void WaitForRoom(Pass* pass);
  void RunPass(const Pass& pass);
  void AnswerEarly(PackedJob* job, const absl::Status& why);
  void EndPacked(PackedJob* job);

  const ExecutorOptions options_;
  // The group of the last job that completed: left only when the next one comes, when its other ranks are
  // done for sure.
  std::unique_ptr<Collectives> last_group_;
  // Of the last job, if it shared its prompt: until the next one comes, since another rank may be lost when
  // this one has completed.
  CheckpointStore checkpoints_;
  mutable absl::Mutex mutex_;
  std::set<KvSender*> senders_ ABSL_GUARDED_BY(mutex_);  // of the jobs that run
  KvSender* alone_ ABSL_GUARDED_BY(mutex_) = nullptr;    // Run()'s
  Finisher finisher_;
};

// How much longer than the plain collective timeout a living peer may stay away: the time that the largest
// rank of a very slow machine (1 GFLOP/s) takes for its part of one layer.
absl::Duration SlowPeerAllowance(const ModelConfig& config, const PrefillJob& job);

}  // namespace headwater

#endif  // HW_WORKER_EXECUTOR_H_
