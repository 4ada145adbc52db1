// Going on from checkpoints: what the ranks of an epoch reported, and who can hand it to the next epoch.
// Plain data and pure functions.
#ifndef HW_COORDINATOR_RESUME_H_
#define HW_COORDINATOR_RESUME_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"

#include "headwater/v1/types.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

inline constexpr size_t kDigestBytes = 16;

// Of some blocks of a cache.
struct KvSums {
  std::string digest = std::string(kDigestBytes, '\0');
  uint64_t bytes = 0;
  uint64_t blocks = 0;
};

// One that a rank reported: v1::RankCheckpoint.
struct Checkpoint {
  uint32_t layer = 0;
  KvSums below;
};

// A worker as the rank of an epoch. One that registered anew has another connection, and nothing of before.
struct CheckpointHolder {
  std::string worker_id;
  uint64_t connection = 0;
};

// Where an epoch goes on.
struct Resume {
  // Without providers until the epoch is planned.
  v1::ResumePoint point;
  // By rank of the epoch of the checkpoint.
  std::vector<CheckpointHolder> holders;
  // All blocks of the layers below point.layer, of whatever epoch.
  KvSums below;
};

// Adds a report to `kept`, which holds the newest two, the older first; the newest one repeated adds nothing.
// False: the report cannot be true (no layer from `least_layer` and 1 to `num_layers`, a layer below the
// newest, or a digest not of 16 bytes), and nothing is added.
bool KeepCheckpoint(const v1::RankCheckpoint& report, uint32_t least_layer, uint32_t num_layers,
                    std::vector<Checkpoint>* kept);

// For each rank of the epoch of the checkpoint, the rank of `plan` that has its state: the same worker where
// it is in the plan and one of `living` (which hold what they did), else its right neighbour.
// NOT_FOUND: there is none for some rank.
absl::StatusOr<std::vector<uint32_t>> FindProviders(const Resume& resume,
                                                    const absl::flat_hash_set<std::string>& living,
                                                    const v1::PrefillPlan& plan);

}  // namespace headwater

#endif  // HW_COORDINATOR_RESUME_H_
