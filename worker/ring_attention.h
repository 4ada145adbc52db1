// Attention of one rank's queries over all ranks' keys: the next K/V chunk comes (see worker/exchange.h)
// while the one in hand is computed. The chunks' order is the ring's, whatever the strategy.
#ifndef HW_WORKER_RING_ATTENTION_H_
#define HW_WORKER_RING_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "kernels/attention/attention.h"
#include "worker/exchange.h"
#include "worker/job_control.h"

namespace headwater {

// Consecutive local queries, their running result and the blocks that they look at.
struct QuerySegment {
  kernels::QueryChunk chunk;
  kernels::AttentionState state;
  const kernels::BlockIndex* index = nullptr;
};

struct RingAttentionArgs {
  ExchangeArgs exchange;  // its type is Q's, too
  std::vector<QuerySegment> queries;
  // The job control is asked at least once in so many FLOP (counted as if dense).
  double flop_per_step = 4e9;
};

struct RingTimes {
  absl::Duration attention;
  absl::Duration exchange;  // packing, and waiting for other ranks, compute being done
  // K/V received, and what strategy allgather would have brought.
  uint64_t bytes = 0;
  uint64_t allgather_bytes = 0;
};

// Resets and fills the segments' states. All ranks must call it with the same schedule and strategy. Adds to
// `times`. UNAVAILABLE, WORKER_LOST: a peer is gone or stays away; the job control's error; a kernel's error.
absl::Status RingAttention(const RingAttentionArgs& args, RingTimes* times);

// What a job fails with when a collective operation did: the job control's error where there is one; lost and
// late peers are UNAVAILABLE, WORKER_LOST.
absl::Status CollectiveError(const absl::Status& status, const JobControl& control);

}  // namespace headwater

#endif  // HW_WORKER_RING_ATTENTION_H_
