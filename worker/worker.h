// Worker: the parts of headwater-worker, wired together.
#ifndef HW_WORKER_WORKER_H_
#define HW_WORKER_WORKER_H_

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "worker/backend.h"
#include "worker/options.h"

namespace headwater {

using BackendFactory = std::function<absl::StatusOr<std::unique_ptr<PrefillBackend>>(const WorkerOptions&)>;

class Worker {
 public:
  // Listens, makes the backend, which loads the model, and starts to register with the coordinator. Errors
  // name the flag or address that they come from: NOT_FOUND, INVALID_ARGUMENT, RESOURCE_EXHAUSTED (weights
  // over the budget, with both numbers): the model; UNAVAILABLE: an address in use.
  static absl::StatusOr<std::unique_ptr<Worker>> Start(const WorkerOptions& options,
                                                       const BackendFactory& make_backend);
  // Stops at once.
  virtual ~Worker() = default;

  // See ControlClient::Drain.
  virtual bool Drain(absl::Duration timeout) = 0;
  // The coordinator asked for it.
  virtual bool drain_requested() const = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_WORKER_H_
