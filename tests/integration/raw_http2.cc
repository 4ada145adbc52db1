#include "tests/integration/raw_http2.h"

#include "absl/time/clock.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace headwater::testing {
namespace {

constexpr size_t kFrameHeader = 9;

bool Ready(int fd, short events, absl::Duration limit) {
  pollfd wait = {fd, events, 0};
  return poll(&wait, 1, static_cast<int>(absl::ToInt64Milliseconds(limit))) > 0;
}

// An HPACK integer with a prefix of 7 bits that are all its own.
std::string Length(size_t value) {
  if (value < 127) return std::string(1, static_cast<char>(value));
  std::string out(1, '\x7f');
  for (value -= 127; value >= 128; value /= 128) out.push_back(static_cast<char>(128 + value % 128));
  out.push_back(static_cast<char>(value));
  return out;
}

}  // namespace

RawConnection::RawConnection(int port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  const timeval limit = {5, 0};
  setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
  if (connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) Close();
}

void RawConnection::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

bool RawConnection::Send(absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

std::string RawConnection::Receive(absl::Duration limit) {
  std::string bytes(64 << 10, '\0');
  if (fd_ < 0 || !Ready(fd_, POLLIN, limit)) return "";
  const ssize_t got = recv(fd_, bytes.data(), bytes.size(), MSG_DONTWAIT);
  bytes.resize(got > 0 ? static_cast<size_t>(got) : 0);
  return bytes;
}

bool RawConnection::ClosedWithin(absl::Duration limit) {
  char sink[4096];
  const absl::Time end = absl::Now() + limit;
  while (absl::Now() < end) {
    if (!Ready(fd_, POLLIN, end - absl::Now())) return false;
    if (recv(fd_, sink, sizeof(sink), MSG_DONTWAIT) <= 0) return true;
  }
  return false;
}

std::string Encode(const Http2Frame& frame) {
  std::string out;
  const size_t size = frame.payload.size();
  for (const int shift : {16, 8, 0}) out.push_back(static_cast<char>(size >> shift));
  out.push_back(static_cast<char>(frame.type));
  out.push_back(static_cast<char>(frame.flags));
  for (const int shift : {24, 16, 8, 0}) out.push_back(static_cast<char>(frame.stream >> shift));
  return out + frame.payload;
}

std::string SettingsAck() { return Encode({FrameType::kSettings, 1, 0, ""}); }

std::string Preface() {
  return "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + Encode({FrameType::kSettings, 0, 0, ""});
}

std::string CallHeaders(absl::string_view path,
                        const std::vector<std::pair<std::string, std::string>>& metadata) {
  std::vector<std::pair<std::string, std::string>> headers = {{":method", "POST"},
                                                              {":scheme", "http"},
                                                              {":path", std::string(path)},
                                                              {":authority", "test"},
                                                              {"content-type", "application/grpc"},
                                                              {"te", "trailers"}};
  headers.insert(headers.end(), metadata.begin(), metadata.end());
  std::string block;
  for (const auto& [name, value] : headers) {
    // Literal, never indexed, with a new name.
    block.push_back('\x10');
    block += Length(name.size()) + name + Length(value.size()) + value;
  }
  return block;
}

std::vector<Http2Frame> TakeFrames(std::string* bytes) {
  std::vector<Http2Frame> frames;
  size_t at = 0;
  while (bytes->size() - at >= kFrameHeader) {
    const auto byte = [&](size_t i) { return uint32_t{static_cast<unsigned char>((*bytes)[at + i])}; };
    const size_t size = byte(0) << 16 | byte(1) << 8 | byte(2);
    if (bytes->size() - at < kFrameHeader + size) break;
    const uint32_t stream = (byte(5) << 24 | byte(6) << 16 | byte(7) << 8 | byte(8)) & 0x7fffffff;
    frames.push_back({static_cast<FrameType>(byte(3)), static_cast<uint8_t>(byte(4)), stream,
                      bytes->substr(at + kFrameHeader, size)});
    at += kFrameHeader + size;
  }
  bytes->erase(0, at);
  return frames;
}

}  // namespace headwater::testing
