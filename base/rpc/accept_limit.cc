#include "base/rpc/accept_limit.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <mutex>

#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "base/rpc/reset_limit.h"

namespace headwater {
namespace {

// Descriptors below it are for connections.
std::atomic<int> g_limit{INT_MAX};
std::atomic<uint64_t> g_refused{0};

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
    if (fd < headwater::g_limit) {
      if (headwater::g_limit != INT_MAX) headwater::WatchResets(fd);
      return fd;
    }
    close(fd);
    if (headwater::g_refused++ == 0) {
      HW_LOG(WARNING).Field("limit", int64_t{headwater::g_limit})
          << "too many descriptors are open: connections are refused from now on until some are closed; "
             "headwater_connections_refused_total counts them";
    }
  }
  // More are waiting: the caller asks again.
  errno = EINTR;
  return -1;
}
