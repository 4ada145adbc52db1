#include "base/rpc/reset_limit.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <string>

#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "base/log.h"

namespace headwater {
namespace {

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr size_t kPrefaceSize = sizeof(kPreface) - 1;
constexpr unsigned char kResetStream = 3;
constexpr double kResetsAlways = 16;
constexpr int kMaxDescriptors = 8192;
constexpr int64_t kLogInterval = 60'000'000'000;

// gRPC reads a connection from one thread at a time; its locks are not seen by sanitizers.
struct Guarded {
  std::mutex mutex;
  ResetMeter meter;
};
struct Watched : Guarded {
  std::atomic<uint64_t> cookie{0};  // of the socket that the meter is of; 0: none
};

std::array<Watched, kMaxDescriptors>& Connections() {
  static auto* const connections = new std::array<Watched, kMaxDescriptors>;
  return *connections;
}

ResetBudget& Budget() {
  static auto* const budget = new ResetBudget;
  return *budget;
}

std::atomic<bool> g_watching{false};
std::atomic<uint64_t> g_cut{0};
std::atomic<int64_t> g_logged_at{INT64_MIN};

int64_t Now() {
  timespec now = {};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// What tells a socket from others that had or will have its descriptor.
uint64_t CookieOf(int fd) {
  uint64_t cookie = 0;
  socklen_t size = sizeof(cookie);
  return getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &size) == 0 ? cookie : 0;
}

std::string PeerOf(int fd) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  char text[INET6_ADDRSTRLEN] = "";
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return "";
  const void* const bytes =
      address.ss_family == AF_INET6
          ? static_cast<const void*>(&reinterpret_cast<sockaddr_in6*>(&address)->sin6_addr)
          : &reinterpret_cast<sockaddr_in*>(&address)->sin_addr;
  return inet_ntop(address.ss_family, bytes, text, sizeof(text)) == nullptr ? "" : text;
}

void CountCut(const std::string& peer) {
  ++g_cut;
  const int64_t now = Now();
  int64_t logged_at = g_logged_at;
  if ((logged_at == INT64_MIN || now - logged_at >= kLogInterval) &&
      g_logged_at.compare_exchange_strong(logged_at, now)) {
    HW_LOG(WARNING).Field("peer", peer) << "a client resets too many calls: its connection is cut; "
                                           "headwater_connections_cut_total counts them";
  }
}

// As recvmsg() returned `count`.
ssize_t Watch(int fd, const msghdr& message, ssize_t count) {
  Watched& watched = Connections()[static_cast<size_t>(fd)];
  const uint64_t cookie = watched.cookie;
  if (cookie == 0) return count;
  if (cookie != CookieOf(fd)) {
    watched.cookie = 0;
    return count;
  }
  const int64_t now = Now();
  const std::lock_guard<std::mutex> lock(watched.mutex);
  auto left = static_cast<size_t>(count);
  for (size_t i = 0; i < message.msg_iovlen && left > 0; ++i) {
    const iovec& piece = message.msg_iov[i];
    const size_t size = std::min(piece.iov_len, left);
    if (!watched.meter.Admit(static_cast<const char*>(piece.iov_base), size, now, &Budget())) {
      CountCut(PeerOf(fd));
      watched.cookie = 0;
      shutdown(fd, SHUT_RDWR);
      errno = ECONNRESET;
      return -1;
    }
    left -= size;
  }
  return count;
}

// A TLS connection's meter lives and dies with it.
int MeterIndex() {
  static const int index = SSL_get_ex_new_index(
      0, nullptr, nullptr, nullptr,
      [](void*, void* meter, CRYPTO_EX_DATA*, int, long, void*) { delete static_cast<Guarded*>(meter); });
  return index;
}

// As SSL_read() returned `count`.
int Watch(SSL* connection, const char* bytes, int count) {
  auto* guarded = static_cast<Guarded*>(SSL_get_ex_data(connection, MeterIndex()));
  if (guarded == nullptr) {
    guarded = new Guarded;
    if (SSL_set_ex_data(connection, MeterIndex(), guarded) != 1) {
      delete guarded;
      return count;
    }
  }
  const std::lock_guard<std::mutex> lock(guarded->mutex);
  if (guarded->meter.Admit(bytes, static_cast<size_t>(count), Now(), &Budget())) return count;
  CountCut("");
  return -1;
}

}  // namespace

