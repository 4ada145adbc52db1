// InProcessCollectives: a group whose ranks are threads of one process.
#ifndef HW_WORKER_INPROCESS_COLLECTIVES_H_
#define HW_WORKER_INPROCESS_COLLECTIVES_H_

#include <memory>
#include <vector>

#include "absl/time/time.h"

#include "worker/collectives.h"

namespace headwater {

// One endpoint per rank. An operation's deadline is `timeout` from its Wait(). Destroying an endpoint, or
// aborting it, makes what its peers do with it fail with UNAVAILABLE.
std::vector<std::unique_ptr<Collectives>> MakeInProcessGroup(int world_size, absl::Duration timeout);

}  // namespace headwater

#endif  // HW_WORKER_INPROCESS_COLLECTIVES_H_
