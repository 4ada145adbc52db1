// RegistryClient: keeps a decode node registered with the coordinator.
#ifndef HW_DECODE_REGISTRY_CLIENT_H_
#define HW_DECODE_REGISTRY_CLIENT_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include <grpcpp/channel.h>

#include "base/metrics.h"
#include "headwater/v1/decode.pb.h"

namespace headwater {

class Transport;

// Dials the coordinator, registers, sends heartbeats at the interval that the coordinator names (100 ms to 60
// s; 2 s if it names none), and starts anew whenever the stream ends, for ever. Between attempts it waits
// from 100 ms, doubling, up to `max_backoff`, with jitter.
class RegistryClient {
 public:
  struct Options {
    std::string coordinator;  // host:port
    v1::DecodeRegistration registration;
    // Called on the client's thread before each heartbeat; must not wait.
    std::function<v1::DecodeHeartbeat()> heartbeat;
    // A registration must be answered, and a message taken by the connection, within this time.
    absl::Duration answer_timeout = absl::Seconds(10);
    absl::Duration max_backoff = absl::Seconds(3);
    Metrics* metrics = nullptr;                  // must outlive the client
    std::shared_ptr<const Transport> transport;  // null: plaintext
  };

  // Starts at once and returns.
  static std::unique_ptr<RegistryClient> Start(const Options& options);
  // Ends the stream, within about a second.
  virtual ~RegistryClient() = default;

  // True while the coordinator has accepted the registration and the stream stands.
  virtual bool connected() const = 0;
};

}  // namespace headwater

#endif  // HW_DECODE_REGISTRY_CLIENT_H_
