// A TCP proxy that misbehaves on order, between a worker and a decode node.
#ifndef HW_TESTS_INTEGRATION_CHAOS_PROXY_H_
#define HW_TESTS_INTEGRATION_CHAOS_PROXY_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace headwater::testing {

// Listens on a port of 127.0.0.1 and forwards each connection to `target_port`. Thread-safe.
class ChaosProxy {
 public:
  explicit ChaosProxy(int target_port);
  ~ChaosProxy();

  int port() const { return port_; }

  // Client to server, all connections together: stops forwarding once `bytes` have passed since the start;
  // the default is no limit. Raising it goes on.
  void LimitForwardedBytes(uint64_t bytes) { limit_ = bytes; }
  // Flips the lowest bit of the middle byte of the next client-to-server piece of at least `least_bytes`.
  void FlipBitInNextPiece(uint64_t least_bytes) {
    flip_least_ = least_bytes;
    flips_wanted_ = 1;
  }

  uint64_t forwarded_bytes() const { return forwarded_; }
  int flips_done() const { return flips_done_; }

 private:
  void Accept();
  void Pump(int from, int to, bool to_server);
  // Waits for room under the limit; false: stopped.
  bool WaitForRoom();

  const int target_port_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stopped_{false};
  std::atomic<uint64_t> limit_{UINT64_MAX};
  std::atomic<uint64_t> forwarded_{0};
  std::atomic<uint64_t> flip_least_{0};
  std::atomic<int> flips_wanted_{0};
  std::atomic<int> flips_done_{0};
  std::thread acceptor_;
  std::vector<std::thread> pumps_;  // of the acceptor's thread only, until it is joined
};

}  // namespace headwater::testing

#endif  // HW_TESTS_INTEGRATION_CHAOS_PROXY_H_
