#include "tests/integration/chaos_proxy.h"

#include "absl/time/clock.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"

namespace headwater::testing {
namespace {

constexpr int kPollMs = 20;
constexpr size_t kPieceBytes = 64 << 10;

sockaddr_in Loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

bool SendAll(int fd, const char* data, size_t size) {
  while (size > 0) {
    const ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    data += sent;
    size -= static_cast<size_t>(sent);
  }
  return true;
}

}  // namespace

ChaosProxy::ChaosProxy(int target_port) : target_port_(target_port) {
  listener_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = Loopback(0);
  HW_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  HW_CHECK(listen(listener_, 64) == 0);
  socklen_t length = sizeof(address);
  getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length);
  port_ = ntohs(address.sin_port);
  acceptor_ = std::thread([this] { Accept(); });
}

ChaosProxy::~ChaosProxy() {
  stopped_ = true;
  acceptor_.join();
  for (std::thread& pump : pumps_) pump.join();
  close(listener_);
}

void ChaosProxy::Accept() {
  while (!stopped_) {
    pollfd wait{listener_, POLLIN, 0};
    if (poll(&wait, 1, kPollMs) <= 0) continue;
    const int client = accept(listener_, nullptr, nullptr);
    if (client < 0) continue;
    pumps_.emplace_back([this, client] {
      const int server = socket(AF_INET, SOCK_STREAM, 0);
      const sockaddr_in address = Loopback(target_port_);
      if (connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
        const int one = 1;
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        std::thread back([this, server, client] { Pump(server, client, false); });
        Pump(client, server, true);
        back.join();
      }
      close(server);
      close(client);
    });
  }
}

bool ChaosProxy::WaitForRoom() {
  while (forwarded_ >= limit_ && !stopped_) absl::SleepFor(absl::Milliseconds(1));
  return !stopped_;
}

void ChaosProxy::Pump(int from, int to, bool to_server) {
  std::vector<char> piece(kPieceBytes);
  while (!stopped_) {
    pollfd wait{from, POLLIN, 0};
    const int ready = poll(&wait, 1, kPollMs);
    if (ready < 0) break;
    if (ready == 0) continue;
    const ssize_t got = recv(from, piece.data(), piece.size(), 0);
    if (got <= 0) break;
    if (to_server) {
      if (!WaitForRoom()) break;
      if (static_cast<uint64_t>(got) >= flip_least_ && flips_wanted_.exchange(0) == 1) {
        piece[static_cast<size_t>(got) / 2] ^= 1;
        ++flips_done_;
      }
      forwarded_ += static_cast<uint64_t>(got);
    }
    if (!SendAll(to, piece.data(), static_cast<size_t>(got))) break;
  }
  shutdown(from, SHUT_RDWR);
  shutdown(to, SHUT_RDWR);
}

}  // namespace headwater::testing
