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

struct Worker {
  v1::WorkerRegistration registration;
  // Names this registration stream; a later one of the same worker has another.
  uint64_t connection = 0;
  std::shared_ptr<WorkerLink> link;
  absl::Time last_heard;
  absl::Time idle_since;
  uint64_t kv_unacked_bytes = 0;
  // It said that it shuts down: it finishes what it has and gets nothing new.
  bool draining = false;
  // Serial of its job, 0: idle.
  uint64_t job = 0;
  std::string request_id;
  uint32_t epoch = 0;
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

// A model by name, and what its living workers have in common.
struct ModelView {
  v1::ServedModel model;
  uint32_t num_workers = 0;
  std::vector<std::string> policies;
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

  // Workers of a model that may get work, the longest idle first; all of them or only the idle ones.
  std::vector<PlanWorker> PlanWorkers(absl::string_view model, bool only_idle) const;
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

  v1::ListWorkersResponse ListWorkers(absl::Time now) const;
  v1::ListDecodeNodesResponse ListDecodeNodes(absl::Time now) const;

 private:
  std::map<std::string, Worker> workers_;
  std::map<std::string, DecodeNode> decode_nodes_;
  std::vector<std::string> served_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_CLUSTER_STATE_H_
