// The coordinator's state machine: requests from submission to their one terminal event, over workers and
// decode nodes that come and go.
//
// Single-threaded: SchedulerLoop runs it. Every member returns at once; answers of the network come back as
// further calls. Time comes from a Clock, and only Tick() acts on its passing, so a test holds all
// interleavings in its hand.
#ifndef HW_COORDINATOR_SCHEDULER_H_
#define HW_COORDINATOR_SCHEDULER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "base/clock.h"
#include "coordinator/cluster_state.h"
#include "coordinator/coordinator_metrics.h"
#include "coordinator/history.h"
#include "coordinator/job.h"
#include "coordinator/links.h"
#include "coordinator/options.h"
#include "coordinator/request_table.h"
#include "coordinator/share_history.h"
#include "coordinator/snapshot.h"
#include "coordinator/trace.h"
#include "headwater/v1/admin.pb.h"

namespace headwater {

// A watcher of the job with this key.
struct JobWatch {
  JobKey key;
  std::shared_ptr<JobWatcher> watcher;
};

class Scheduler {
 public:
  // The pointers must outlive the scheduler; callbacks given to `decode` must not run after its end.
  Scheduler(const CoordinatorOptions& options, const Clock* clock, DecodeClient* decode,
            CoordinatorMetrics* metrics);

  // Clients.

  // Starts a request, attaches `watcher` to a running one of the same id and content, or replays its terminal
  // event. A request that failed with UNAVAILABLE or RESOURCE_EXHAUSTED, or because its client went away, is
  // not replayed: it starts anew.
  void Submit(PreparedRequest prepared, std::shared_ptr<JobWatcher> watcher);
  // Attaches `watcher` to a request that runs, or replays the terminal event of one that has ended; a
  // rejection with NOT_FOUND, UNKNOWN_REQUEST: neither running nor kept.
  void Watch(const JobKey& key, std::shared_ptr<JobWatcher> watcher);
  // The last event, made now; nothing is set of one that is not accepted yet. NOT_FOUND as Watch().
  absl::StatusOr<v1::PrefillResponse> Get(const JobKey& key);
  // The call that these watchers belong to has ended. Jobs left without watchers are cancelled, but for those
  // that were submitted detached.
  void Detach(const std::vector<JobWatch>& watches);
  // `done` gets true once compute has stopped and the KV session is freed, false if the job ended otherwise;
  // NOT_FOUND, UNKNOWN_REQUEST: no such id.
  void Cancel(const JobKey& key, std::function<void(absl::StatusOr<bool>)> done);

  // Workers. The number that AddWorker returns names the stream in the other two calls; after WorkerClosed,
  // or once another stream has registered the same id, it means nothing and is ignored.
  absl::StatusOr<uint64_t> AddWorker(const v1::WorkerRegistration& registration,
                                     const std::shared_ptr<WorkerLink>& link);
  void OnWorkerMessage(uint64_t connection, const v1::ConnectRequest& message);
  void OnWorkerClosed(uint64_t connection);
  // Has a worker leave: see AdminService.DrainWorker. NOT_FOUND, UNKNOWN_WORKER.
  absl::StatusOr<v1::WorkerSummary> DrainWorker(const std::string& worker_id);

  // Decode nodes, in the same way.
  absl::StatusOr<uint64_t> AddDecodeNode(const v1::DecodeRegistration& registration,
                                         std::shared_ptr<PeerLink> link);
  void OnDecodeHeartbeat(uint64_t connection, const v1::DecodeHeartbeat& heartbeat);
  void OnDecodeClosed(uint64_t connection);

  // NOT_FOUND, UNKNOWN_REQUEST: neither running nor kept.
  absl::StatusOr<v1::RequestTrace> GetTrace(const JobKey& key) const;
  v1::ListWorkersResponse ListWorkers() const { return cluster_.ListWorkers(clock_->Now()); }
  v1::ListDecodeNodesResponse ListDecodeNodes() const { return cluster_.ListDecodeNodes(clock_->Now()); }

  // For the live page.
  Snapshot TakeSnapshot(const SnapshotLimits& limits) const;

  // Acts on all deadlines that have passed. To be called several times a second.
  void Tick();

  // Refuses new requests (UNAVAILABLE, DRAINING) and those not accepted yet; accepted ones go on.
  void BeginDrain();
  // Cancels every job, in order: ranks are aborted and sessions freed before the jobs end with `status`.
  void CancelAll(const absl::Status& status);
  // Ends every job with `status` at once and closes all links. Only Detach, Cancel and Submit may follow.
  void EndAll(const absl::Status& status);

  // Counts a refusal that was decided outside. Thread-safe, as is options().
  void CountRejection(const absl::Status& status) { metrics_->CountRejection(status); }

  size_t num_jobs() const { return jobs_.size(); }
  const CoordinatorOptions& options() const { return options_; }

 private:
  using QueueKey = std::pair<int32_t, uint64_t>;

  // scheduler.cc: clients and time.
  void DetachUnsettled(const JobWatch& watch);
  void SubmitUnsettled(PreparedRequest prepared, std::shared_ptr<JobWatcher> watcher);
  void Attach(Job& job, PreparedRequest prepared, std::shared_ptr<JobWatcher> watcher);
  void Reject(const std::shared_ptr<JobWatcher>& watcher, const absl::Status& status);
  absl::Status CheckQueueRoom(const Job& job) const;
  void TickPeers(absl::Time now);
  void TickJob(Job& job, absl::Time now);
  // Runs what has become possible. Ends every public member that changes something.
  void Settle();

