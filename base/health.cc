#include "base/health.h"

#include <utility>

#include "base/status_macros.h"

namespace headwater {

HealthPort::HealthPort(Probes probes) : probes_(std::move(probes)) {}

HttpAnswer HealthPort::Answer(const HttpRequest& request) const {
  if (request.path == "/livez") {
    return probes_.live() ? HttpAnswer{.body = "live\n"} : HttpAnswer{.status = 503, .body = "not live\n"};
  }
  if (request.path == "/readyz") {
    const bool ready = !left_ && probes_.ready();
    return ready ? HttpAnswer{.body = "ready\n"} : HttpAnswer{.status = 503, .body = "not ready\n"};
  }
  return {.status = 404, .body = "paths are /livez and /readyz\n"};
}

absl::StatusOr<std::unique_ptr<HealthPort>> HealthPort::Start(const std::string& address, Probes probes) {
  std::unique_ptr<HealthPort> port(new HealthPort(std::move(probes)));
  HW_ASSIGN_OR_RETURN(port->server_,
                      HttpServer::Start(address, {.what = "health",
                                                  .handler = [raw = port.get()](const HttpRequest& request) {
                                                    return raw->Answer(request);
                                                  }}));
  return port;
}

}  // namespace headwater
