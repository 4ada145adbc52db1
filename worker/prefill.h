// Prefill: the layer-major loop of one rank. The whole prompt passes a layer before the next one starts; a
// layer's K and V go to the KV sender as soon as they are computed.
#ifndef HW_WORKER_PREFILL_H_
#define HW_WORKER_PREFILL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

#include "kernels/pattern/policy.h"
#include "kvtransfer/layout.h"
#include "kvtransfer/sender.h"
#include "model/model.h"
#include "worker/arena.h"
#include "worker/checkpoint.h"
#include "worker/collectives.h"
#include "worker/job_control.h"
#include "worker/memory_plan.h"
#include "worker/metrics.h"
#include "worker/partition.h"
#include "worker/quality.h"

namespace headwater {

// One rank's part of a prompt, checked (see worker/assignment.h).
struct PrefillJob {
  std::string request_id;
  uint32_t epoch = 0;
  int rank = 0;
  std::vector<int32_t> tokens;                // of the whole prompt
  std::vector<RankTokens> partition;          // of all ranks; ranges start on block boundaries
  v1::Strategy strategy = v1::STRATEGY_RING;  // of the ranks' exchange
  std::optional<ResumePoint> resume;          // none: from the first layer
  std::shared_ptr<const KvGeometry> geometry;
  std::shared_ptr<const kernels::PatternPolicy> policy;
  QualityBound quality;
  int top_logprobs = 0;
  MemoryPlan plan;

  int world_size() const { return static_cast<int>(partition.size()); }
  const RankTokens& local() const { return partition[static_cast<size_t>(rank)]; }
};

struct PrefillProgress {
  uint32_t layers_done = 0;
  uint64_t pairs_computed = 0;
  uint64_t pairs_possible = 0;
  // Of recalls measured so far; none: 0.
  double recall_sum = 0;
  uint64_t recalls = 0;
  // Of each layer whose attention is known, from the first one that the job computes.
  struct Layer {
    float density = 0;
    float recall = -1;  // mean; below 0: not measured
  };
  std::vector<Layer> layers;
  // The newest checkpoint below which this rank's KV is acknowledged.
  struct Checkpoint {
    uint32_t layer = 0;
    KvShare share;  // of the layers below it that this job computes
  };
  std::optional<Checkpoint> checkpoint;
};

// What a job runs with. Everything must outlive the call; `sender` must be cancelled or finished, and
// destroyed, before `arena` is used again: it reads the arena's memory.
struct PrefillContext {
  const Model* model = nullptr;
  Collectives* collectives = nullptr;  // null: world size 1
  const GroupSpec* group = nullptr;    // of the collectives; may be null where the backend needs no other
  KvSender* sender = nullptr;
  JobControl* control = nullptr;
  CheckpointStore* checkpoints = nullptr;  // null: the job has no resume point, and none are taken
  int checkpoint_layers = 0;               // before every multiple of its ranks' largest; 0 on one: none
  bool measure_link = false;               // before the first layer; the same on all ranks
  Arena* arena = nullptr;                  // Reset() to at least plan.arena_bytes()
  WorkerMetrics* metrics = nullptr;        // may be null
  absl::Duration stall_timeout = absl::Seconds(30);
  double flop_per_step = 4e9;                            // see RingAttentionArgs
  std::function<void(const PrefillProgress&)> progress;  // after every layer, from the calling thread; may be
                                                         // empty
  // The prompt has ended before the pass that it shares: control and progress are not used again, the sender
  // is. From the calling thread, once at most; may be empty.
  std::function<void(const absl::Status&)> ended;
};

// Where a rank's time in one layer went.
struct LayerTimes {
  int32_t layer = 0;
  absl::Time begin;             // by the host's clock
  absl::Duration egress_stall;  // before it
  // One after the other, but for what prefill.cc computes between the waits of an exchange.
  absl::Duration project, exchange, attention, mlp;
  absl::Duration linear() const { return project + mlp; }
};

struct PrefillResult {
  // Set on the rank that holds the last token: at least one, best first.
  std::vector<TokenScore> top;
  PrefillProgress progress;
  absl::Duration linear;
  absl::Duration attention;
  absl::Duration exchange;
  absl::Duration egress_stall;
  std::vector<LayerTimes> layers;  // that were computed
  // K/V received from other ranks, and what strategy allgather would have brought.
  uint64_t exchange_bytes = 0;
  uint64_t exchange_bytes_allgather = 0;
  // Of the group, the same on all ranks; 0: not measured.
  double link_bytes_per_s = 0;
  // Where more is known than the pairs.
  std::optional<v1::AttentionReport> attention_report;
};

// Runs the job on the calling thread. When it returns OK, all blocks have been submitted (sender->Finish() is
// the caller's), and all ranks have computed theirs. Equal jobs in equal contexts give bitwise equal KV. A
// job with a resume point submits the blocks from its layer on, and provides what CheckProvides() asks for;
// once it has its rows, the store holds checkpoints of this epoch alone.
//
// Errors: the job control's (CANCELLED, DEADLINE_EXCEEDED); UNAVAILABLE, WORKER_LOST: a peer is gone or
// late; FAILED_PRECONDITION, MODEL_MISMATCH: the ranks' models, compute types or plans differ; UNAVAILABLE,
// KV_STREAM_STALLED; the sender's; INTERNAL, NON_FINITE with the layer. A rank that fails
// leaves its group, by which its peers fail, too.
absl::StatusOr<PrefillResult> RunPrefill(const PrefillJob& job, const PrefillContext& context);

}  // namespace headwater

#endif  // HW_WORKER_PREFILL_H_
