// What the coordinator knows of its workers and decode nodes. Plain data with its invariants; no I/O. Used by
// the scheduler's thread alone.
#ifndef HW_COORDINATOR_CLUSTER_STATE_H_
#define HW_COORDINATOR_CLUSTER_STATE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

#include "coordinator/links.h"
#include "coordinator/planner.h"
#include "headwater/v1/admin.pb.h"
#include "headwater/v1/decode.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

// A job that has a worker: from the start of the epoch until the rank's report.
struct HeldJob {
  uint64_t serial = 0;
  uint32_t epoch = 0;
  uint64_t num_tokens = 0;
  // Others of its kind may have the worker at the same time.
  bool packable = false;
};

// A prompt of one rank that may be computed together with others.
struct PackedPrompt {
  std::string request_id;
  uint64_t num_tokens = 0;
};

struct Worker {
  v1::WorkerRegistration registration;
  // Names this registration stream; a later one of the same worker has another.
  uint64_t connection = 0;
  std::shared_ptr<WorkerLink> link;
  absl::Time last_heard;
  absl::Time idle_since;
  uint64_t kv_unacked_bytes = 0;
  // It shuts down or was asked to: it finishes what it has and gets nothing new.
  bool draining = false;
  // One job that has it alone, or several packable ones. By request id, which is how the worker names them:
  // two tenants' requests of one id do not meet at a worker.
  std::map<std::string, HeldJob> held;
  uint64_t held_tokens = 0;
  // The planner goes by these in place of the registration's rates until then; see
  // ClusterState::FoundLinks().
  absl::Time link_until = absl::InfinitePast();
  absl::Time egress_until = absl::InfinitePast();
  v1::LinkRates found;
  // The job that it took last. It keeps no checkpoint of an earlier one.
  uint64_t last_serial = 0;

  // Whether one pass may hold a prompt of so many tokens.
  bool Packs(uint64_t num_tokens) const {
    return registration.max_packed_prompts() > 0 && num_tokens <= registration.max_packed_tokens();
  }
  // Whether it takes the prompt beside the packable jobs that it has: two passes' worth are its most, so that
  // the next pass waits there while one is computed.
  bool HasRoomFor(const PackedPrompt& prompt) const;
  void Hold(const std::string& request_id, const HeldJob& job);
  // False: it does not have this job.
  bool Release(const std::string& request_id, uint64_t serial, absl::Time now);
};

// A link that was slow once, and that the planner avoids for it, is tried again after this long.
inline constexpr absl::Duration kLinksHold = absl::Minutes(10);

// As registered, with what was found since.
v1::ComputeRates RatesOf(const Worker& worker);

// What a prompt asks of its workers.
struct WorkerNeeds {
  std::string model;
  std::string policy;
  bool quality = false;  // they serve one
  // The policy's registered max_tokens bind. They are those of its default parameters.
  bool by_limits = true;
};

struct DecodeNode {
  v1::DecodeRegistration registration;
  uint64_t connection = 0;
  std::shared_ptr<PeerLink> link;
  bool connected = false;
  absl::Time last_heard;
  absl::Time disconnected_at;
  uint64_t kv_bytes_used = 0;
  uint32_t sessions = 0;
  // Of caches sent its way since its last heartbeat, which does not count them yet. An estimate.
  uint64_t unreported_bytes = 0;

  uint64_t FreeBytes() const;
};

// A model by name, and what its living workers serve.
struct ModelView {
  v1::ServedModel model;
  uint32_t num_workers = 0;
  std::vector<std::string> policies;  // of some of them, by name
  // Of requests that name none: what all of them have as default, else "dense".
  std::string default_policy;
  bool serves_quality = false;  // one of them does
  // Prompts under a policy with default parameters that all who have it compute densely are shorter than
  // this.
  std::map<std::string, uint64_t> dense_below;
};

class ClusterState {
 public:
  // Workers. AddWorker refuses (FAILED_PRECONDITION, MODEL_MISMATCH) a model that differs from that of living
  // workers under the same name, and (RESOURCE_EXHAUSTED) more than 4096 workers. The caller removes an
  // earlier registration of the id first.
  absl::Status AddWorker(Worker worker);
  std::optional<Worker> RemoveWorker(absl::string_view worker_id);
  // Null: unknown. Valid until the worker is removed.
  Worker* FindWorker(absl::string_view worker_id);
  Worker* FindWorkerByConnection(uint64_t connection);
  std::map<std::string, Worker>& workers() { return workers_; }
  const std::map<std::string, Worker>& workers() const { return workers_; }

  // It gets nothing new from now on. False: it did not before.
  bool SetDraining(Worker* worker);
  size_t NumDraining() const;
  // A worker has measured links: the planner takes them for kLinksHold, then what was registered. Rates that
  // are out of range, or of a worker that registered none, mean nothing.
  void FoundLinks(Worker* worker, const v1::LinkRates& links, absl::Time now);
  // Forgets what is older.
  void ForgetLinks(absl::Time now);
  // Changes whenever LivingWorkers() may.
  uint64_t version() const { return version_; }

  // Workers with what is needed that may get work, now or later; the longest idle first.
  std::vector<PlanWorker> LivingWorkers(const WorkerNeeds& needs) const;
  // Those of them that are idle, and those that have room for `prompt` (may be null); the least held tokens
  // first, then the longest idle.
  std::vector<PlanWorker> FreeWorkers(const WorkerNeeds& needs, const PackedPrompt* prompt) const;
  // Nullopt: no living worker serves it.
  std::optional<ModelView> FindModel(absl::string_view name) const;
  // Whether some worker served it since the start (the last 64 names are remembered).
  bool WasServed(absl::string_view name) const;
  std::vector<std::string> LivingModels() const;

  // Decode nodes. A later registration of an id replaces the earlier one.
  absl::Status AddDecodeNode(DecodeNode node);
  DecodeNode* FindDecodeNode(absl::string_view id);
  const DecodeNode* FindDecodeNode(absl::string_view id) const;
  DecodeNode* FindDecodeNodeByConnection(uint64_t connection);
  std::map<std::string, DecodeNode>& decode_nodes() { return decode_nodes_; }
  const std::map<std::string, DecodeNode>& decode_nodes() const { return decode_nodes_; }

  static v1::WorkerSummary Summarize(const Worker& worker, absl::Time now);
  v1::ListWorkersResponse ListWorkers(absl::Time now) const;
  v1::ListDecodeNodesResponse ListDecodeNodes(absl::Time now) const;

 private:
  std::vector<const Worker*> WorkersFor(const WorkerNeeds& needs) const;

  uint64_t version_ = 1;
  std::map<std::string, Worker> workers_;
  std::map<std::string, DecodeNode> decode_nodes_;
  std::vector<std::string> served_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_CLUSTER_STATE_H_
