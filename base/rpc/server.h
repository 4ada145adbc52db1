// What every Headwater process does to serve and to dial gRPC.
#ifndef HW_BASE_RPC_SERVER_H_
#define HW_BASE_RPC_SERVER_H_

#include <cstdint>
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

// What a server's connections may hold of messages that are on their way.
inline constexpr uint64_t kMaxBufferedBytes = uint64_t{512} << 20;
// The same where KV blocks come in, of up to 32 MiB each and many at once.
inline constexpr uint64_t kMaxBufferedKvBytes = uint64_t{4} << 30;

// Serves `services` and grpc.health.v1 on `address` (host:port); without a transport in plaintext. Messages
// up to 64 MiB, metadata up to 8 KiB, 128 calls at once of each connection (more wait at the client), 10 s
// for a handshake. Connections end that have no call for ten minutes, or whose peer is gone; how many there
// may be, the program says (base/rpc/accept_limit.h). Streams are reset that bring more than
// max_buffered_bytes in sum. INVALID_ARGUMENT: the port is over 65535. UNAVAILABLE: the address cannot be
// bound (port in use, no such host). The services must outlive the server.
absl::StatusOr<RunningServer> StartServer(const std::string& address,
                                          const std::vector<grpc::Service*>& services,
                                          const Transport* transport = nullptr,
                                          uint64_t max_buffered_bytes = kMaxBufferedBytes);

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
