// A client of HTTP servers on this machine.
#ifndef HW_TESTS_SUPPORT_HTTP_H_
#define HW_TESTS_SUPPORT_HTTP_H_

#include <map>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

namespace headwater::testing {

struct HttpResponse {
  int status = 0;  // 0: there was none
  std::map<std::string, std::string> headers;
  std::string body;
};

// To 127.0.0.1 at the port of `address`, -1 if it does not listen. Receiving takes `limit_s` at most.
inline int ConnectHttp(const std::string& address, int limit_s = 10) {
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int port = 0;
  if (!absl::SimpleAtoi(address.substr(address.rfind(':') + 1), &port)) return -1;
  to.sin_port = htons(static_cast<uint16_t>(port));
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const timeval limit = {limit_s, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0) return fd;
  close(fd);
  return -1;
}

// One that nobody listened on a moment ago.
inline int FreePort() {
  sockaddr_in at = {};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(at);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const bool bound = bind(fd, reinterpret_cast<sockaddr*>(&at), size) == 0 &&
                     getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size) == 0;
  close(fd);
  return bound ? ntohs(at.sin_port) : 0;
}

// All that the server sends until it closes or says nothing for the connection's limit.
inline std::string ReadAll(int fd) {
  std::string out;
  std::vector<char> buffer(1 << 16);
  for (ssize_t n = 0; (n = recv(fd, buffer.data(), buffer.size(), 0)) > 0;) {
    out.append(buffer.data(), static_cast<size_t>(n));
  }
  return out;
}

inline HttpResponse ParseHttp(const std::string& text) {
  HttpResponse response;
  const size_t end = text.find("\r\n\r\n");
  if (end == std::string::npos) return response;
  const std::vector<std::string> lines = absl::StrSplit(text.substr(0, end), "\r\n");
  if (lines[0].size() < 12 || !absl::SimpleAtoi(lines[0].substr(9, 3), &response.status)) return {};
  for (size_t i = 1; i < lines.size(); ++i) {
    const size_t colon = lines[i].find(": ");
    if (colon != std::string::npos) response.headers[lines[i].substr(0, colon)] = lines[i].substr(colon + 2);
  }
  response.body = text.substr(end + 4);
  return response;
}

// Sends `request` as it is.
inline HttpResponse AskHttp(const std::string& address, const std::string& request, int limit_s = 10) {
  const int fd = ConnectHttp(address, limit_s);
  if (fd < 0) return {};
  HttpResponse response;
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(request.size())) {
    response = ParseHttp(ReadAll(fd));
  }
  close(fd);
  return response;
}

inline HttpResponse GetHttp(const std::string& address, const std::string& target,
                            const std::string& method = "GET", const std::string& host = "localhost",
                            int limit_s = 10) {
  return AskHttp(
      address,
      absl::StrCat(method, " ", target, " HTTP/1.1\r\nHost: ", host, "\r\nConnection: close\r\n\r\n"),
      limit_s);
}

}  // namespace headwater::testing

#endif  // HW_TESTS_SUPPORT_HTTP_H_
