// HealthPort: grpc.health.v1 alone, in plaintext, on a port of its own: kubelets have no certificates.
#ifndef HW_BASE_RPC_HEALTH_H_
#define HW_BASE_RPC_HEALTH_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace headwater {

class HealthPort {
 public:
  // Both are asked ten times a second from a thread of the port's own, and must not wait.
  struct Probes {
    std::function<bool()> live;   // false: only a new process helps
    std::function<bool()> ready;  // false: send no work here
  };

  // address: host:port, or empty: none is served and the calls below do nothing. Services "liveness",
  // "readiness" and "" (as readiness). UNAVAILABLE: the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<HealthPort>> Start(const std::string& address, Probes probes);
  virtual ~HealthPort() = default;

  // From now on it is not ready, whatever the probe says.
  virtual void Leave() = 0;
  virtual const std::string& address() const = 0;
};

}  // namespace headwater

#endif  // HW_BASE_RPC_HEALTH_H_
