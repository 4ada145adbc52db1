// Attention of one rank's queries over all ranks' keys: K/V chunks travel the ring while the one in hand is
// computed.
#ifndef HW_WORKER_RING_ATTENTION_H_
#define HW_WORKER_RING_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "kernels/attention/attention.h"
#include "worker/collectives.h"
#include "worker/job_control.h"
#include "worker/partition.h"
#include "worker/ring.h"

namespace headwater {

// Consecutive local queries, their running result and the blocks that they look at.
struct QuerySegment {
  kernels::QueryChunk chunk;
  kernels::AttentionState state;
  const kernels::BlockIndex* index = nullptr;
};

struct RingAttentionArgs {
  kernels::AttentionShape shape;
  kernels::DType dtype = kernels::DType::kF32;  // of Q, K and V
  int rank = 0;
  std::vector<QuerySegment> queries;
  // A chunk is its rank's K and then V, both [tokens, num_kv_heads, head_dim], the rank's ranges one behind
  // the other.
  const char* own_kv = nullptr;
  char* receive_kv[2] = {nullptr, nullptr};       // each as large as the largest chunk
  const std::vector<RankTokens>* keys = nullptr;  // of all ranks
  const RingSchedule* schedule = nullptr;
  Collectives* collectives = nullptr;  // null: world size 1
  JobControl* control = nullptr;
  // The job control is asked at least once in so many FLOP (counted as if dense).
  double flop_per_step = 4e9;
};

struct RingTimes {
  absl::Duration attention;
  absl::Duration exchange;  // waiting for the neighbours, compute being done
};

// Resets and fills the segments' states. All ranks must call it with the same schedule. Adds to `times`.
// UNAVAILABLE, WORKER_LOST: a neighbour is gone or stays away; the job control's error; a kernel's error.
absl::Status RingAttention(const RingAttentionArgs& args, RingTimes* times);

// What a job fails with when a collective operation did: the job control's error where there is one; lost and
// late peers are UNAVAILABLE, WORKER_LOST.
absl::Status CollectiveError(const absl::Status& status, const JobControl& control);

}  // namespace headwater

#endif  // HW_WORKER_RING_ATTENTION_H_