  // scheduler_admission.cc: judging and starting jobs.
  absl::StatusOr<std::optional<ModelView>> FindModelFor(const v1::PrefillRequest& request) const;
  absl::StatusOr<bool> Judge(Job& job);
  void Accept(Job& job);
  v1::PrefillResponse MakeAccepted(const Job& job) const;
  // A prompt's plan over the living workers, and what it was made with.
  struct Planned {
    WorkerNeeds needs;
    PlanSpec spec;
    absl::StatusOr<v1::PrefillPlan> plan;
    v1::PlanExplanation explanation;  // where the request asks for it
  };
  Planned PlanOverLiving(const Job& job) const;
  void SetExpectedShares(const Job& job, PlanSpec* spec) const;
  void AdmitWaiting();
  // Starts what can start. Within a model nothing passes a job that cannot: workers that become free, or
  // packing ones that have room, wait for it. So a long prompt waits for the packed ones that its workers
  // have already, two passes' worth at most, and for no other.
  void Dispatch();
  void DispatchModel(const std::string& model);
  // What became of a queued job that was looked at.
  enum class Start { kStarted, kReserving, kUnplannable };
  Start TryStart(Job& job);
  // A job's plan over free workers, and the ranks of it that hand over its checkpoint; none: it begins at
  // layer 0.
  struct FreePlan {
    absl::StatusOr<v1::PrefillPlan> plan;
    absl::StatusOr<std::vector<uint32_t>> providers;
    v1::PlanExplanation explanation = {};
  };
  FreePlan PlanOverFree(const Job& job, const WorkerNeeds& needs, const PlanSpec& spec,
                        const PackedPrompt* prompt);
  bool IsPacked(const Job& job, const v1::PrefillPlan& plan);
  absl::Status StartEpoch(Job& job, FreePlan free);

  // scheduler_resume.cc: going on from the checkpoints of the epoch before.
  FreePlan PlanResumed(const Job& job, PlanSpec spec, std::vector<PlanWorker> free);
  void UpdateResume(Job& job);
  void DropResume(Job& job, absl::string_view why);

  // scheduler_epoch.cc: one epoch of a job.
  void OpenSession(Job& job);
  void OnOpened(uint64_t serial, const absl::Status& status);
  void AssignRanks(Job& job);
  bool MeasuresLinks(const Job& job) const;
  v1::PrefillAssignment MakeAssignment(const Job& job, uint32_t rank, const std::string& rendezvous) const;
  void OnRankProgress(Worker& worker, const v1::RankProgress& progress);
  void OnRankCompleted(Worker& worker, const v1::RankCompleted& completed);
  void OnRankFailed(Worker& worker, const v1::RankFailed& failed);
  Rank* FindRank(const Worker& worker, const std::string& request_id, uint32_t epoch, uint32_t rank,
                 Job** job);
  void StartCommit(Job& job);
  void CommitSession(Job& job);
  void OnCommitted(uint64_t serial, const absl::Status& status);
  void HandleAwayNode(Job& job, const absl::Status& status);
  const std::string& KvAddress(Job& job);
  void EmitProgress(Job& job, absl::Time now);

  // scheduler_end.cc: giving up and ending.
  // Ends whatever the job is doing, then fails it with `status`, or queues it again where `status` is OK.
  // The job may be gone on return.
  void Stop(Job& job, const absl::Status& status);
  void CheckStopped(uint64_t serial);
  void CloseSession(Job& job, const absl::Status& status);
  void Complete(Job& job);
  void LearnShares(const Job& job, const RankSums& sums);
  void Fail(Job& job, const absl::Status& status);
  void End(Job& job, const std::shared_ptr<const v1::PrefillResponse>& terminal, const absl::Status& status);
  void ReleaseWorker(const std::string& worker_id, const Job& job);
  void LoseWorker(const std::string& worker_id, const absl::Status& why);
  bool SetDraining(Worker* worker, absl::string_view why);
  void LoseRank(Job& job, const std::string& worker_id, const absl::Status& why);
  void SetPhase(Job& job, JobPhase phase);
  void Notify(const Job& job, v1::PrefillResponse event);

  // scheduler_snapshot.cc
  WorkerView ViewOfWorker(const std::string& id, const Worker& worker, absl::Time now) const;
  void AddPeers(const SnapshotLimits& limits, Snapshot* out) const;

  Job* FindJob(uint64_t serial);

  const CoordinatorOptions options_;
  const Clock* const clock_;
  DecodeClient* const decode_;
  CoordinatorMetrics* const metrics_;

  ClusterState cluster_;
  RequestTable table_;
  ShareHistory shares_;
  TraceStore traces_;
  History history_;
  uint64_t next_serial_ = 1;
  uint64_t next_connection_ = 1;
  std::map<uint64_t, std::unique_ptr<Job>> jobs_;
  // Queued jobs, the next first: higher priority, then earlier arrival.
  std::map<QueueKey, Job*> queue_;
  // The same jobs by model.
  std::map<std::string, std::map<QueueKey, Job*>> queues_;
  // Of the jobs in kWaiting and kQueued.
  uint64_t waiting_jobs_ = 0;
  uint64_t waiting_tokens_ = 0;
  std::vector<std::pair<PreparedRequest, std::shared_ptr<JobWatcher>>> resubmissions_;
  std::optional<absl::Time> last_tick_;
  bool draining_ = false;
  bool dirty_ = false;
  bool cluster_changed_ = false;
  bool settling_ = false;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SCHEDULER_H_
