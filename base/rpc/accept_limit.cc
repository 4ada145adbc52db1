#include "base/rpc/accept_limit.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <mutex>

#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace headwater {
namespace {

// Descriptors below it are for connections.
std::atomic<int> g_limit{INT_MAX};
std::atomic<int> g_always{0};
std::atomic<uint64_t> g_refused{0};

int PortOf(int listener) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  if (getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  if (address.ss_family == AF_INET) return ntohs(reinterpret_cast<sockaddr_in*>(&address)->sin_port);
  if (address.ss_family == AF_INET6) return ntohs(reinterpret_cast<sockaddr_in6*>(&address)->sin6_port);
  return 0;
}

}  // namespace

void LimitConnections() {
  static std::once_flag once;
  std::call_once(once, [] {
    constexpr rlim_t kWanted = kMaxConnections + 4 * kKeptDescriptors;
    rlimit files = {};
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
    if (files.rlim_cur < kWanted && files.rlim_cur < files.rlim_max) {
      files.rlim_cur = std::min(kWanted, files.rlim_max);
      setrlimit(RLIMIT_NOFILE, &files);
      getrlimit(RLIMIT_NOFILE, &files);
    }
    const auto open = static_cast<int>(std::min(files.rlim_cur, kWanted));
    // With a very small limit half of it is for connections.
    g_limit = std::max(open / 2, open - kKeptDescriptors);
  });
}

void AcceptAlways(int port) { g_always = port; }

uint64_t NumRefusedConnections() { return g_refused; }

}  // namespace headwater

// Callers (gRPC) are told of the next connection that is welcome, or, as ever, that there is none now.
extern "C" __attribute__((visibility("default"))) int accept4(int listener, sockaddr* address,
                                                              socklen_t* size, int flags) {
  constexpr int kAtOnce = 1024;
  const socklen_t room = size == nullptr ? 0 : *size;
  for (int i = 0; i < kAtOnce; ++i) {
    if (size != nullptr) *size = room;
    const auto fd = static_cast<int>(syscall(SYS_accept4, listener, address, size, flags));
    if (fd < headwater::g_limit) return fd;
    if (headwater::g_always != 0 && headwater::PortOf(listener) == headwater::g_always) return fd;
    close(fd);
    ++headwater::g_refused;
  }
  // More are waiting: the caller asks again.
  errno = EINTR;
  return -1;
}
