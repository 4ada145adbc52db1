// InProcessDeviceGroup: a group whose ranks are threads of one process on one GPU.
#ifndef HW_WORKER_CUDA_INPROCESS_DEVICE_GROUP_H_
#define HW_WORKER_CUDA_INPROCESS_DEVICE_GROUP_H_

#include <memory>
#include <vector>

#include "absl/time/time.h"

#include "worker/cuda/device_group.h"

namespace headwater {

// One endpoint per rank. An exchange is a copy on the GPU; Exchange() waits on the host until every rank has
// called it, `timeout` at most (DEADLINE_EXCEEDED). Abort() of one rank ends all with UNAVAILABLE. For tests
// and for parity: the ranks take the GPU from each other, and their times tell nothing of a real group.
std::vector<std::unique_ptr<DeviceGroup>> MakeInProcessDeviceGroup(int world_size, absl::Duration timeout);

}  // namespace headwater

#endif  // HW_WORKER_CUDA_INPROCESS_DEVICE_GROUP_H_
