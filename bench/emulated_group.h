// What one rank of a group meets where there are no others: for timing each rank's share of a prompt on one
// GPU.
#ifndef HW_BENCH_EMULATED_GROUP_H_
#define HW_BENCH_EMULATED_GROUP_H_

#include <memory>

#include "absl/status/statusor.h"

#include "worker/collectives.h"
#include "worker/cuda/device_group.h"

namespace headwater {

// The others say what this rank says, at once.
std::unique_ptr<Collectives> MakeEmulatedCollectives(int rank, int world_size);

struct EmulatedLink {
  double bytes_per_s = 0;  // into a GPU, and out of it at the same time
  double step_s = 0;       // of an exchange, however little it brings
};

// On the current device. An exchange writes what would have come, in device memory: copies of this rank's own
// parts of the same size, else numbers of ordinary size; it ends no sooner than the link would have brought
// it. What it does not show: others that come late, and cores that NCCL takes from the computation.
absl::StatusOr<std::unique_ptr<DeviceGroup>> MakeEmulatedDeviceGroup(int rank, int world_size,
                                                                     const EmulatedLink& link);

}  // namespace headwater

#endif  // HW_BENCH_EMULATED_GROUP_H_
