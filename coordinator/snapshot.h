// What the live page shows of the scheduler at one moment: plain copies, bounded in number and in size.
#ifndef HW_COORDINATOR_SNAPSHOT_H_
#define HW_COORDINATOR_SNAPSHOT_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "coordinator/job.h"

namespace headwater {

// The most of each kind that a snapshot holds; the rest is counted.
struct SnapshotLimits {
  size_t workers = 256;
  size_t decode_nodes = 64;
  size_t running = 100;
  size_t waiting = 100;
  size_t cells = 20'000;  // of all heat maps
};

// Density and recall by layer: a row for each rank, or, of a prompt that has ended, each KV head.
struct LayerMap {
  struct Row {
    std::string name;            // the rank's worker, or "KV head 3"
    std::vector<float> density;  // from first_layer on; below 0: not known
    std::vector<float> recall;   // likewise; empty: none was measured
  };
  uint32_t first_layer = 0;
  std::vector<Row> rows;
  // It was left out for its size.
  bool left_out = false;

  size_t cells() const;
};

// Of a job's ranks, by what they have reported last.
LayerMap MapOfRanks(const Job& job, size_t most_cells);
// Of the KV heads where the report knows them, else of the ranks.
LayerMap MapOfEnded(const Job& job, size_t most_cells);

struct WorkerView {
  enum class State { kIdle, kBusy, kDraining, kSilent };
  struct Work {
    std::string request_id;
    uint32_t rank = 0;
    uint32_t world_size = 0;
  };
  std::string id;
  std::string device;
  std::string model;
  State state = State::kIdle;
  absl::Duration heartbeat_age;
  absl::Duration idle;
  uint64_t num_requests = 0;
  uint64_t num_tokens = 0;
  uint64_t kv_unacked_bytes = 0;
  uint64_t budget_bytes = 0;
  uint64_t weight_bytes = 0;
  std::vector<Work> works;  // the first few
};

struct DecodeNodeView {
  std::string id;
  std::string pool;
  bool connected = false;
  absl::Duration heartbeat_age;
  uint64_t kv_bytes_used = 0;
  uint64_t kv_budget_bytes = 0;
  uint32_t sessions = 0;
};

// What waiting and running requests have in common.
struct RequestView {
  std::string id;
  std::string tenant;
  std::string model;
  std::string policy;
  int32_t priority = 0;
  uint64_t num_tokens = 0;
  uint32_t epoch = 0;
  absl::Duration waited;                    // before its first start
  std::optional<absl::Duration> time_left;  // of its deadline
};

struct WaitingView {
  RequestView request;
  bool accepted = false;
  std::string why;  // it cannot be planned; may be empty
};

struct RankView {
  std::string worker_id;
  bool completed = false;
  uint32_t layers_done = 0;
  uint64_t bytes_acked = 0;
  uint64_t bytes_total = 0;
};

struct RunningView {
  RequestView request;
  JobPhase phase = JobPhase::kOpening;
  std::string strategy;
  absl::Duration in_epoch;
  uint32_t layers_done = 0;
  uint32_t num_layers = 0;
  uint32_t resume_layer = 0;
  double tokens_per_second = 0;
  double density = 0;
  std::optional<double> recall;
  std::optional<absl::Duration> eta;
  uint64_t bytes_acked = 0;
  uint64_t bytes_total = 0;
  std::string decode_node;
  bool decode_away = false;
  std::vector<RankView> ranks;
  size_t ranks_left_out = 0;
  LayerMap map;
};

struct EndedView {
  RequestView request;
  std::string code;    // of absl::StatusCode; "OK"
  std::string reason;  // of ErrorReason; may be empty
  absl::Duration total;
  absl::Duration ago;
  uint32_t world_size = 0;
  double tokens_per_second = 0;
  double density = 0;
  std::optional<double> recall;
  uint64_t kv_bytes = 0;
  std::string decode_node;
  LayerMap map;
};

struct LostWorkerView {
  std::string id;
  std::string why;
  absl::Duration ago;
};

struct Snapshot {
  absl::Time now;
  absl::Duration uptime;
  bool draining = false;
  absl::Duration heartbeat_interval;
  uint64_t max_queue_requests = 0;

  // Of all, whatever the limits leave out.
  uint64_t workers_total = 0, workers_busy = 0, workers_draining = 0, workers_silent = 0;
  uint64_t decode_nodes_total = 0, decode_nodes_connected = 0;
  uint64_t waiting_total = 0, waiting_tokens = 0;
  uint64_t running_total = 0, running_tokens = 0;
  absl::Duration longest_wait;
  // Since the start.
  uint64_t completed_total = 0, failed_total = 0, tokens_total = 0, retries_total = 0;

  std::vector<WorkerView> workers;  // those that want attention first, else by id
  std::vector<DecodeNodeView> decode_nodes;
  std::vector<WaitingView> waiting;          // the next first
  std::vector<RunningView> running;          // in order of arrival
  std::vector<EndedView> ended;              // the newest first
  std::vector<LostWorkerView> lost_workers;  // likewise
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SNAPSHOT_H_
