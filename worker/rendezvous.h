// Rendezvous: where the ranks of a group leave each other their addresses. Every worker serves one; rank 0's
// is the group's.
#ifndef HW_WORKER_RENDEZVOUS_H_
#define HW_WORKER_RENDEZVOUS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include <grpcpp/impl/service_type.h>

#include "base/clock.h"

namespace headwater {

class Transport;

struct RendezvousLimits {
  uint32_t max_keys = 4096;
  uint32_t max_waiting = 4096;
  uint32_t max_key_bytes = 256;
  uint32_t max_value_bytes = 64 << 10;
  // A key is forgotten this long after its Put.
  absl::Duration key_lifetime = absl::Minutes(10);
  // A Get must have a deadline, and one no later than this.
  absl::Duration max_wait = absl::Minutes(10);
};

// RendezvousService. Put: INVALID_ARGUMENT: empty or too long; ALREADY_EXISTS: the key has another value;
// RESOURCE_EXHAUSTED: all keys taken. Get waits without a thread; INVALID_ARGUMENT: no deadline or one too
// late; RESOURCE_EXHAUSTED: too many calls wait; DEADLINE_EXCEEDED.
std::unique_ptr<grpc::Service> MakeRendezvousService(const RendezvousLimits& limits,
                                                     const Clock* clock = Clock::Real());

// A caller's side. Thread-safe.
class RendezvousClient {
 public:
  // transport: null is plaintext.
  static std::unique_ptr<RendezvousClient> Dial(const std::string& address, const Transport* transport);
  virtual ~RendezvousClient() = default;

  // Both retry while the server cannot be reached, until `timeout`. Errors are the service's, and CANCELLED
  // after Abort().
  virtual absl::Status Put(absl::string_view key, absl::string_view value, absl::Duration timeout) = 0;
  virtual absl::StatusOr<std::string> Get(absl::string_view key, absl::Duration timeout) = 0;

  // Ends the calls under way and all later ones.
  virtual void Abort() = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_RENDEZVOUS_H_
