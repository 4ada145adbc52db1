// What every Headwater process does to serve and to dial gRPC.
#ifndef HW_BASE_RPC_SERVER_H_
#define HW_BASE_RPC_SERVER_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include <grpcpp/channel.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server.h>
#include <grpcpp/support/channel_arguments.h>

#include "base/rpc/transport.h"

namespace headwater {

// A running server and the address that it really listens on (port 0 becomes the one taken).
struct RunningServer {
  std::unique_ptr<grpc::CallbackGenericService> nothing;  // gRPC wants a service
  std::unique_ptr<grpc::Server> server;
  std::string address;
  int port = 0;
};

// Serves `services` and grpc.health.v1 on `address` (host:port); without a transport in plaintext. Messages
// up to 64 MiB, metadata up to 8 KiB. INVALID_ARGUMENT: the port is over 65535. UNAVAILABLE: the address
// cannot be bound (port in use, no such host). The services must outlive the server.
absl::StatusOr<RunningServer> StartServer(const std::string& address,
                                          const std::vector<grpc::Service*>& services,
                                          const Transport* transport = nullptr);

// A channel with a TCP connection of its own (not shared with other channels to the same address), keepalive
// of 10 s, and reconnection after at most 2 s. A connection whose peer answers nothing for `silence`, be it a
// ping or data sent, is closed. transport: null is plaintext; server: the role that its certificate must
// have.
std::shared_ptr<grpc::Channel> DialPrivate(const std::string& address, const Transport* transport,
                                           Role server, absl::Duration silence = absl::Seconds(10));

// 128 random bits as 32 hex digits.
std::string RandomId();

}  // namespace headwater

#endif  // HW_BASE_RPC_SERVER_H_
