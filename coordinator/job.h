// One request on its way through the coordinator, and how the reports of its ranks add up.
#ifndef HW_COORDINATOR_JOB_H_
#define HW_COORDINATOR_JOB_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "coordinator/links.h"
#include "coordinator/resume.h"
#include "coordinator/validation.h"
#include "headwater/v1/admin.pb.h"
#include "headwater/v1/prefill.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

// Ids are names within a tenant.
struct JobKey {
  std::string tenant;
  std::string request_id;

  friend bool operator==(const JobKey& a, const JobKey& b) {
    return a.tenant == b.tenant && a.request_id == b.request_id;
  }
  template <typename H>
  friend H AbslHashValue(H h, const JobKey& key) {
    return H::combine(std::move(h), key.tenant, key.request_id);
  }
};

enum class JobPhase {
  // Its model has too few workers to judge it by. Not accepted yet.
  kWaiting,
  kQueued,
  // Workers are reserved; the decode node is asked for space.
  kOpening,
  kRunning,
  // Every block is acknowledged; the decode node is asked to commit.
  kCommitting,
  // The epoch is given up: its ranks and calls come to their end, then the job is queued again or closed.
  kStopping,
  // The decode node is asked to free the session, then the job fails.
  kClosing,
};

struct Rank {
  enum class State { kReserved, kAssigned, kCompleted, kStopped };

  std::string worker_id;
  // The worker's, once the rank is assigned.
  uint64_t connection = 0;
  State state = State::kReserved;
  v1::RankProgress progress;  // without its checkpoint
  std::vector<Checkpoint> checkpoints;
  v1::RankCompleted completed;
};

struct Job {
  uint64_t serial = 0;
  JobKey key;
  PreparedRequest prepared;
  std::vector<std::shared_ptr<JobWatcher>> watchers;
  std::vector<std::function<void(bool cancelled)>> cancel_waiters;
  // Submissions of the same request that came while this one was being cancelled for want of watchers.
  std::vector<std::pair<PreparedRequest, std::shared_ptr<JobWatcher>>> successors;

  JobPhase phase = JobPhase::kWaiting;
  bool accepted = false;
  bool abandoned = false;
  bool detached = false;  // goes on without watchers
  v1::ServedModel model;
  // The request's, or the workers' default when it was judged.
  std::string policy;
  uint64_t dense_below = 0;  // it goes dense if it is shorter
  v1::KvLayout layout;
  absl::Time arrived;
  absl::Time arrived_wall;  // for people
  absl::Time accepted_at;
  absl::Time queued_at;
  // The first epoch's start.
  std::optional<absl::Time> started_at;
  absl::Time deadline = absl::InfiniteFuture();
  std::optional<absl::Time> unplannable_since;
  absl::Status unplannable;
  uint64_t unplannable_version = 0;  // of the cluster
  // When it first found itself at the head of the queue without enough idle workers.
  std::optional<absl::Time> head_since;

  // The epoch.
  uint32_t epoch = 0;
  v1::PrefillPlan plan;
  v1::PlanExplanation explanation;  // where the request asks for it
  std::vector<Rank> ranks;
  std::vector<v1::EpochTrace> epoch_traces;  // the last is this epoch's
  absl::Time epoch_started_at;
  absl::Time computed_at;
  absl::Time last_progress_at;
  bool progress_pending = false;
  bool plan_announced = true;
  // In an epoch, where it went on; in the queue, where the next one can. None: at layer 0.
  std::optional<Resume> resume;
  // A rank, or the commit, found the session or a checkpoint gone.
  bool state_lost = false;

  // The session at the decode node.
  std::string decode_node;
  std::string kv_address;
  std::string decode_address;
  std::string session_id;
  std::string session_token;
  bool epoch_tokens = false;  // as the epoch was opened: workers get a token of it
  bool session_maybe_open = false;
  bool call_in_flight = false;
  std::optional<absl::Time> away_since;
  absl::Time retry_call_at;

  // What happens after kStopping; OK: the job goes back to the queue.
  absl::Status stop_status;
  // Why the last epoch was given up.
  absl::Status last_loss;
  absl::Time stop_deadline;

  uint64_t num_tokens() const { return static_cast<uint64_t>(prepared.request->token_ids_size()); }
  const v1::PrefillRequest& request() const { return *prepared.request; }
  bool dense() const { return num_tokens() < dense_below; }
  uint32_t resume_layer() const { return resume.has_value() ? resume->point.layer() : 0; }
};

// What the completed ranks add up to.
struct RankSums {
  // Of the whole cache, with the layers of earlier epochs.
  KvSums kv;
  uint64_t kv_blocks_resent = 0;
  uint32_t kv_stream_resumes = 0;
  uint64_t exchange_bytes = 0;
  uint64_t exchange_bytes_allgather = 0;
  double density = 0;
  // The ranks' own where they gave one; with the policy and the density.
  v1::AttentionReport attention;
  uint32_t first_token = 0;
  google::protobuf::RepeatedPtrField<v1::TokenLogprob> top_logprobs;
  // Of each stage the most that any rank spent; queue and total are not set.
  v1::StageTimes stages;
};

// INTERNAL: the report cannot be true of `job`: digest not of 16 bytes, token or candidate count out of
// range.
absl::Status CheckCompletion(const Job& job, const v1::RankCompleted& completed);

// Empties what a rank says of its layers where it cannot be true of `job`.
void BoundLayers(const Job& job, google::protobuf::RepeatedField<float>* densities,
                 google::protobuf::RepeatedField<float>* recalls);

// INTERNAL: no rank, or ranks that disagree, reported the first token.
absl::StatusOr<RankSums> SumRanks(const Job& job);

// Where the epoch after this one can go on: the highest layer that all ranks have a checkpoint of. Nullopt:
// there is none.
std::optional<Resume> NextResume(const Job& job);

// a + b modulo 2^128, 16 bytes little endian each.
std::string AddDigests(const std::string& a, const std::string& b);

v1::PrefillProgress MakeProgress(const Job& job, absl::Time now);

// A status from a peer with message and details cut to sizes fit for keeping and passing on.
absl::Status Bounded(const absl::Status& status);

void SetDuration(absl::Duration duration, google::protobuf::Duration* out);

}  // namespace headwater

#endif  // HW_COORDINATOR_JOB_H_
