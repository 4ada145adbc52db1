// Worker: the parts of headwater-worker, wired together.
#ifndef HW_WORKER_WORKER_H_
#define HW_WORKER_WORKER_H_

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "worker/options.h"

namespace headwater {

class Worker {
 public:
  // Loads the model, listens, and starts to register with the coordinator. Errors name the flag or address
  // that they come from: NOT_FOUND, INVALID_ARGUMENT, RESOURCE_EXHAUSTED (weights over the budget, with both
  // numbers): the model; UNAVAILABLE: an address in use.
  static absl::StatusOr<std::unique_ptr<Worker>> Start(const WorkerOptions& options);
  // Stops at once.
  virtual ~Worker() = default;

  // See ControlClient::Drain.
  virtual bool Drain(absl::Duration timeout) = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_WORKER_H_
