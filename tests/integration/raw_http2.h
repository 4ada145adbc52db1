// HTTP/2 by hand, for clients that do what gRPC's would not.
#ifndef HW_TESTS_INTEGRATION_RAW_HTTP2_H_
#define HW_TESTS_INTEGRATION_RAW_HTTP2_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace headwater::testing {

// A TCP connection to a port of 127.0.0.1. Not thread-safe.
class RawConnection {
 public:
  explicit RawConnection(int port);
  ~RawConnection() { Close(); }
  RawConnection(RawConnection&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  RawConnection& operator=(RawConnection&&) = delete;

  bool connected() const { return fd_ >= 0; }
  // False: the peer has gone, or took nothing for 5 s.
  bool Send(absl::string_view bytes);
  // What has come, waiting at most so long for the first byte.
  std::string Receive(absl::Duration limit);
  // True once the peer has closed the connection; looks for at most `limit`.
  bool ClosedWithin(absl::Duration limit);
  void Close();

 private:
  int fd_ = -1;
};

enum class FrameType : uint8_t {
  kData = 0,
  kHeaders = 1,
  kReset = 3,
  kSettings = 4,
  kGoaway = 7,
  kWindow = 8,
  kContinuation = 9
};

struct Http2Frame {
  FrameType type = FrameType::kData;
  uint8_t flags = 0;
  uint32_t stream = 0;
  std::string payload;
};

inline constexpr uint8_t kEndStream = 1, kEndHeaders = 4;

std::string Encode(const Http2Frame& frame);
// The preface and empty settings.
std::string Preface();
// The header block of a gRPC call, all literals.
std::string CallHeaders(absl::string_view path,
                        const std::vector<std::pair<std::string, std::string>>& metadata = {});
// Whole frames at the front of `bytes`, which are taken out.
std::vector<Http2Frame> TakeFrames(std::string* bytes);
// Agrees to the settings that the peer sent, as it may expect within a while.
std::string SettingsAck();

}  // namespace headwater::testing

#endif  // HW_TESTS_INTEGRATION_RAW_HTTP2_H_
