// What the links of a group, and to a decode node, carry: measured, for the planner's cost model.
#ifndef HW_WORKER_LINK_PROBE_H_
#define HW_WORKER_LINK_PROBE_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/sender.h"
#include "worker/collectives.h"

namespace headwater {

// What each message of the probe has at least and at most; see MeasureLink().
inline constexpr uint64_t kLeastProbeBytes = uint64_t{64} << 10;
inline constexpr uint64_t kMostProbeBytes = uint64_t{4} << 20;

// Bytes a second that the slowest rank of the group receives while every rank sends to its right neighbour,
// as the ring strategy does: the same number on all ranks. Messages grow fourfold, the best of three each,
// until one takes 20 ms or has 4 MiB; so 16 MiB a rank at most, and three messages beyond 20 ms. All ranks
// call it at the same point. Errors of the collectives; the group is dead then. The world size is 2 at least.
absl::StatusOr<double> MeasureLink(Collectives* collectives);

struct EgressRate {
  double bytes_per_s = 0;  // 0: not known
  bool waited = false;     // for the streams: the rate is what they carry, and no lower bound of it
};

// Of a prompt's KV streams, from the first block's submission to the last one's acknowledgement. It waited
// where the computation stood still for room in the streams 5 % of `total` or longer, or where that and what
// was still to be sent after it were half of the streams' time: the rate is half of the real one at least.
// Not known of less than 8 MiB, of which latency is too much.
EgressRate MeasureEgress(uint64_t bytes, const std::vector<KvLayerTimes>& layers, absl::Duration stall,
                         absl::Duration tail, absl::Duration total);

}  // namespace headwater

#endif  // HW_WORKER_LINK_PROBE_H_
