// The timeline that a rank reports of its part of an epoch. Pure.
#ifndef HW_WORKER_RANK_TRACE_H_
#define HW_WORKER_RANK_TRACE_H_

#include <vector>

#include "absl/time/time.h"

#include "headwater/v1/types.pb.h"
#include "kvtransfer/layer_shares.h"
#include "worker/prefill.h"

namespace headwater {

// layers: that were computed. sent: of every layer of the cache, or empty. received: the assignment; times
// before it count as 0.
v1::RankTrace MakeRankTrace(const std::vector<LayerTimes>& layers, const std::vector<KvLayerTimes>& sent,
                            absl::Time received, absl::Time begin, absl::Time end);

}  // namespace headwater

#endif  // HW_WORKER_RANK_TRACE_H_
