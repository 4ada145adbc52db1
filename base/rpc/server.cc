#include "base/rpc/server.h"

#include <cstdint>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include <grpcpp/create_channel.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>
#include <sys/random.h>

#include "base/log.h"

namespace headwater {

namespace {
constexpr int kMaxMessageBytes = 64 << 20;
constexpr int kMaxMetadataBytes = 8 << 10;
constexpr int kMaxStreams = 128;
constexpr int kHandshakeTimeoutMs = 10'000;
// A peer that is gone without a word is noticed after a minute; a connection without calls ends after ten.
constexpr int kKeepaliveMs = 40'000, kKeepaliveTimeoutMs = 20'000;
constexpr int kIdleMs = 600'000;

// Of every server: what a peer may take of it.
void SetLimits(uint64_t max_buffered_bytes, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(kMaxMessageBytes);
  // gRPC 1.51 reads a message to its end before it looks at its size, be it 4 GiB.
  grpc::ResourceQuota quota("server");
  quota.Resize(static_cast<size_t>(max_buffered_bytes));
  builder->SetResourceQuota(quota);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreams);
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, kIdleMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
}
}  // namespace

absl::StatusOr<RunningServer> StartServer(const std::string& address,
                                          const std::vector<grpc::Service*>& services,
                                          const Transport* transport, uint64_t max_buffered_bytes) {
  // gRPC would take a larger one modulo 65536.
  int64_t port = 0;
  if (absl::SimpleAtoi(address.substr(address.rfind(':') + 1), &port) && (port < 0 || port > 65535)) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot listen on ", address, ": its port is not one from 0 to 65535"));
  }
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  RunningServer running;
  builder.AddListeningPort(
      address, transport == nullptr ? grpc::InsecureServerCredentials() : transport->ServerCredentials(),
      &running.port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  if (services.empty()) {
    running.nothing = std::make_unique<grpc::CallbackGenericService>();
    builder.RegisterCallbackGenericService(running.nothing.get());
  }
  SetLimits(max_buffered_bytes, &builder);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  running.server = builder.BuildAndStart();
  if (running.server == nullptr || running.port == 0) {
    return absl::UnavailableError(absl::StrCat(
        "cannot listen on ", address, ": the port is in use or the host is not one of this machine's"));
  }
  running.address = absl::StrCat(address.substr(0, address.rfind(':')), ":", running.port);
  return running;
}

std::shared_ptr<grpc::Channel> DialPrivate(const std::string& address, const Transport* transport,
                                           Role server, absl::Duration silence) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, static_cast<int>(absl::ToInt64Milliseconds(silence)));
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1'000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2'000);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 1 << 20);
  arguments.SetInt(GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, 1 << 20);
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  return grpc::CreateCustomChannel(
      address,
      transport == nullptr ? grpc::InsecureChannelCredentials() : transport->ChannelCredentials(server),
      arguments);
}

std::string RandomId() {
  uint64_t words[2] = {0, 0};
  // Up to 256 bytes are delivered whole once the system's generator is seeded.
  HW_CHECK(getrandom(words, sizeof(words), 0) == static_cast<ssize_t>(sizeof(words)));
  return absl::StrFormat("%016x%016x", words[0], words[1]);
}

}  // namespace headwater
