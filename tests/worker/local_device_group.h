// A DeviceGroup whose ranks are threads of the test on one GPU: what groups do without a second one.
#ifndef HW_TESTS_WORKER_LOCAL_DEVICE_GROUP_H_
#define HW_TESTS_WORKER_LOCAL_DEVICE_GROUP_H_

#include <memory>
#include <vector>

#include "worker/cuda/device_group.h"

namespace headwater::testing {

// One endpoint per rank. Exchange() waits on the host until every rank has called it, 20 seconds at most;
// Abort() of one rank ends all.
std::vector<std::unique_ptr<DeviceGroup>> MakeLocalDeviceGroup(int world_size);

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_LOCAL_DEVICE_GROUP_H_
