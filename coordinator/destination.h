// Where a cache goes. A request names a registered node or a pool; the address always comes from the
// registry, never from the client.
#ifndef HW_COORDINATOR_DESTINATION_H_
#define HW_COORDINATOR_DESTINATION_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

#include "coordinator/cluster_state.h"
#include "headwater/v1/prefill.pb.h"

namespace headwater {

// Bytes of all blocks of a cache. The model's shape has been checked by CheckRegistration().
uint64_t KvBytes(const v1::KvLayout& layout);

// Picks the named node, or the fitting node of the pool ("default" where none is named) with most free
// budget, connected ones first. Returns its id.
//
// NOT_FOUND, UNKNOWN_DECODE_NODE: no such node. UNAVAILABLE, NO_DECODE_NODE: the pool has none.
// FAILED_PRECONDITION: MODEL_MISMATCH, KV_DTYPE_UNSUPPORTED, PROMPT_TOO_LONG (over the node's positions), or
// KV_MEMORY_FULL (over the node's whole budget), of the node that came closest.
absl::StatusOr<std::string> PickDecodeNode(const v1::PrefillRequest& request, const v1::KvLayout& layout,
                                           const ClusterState& cluster);

}  // namespace headwater

#endif  // HW_COORDINATOR_DESTINATION_H_
