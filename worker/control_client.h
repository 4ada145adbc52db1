// ControlClient: the worker's end of the control stream. Registers, heartbeats, takes assignments, runs them
// one at a time, or several in one pass, on a thread of its own, and reports.
#ifndef HW_WORKER_CONTROL_CLIENT_H_
#define HW_WORKER_CONTROL_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/time/time.h"

#include "headwater/v1/worker.pb.h"
#include "worker/assignment_runner.h"
#include "worker/metrics.h"

namespace headwater {

class Transport;

struct ControlClientOptions {
  std::string coordinator;  // host:port
  v1::WorkerRegistration registration;
  absl::Duration min_backoff = absl::Milliseconds(100);
  absl::Duration max_backoff = absl::Seconds(5);
  // A stream without RegistrationAccepted is given up after this long.
  absl::Duration registration_timeout = absl::Seconds(10);
  absl::Duration progress_interval = absl::Milliseconds(50);
  // Assignments that may wait behind those that run; more are refused (RESOURCE_EXHAUSTED, QUEUE_FULL).
  uint32_t max_queued = 8;
  WorkerMetrics* metrics = nullptr;            // may be null
  std::shared_ptr<const Transport> transport;  // null: plaintext
};

// Connects until Stop(), with growing pauses. When the stream breaks, the coordinator gives up the epochs
// that this worker takes part in: what runs is cancelled, what waits is dropped, and their results are not
// sent.
class ControlClient {
 public:
  // `runner` must outlive it. Starts the threads.
  static std::unique_ptr<ControlClient> Start(const ControlClientOptions& options, AssignmentRunner* runner);
  // Stop().
  virtual ~ControlClient() = default;

  // Tells the coordinator, takes no more assignments (UNAVAILABLE, DRAINING), waits for the running ones at
  // most `timeout`, sends their results and closes the stream. False: one was still running when the timeout
  // passed.
  virtual bool Drain(absl::Duration timeout) = 0;

  // The coordinator wants this worker to leave. Stays true.
  virtual bool drain_requested() const = 0;

  // Cancels what runs, closes the stream, joins the threads. Idempotent.
  virtual void Stop() = 0;

  virtual bool registered() const = 0;
  // Since the last step of the compute loop of what runs, the longest; 0: nothing runs. Also while there is
  // no coordinator.
  virtual absl::Duration StepAge() const = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_CONTROL_CLIENT_H_