bool TokenBucket::Take(int64_t now) {
  if (now > at_) tokens_ = std::min(burst_, tokens_ + static_cast<double>(now - at_) * 1e-9 * per_second_);
  at_ = std::max(at_, now);
  if (tokens_ < 1) return false;
  tokens_ -= 1;
  return true;
}

bool ResetMeter::Admit(const char* bytes, size_t count, int64_t now, ResetBudget* budget) {
  size_t at = 0;
  while (at < count) {
    if (state_ == State::kOther) return true;
    if (state_ == State::kOver) return false;
    if (state_ == State::kPayload) {
      const size_t size = std::min(count - at, size_t{left_});
      at += size;
      left_ -= static_cast<uint32_t>(size);
      if (left_ == 0) state_ = State::kHeader;
    } else if (state_ == State::kPreface) {
      if (bytes[at++] != kPreface[have_]) {
        state_ = State::kOther;
      } else if (++have_ == kPrefaceSize) {
        state_ = State::kHeader;
        have_ = 0;
      }
    } else {
      header_[have_++] = static_cast<unsigned char>(bytes[at++]);
      if (have_ < kHeaderSize) continue;
      have_ = 0;
      left_ = uint32_t{header_[0]} << 16 | uint32_t{header_[1]} << 8 | header_[2];
      state_ = left_ == 0 ? State::kHeader : State::kPayload;
      if (header_[3] != kResetStream) continue;
      if (!own_.Take(now) || (!budget->Take(now) && own_.used() > kResetsAlways)) state_ = State::kOver;
    }
  }
  return state_ != State::kOver;
}

void WatchResets(int connection) {
  if (connection < 0 || connection >= kMaxDescriptors) return;
  Watched& watched = Connections()[static_cast<size_t>(connection)];
  const std::lock_guard<std::mutex> lock(watched.mutex);
  watched.meter = ResetMeter();
  watched.cookie = CookieOf(connection);
  g_watching = true;
  static std::once_flag once;
  if (watched.cookie == 0) {
    std::call_once(once, [] {
      HW_LOG(WARNING) << "this system's sockets have no SO_COOKIE: resets in plaintext are not counted";
    });
  }
}

uint64_t NumCutConnections() { return g_cut; }

}  // namespace headwater

extern "C" __attribute__((visibility("default"))) ssize_t recvmsg(int fd, msghdr* message, int flags) {
  static const auto next = reinterpret_cast<ssize_t (*)(int, msghdr*, int)>(dlsym(RTLD_NEXT, "recvmsg"));
  const ssize_t count = next(fd, message, flags);
  if (count <= 0 || (flags & (MSG_PEEK | MSG_ERRQUEUE)) != 0) return count;
  if (!headwater::g_watching || fd < 0 || fd >= headwater::kMaxDescriptors) return count;
  return headwater::Watch(fd, *message, count);
}

// gRPC reads by nothing else. What SSL_get_error() then says of -1 is an error that ends the connection.
extern "C" __attribute__((visibility("default"))) int SSL_read(SSL* connection, void* bytes, int size) {
  static const auto next = reinterpret_cast<int (*)(SSL*, void*, int)>(dlsym(RTLD_NEXT, "SSL_read"));
  const int count = next(connection, bytes, size);
  if (count <= 0 || !headwater::g_watching || SSL_is_server(connection) != 1) return count;
  return headwater::Watch(connection, static_cast<const char*>(bytes), count);
}
