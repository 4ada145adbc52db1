// Checkpoints: what goes into a layer, of a rank's tokens and of its left neighbour's, in host memory that
// outlives the job. All that a layer-major prefill needs to go on from there is in them, so that a prompt
// whose rank was killed goes on with the ranks that are left.
#ifndef HW_WORKER_CHECKPOINT_H_
#define HW_WORKER_CHECKPOINT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

#include "kvtransfer/sender.h"
#include "worker/arena.h"
#include "worker/collectives.h"
#include "worker/job_control.h"
#include "worker/partition.h"

namespace headwater {

struct PrefillJob;
struct PrefillProgress;

// Where an epoch goes on, checked (see worker/assignment.h).
struct ResumePoint {
  int32_t layer = 0;  // the first that is computed
  // Of the checkpoint.
  uint32_t epoch = 0;
  std::vector<RankTokens> partition;
  std::vector<int> providers;  // by rank of that epoch: the rank of this one that has its rows
};

// Of one request at a time; the newest two layers of one epoch. Not thread-safe.
class CheckpointStore {
 public:
  // [tokens, hidden_size] each, a rank's tokens in the order of its ranges.
  struct Rows {
    absl::Span<float> own;
    absl::Span<float> left;  // of rank - 1 modulo the world size
  };

  // Forgets what it holds. `rank` of a group with this partition takes checkpoints from now on, in memory of
  // the ones before where that fits and is not over four times what is needed: pages that the system has to
  // give anew cost more than to write them.
  void Begin(const std::string& request_id, uint32_t epoch, int rank, std::vector<RankTokens> partition,
             int64_t hidden_size);
  // Room for a checkpoint, in place of the older one, which is none any more. RESOURCE_EXHAUSTED.
  absl::StatusOr<Rows> Start(int32_t layer);
  // What Start() gave has been filled.
  void Finish();

  // Rows of `rank`'s tokens; null: not here.
  const float* Find(const std::string& request_id, uint32_t epoch, int32_t layer, int rank) const;
  // Frees every checkpoint but this one.
  void KeepOnly(const std::string& request_id, uint32_t epoch, int32_t layer);
  void Clear() { KeepOnly("", 0, -1); }
  // Clear(), but for the memory: the next Begin() decides.
  void Forget();
  uint64_t bytes() const;

 private:
  struct Slot {
    Arena memory;
    int32_t layer = -1;  // -1: holds none
    Rows rows;
  };
  // Of a rank's rows.
  size_t NumValues(int rank) const;
  // Of one checkpoint.
  uint64_t SlotBytes() const;
  int left() const {
    return (rank_ + static_cast<int>(partition_.size()) - 1) % static_cast<int>(partition_.size());
  }

  std::string request_id_;
  uint32_t epoch_ = 0;
  int rank_ = 0;
  std::vector<RankTokens> partition_;
  int64_t hidden_size_ = 0;
  Slot slots_[2];
  int next_ = 0;  // the slot that Start() takes, or took
  int32_t started_ = -1;
};

// Rows [from_row, from_row + count) of rank `owner` of the checkpoint's epoch, which rank `from` has, go to
// rows [to_row, to_row + count) of rank `to`.
struct CheckpointMove {
  int owner = 0;
  int from = 0;
  int to = 0;
  int64_t from_row = 0;
  int64_t to_row = 0;
  int64_t count = 0;
};

// Pure, so that all ranks know all moves.
std::vector<CheckpointMove> PlanMoves(const ResumePoint& resume, const std::vector<RankTokens>& partition);

// Of a job with a resume point. UNAVAILABLE, CHECKPOINT_LOST: the store lacks rows that this rank is to
// provide.
absl::Status CheckProvides(const PrefillJob& job, const CheckpointStore& store);

// Takes `count` rows of this rank's tokens, from its row `row` on; `rows` stay for the call alone.
using PutRows = std::function<absl::Status(int64_t row, const float* rows, int64_t count)>;

// Puts all rows of this rank, [local tokens, hidden_size], from the checkpoints of all ranks, of which each
// must provide its part (CheckProvides()). All ranks of the group (null: one rank) call it. Errors of the
// collectives, of the job control and of `put`. Host memory: 64 MiB at most.
absl::Status LoadCheckpoint(const PrefillJob& job, int64_t hidden_size, const CheckpointStore& store,
                            Collectives* group, JobControl* control, const PutRows& put);

// Of the checkpoints taken, by layer, ascending, the store holds the newest two: the newer one below which
// all KV is acknowledged goes to progress->checkpoint, unless that has it.
void ReportCheckpoint(const std::vector<uint32_t>& taken, const KvSender& sender, PrefillProgress* progress);

}  // namespace headwater

#endif  // HW_WORKER_CHECKPOINT_H_
