// HealthPort: what probes ask for, by HTTP in plaintext on a port of its own: GET /livez and /readyz answer
// 200 or 503. Kubelets have no certificates; and a gRPC server of this process would share the threads that a
// flood of calls keeps busy.
#ifndef HW_BASE_HEALTH_H_
#define HW_BASE_HEALTH_H_

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

#include "base/http_server.h"

namespace headwater {

class HealthPort {
 public:
  // Both are asked from the port's threads, several at once, and must not wait.
  struct Probes {
    std::function<bool()> live;   // false: only a new process helps
    std::function<bool()> ready;  // false: send no work here
  };

  // address: ADDRESS:PORT, or empty: none is served and the calls below do nothing. Errors as of HttpServer.
  static absl::StatusOr<std::unique_ptr<HealthPort>> Start(const std::string& address, Probes probes);

  // From now on it is not ready, whatever the probe says. Thread-safe.
  void Leave() { left_ = true; }
  const std::string& address() const { return server_->address(); }

 private:
  explicit HealthPort(Probes probes);
  HttpAnswer Answer(const HttpRequest& request) const;

  const Probes probes_;
  std::atomic<bool> left_{false};
  std::unique_ptr<HttpServer> server_;  // goes first: its threads ask
};

}  // namespace headwater

#endif  // HW_BASE_HEALTH_H_
