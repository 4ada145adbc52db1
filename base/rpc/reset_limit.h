// How fast clients may reset their calls.
//
// A client that opens streams and resets them at once has gRPC 1.51 make a call of each, faster than calls
// end and without a limit: memory grows by gigabytes, and others wait for seconds (CVE-2023-44487).
// reset_limit.cc takes the place of the C library's recvmsg() and of OpenSSL's SSL_read() in programs that
// LimitConnections() has been called in, counts RST_STREAM frames (RFC 9113, 6.4) on connections that they
// took, and cuts connections that send too many. Delete when gRPC's servers do so themselves (1.60).
#ifndef HW_BASE_RPC_RESET_LIMIT_H_
#define HW_BASE_RPC_RESET_LIMIT_H_

#include <cstddef>
#include <cstdint>
#include <mutex>

namespace headwater {

// `burst` at once, and `per_second` in the long run. Times are nanoseconds of one clock.
class TokenBucket {
 public:
  TokenBucket(double burst, double per_second) : burst_(burst), per_second_(per_second), tokens_(burst) {}

  // False: there was none to take.
  bool Take(int64_t now);
  // Taken and not yet come back.
  double used() const { return burst_ - tokens_; }

 private:
  double burst_, per_second_, tokens_;
  int64_t at_ = 0;
};

// What all connections of a process may send together. A client may cancel all of the 128 calls that a
// connection has, time and again; what the limits stand for is a fraction of what makes others wait (25,000
// calls a second on two cores).
class ResetBudget {
 public:
  bool Take(int64_t now) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bucket_.Take(now);
  }

 private:
  std::mutex mutex_;
  TokenBucket bucket_{4000, 2000};
};

// The resets of one connection, whose bytes pass through it. Not thread-safe.
class ResetMeter {
 public:
  // Whether the connection may go on after these bytes. It may not from the reset on that is one too many:
  // where the connection has sent 1,000 at once or 500 a second, or 16 where the process has none left. Bytes
  // that are no HTTP/2, such as TLS, all pass.
  bool Admit(const char* bytes, size_t count, int64_t now, ResetBudget* budget);
  bool over() const { return state_ == State::kOver; }

 private:
  enum class State : uint8_t { kPreface, kHeader, kPayload, kOther, kOver };

  static constexpr size_t kHeaderSize = 9;

  State state_ = State::kPreface;
  uint32_t left_ = 0;  // of the payload
  size_t have_ = 0;    // of the preface, or of the header
  unsigned char header_[kHeaderSize] = {};
  TokenBucket own_{1000, 500};
};

// Counts what comes on this connection from now on. It must have been accepted just now; at most the first
// 8,192 descriptors are looked at.
void WatchResets(int connection);

// Connections cut so far; one a minute is logged.
uint64_t NumCutConnections();

}  // namespace headwater

#endif  // HW_BASE_RPC_RESET_LIMIT_H_
