#include "base/http_server.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/notification.h"
#include <civetweb.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

const char* ReasonPhrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 413:
      return "Content Too Large";
    case 421:
      return "Misdirected Request";
    case 503:
      return "Service Unavailable";
    default:
      return status < 500 ? "Bad Request" : "Internal Server Error";
  }
}

bool AreDigits(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return absl::ascii_isdigit(static_cast<unsigned char>(c)); });
}

// A comma or a letter behind the port has a meaning of its own to the library.
absl::Status CheckAddress(const std::string& address, const std::string& what) {
  const size_t colon = address.rfind(':');
  const absl::string_view port =
      colon == std::string::npos ? absl::string_view() : absl::string_view(address).substr(colon + 1);
  if (port.empty() || !AreDigits(port) || !IsHttpAddress(HttpHostOf(address)) ||
      absl::StrContains(address, ',')) {
    return absl::InvalidArgumentError(absl::StrCat(what, " address '", absl::CHexEscape(address),
                                                   "' is not ADDRESS:PORT, as 127.0.0.1:9080"));
  }
  int number = 0;
  if (!absl::SimpleAtoi(port, &number) || number > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " address ", address, ": its port is not one from 0 to 65535"));
  }
  return absl::OkStatus();
}

class CivetServer final : public HttpServer {
 public:
  explicit CivetServer(Options options) : options_(std::move(options)) {}
  ~CivetServer() override {
    if (context_ == nullptr) return;
    // It looks for its end every 2 s, or when somebody comes.
    absl::Notification stopped;
    std::thread stopper([&] {
      mg_stop(context_);
      stopped.Notify();
    });
    while (!stopped.WaitForNotificationWithTimeout(absl::Milliseconds(10))) Knock();
    stopper.join();
    mg_exit_library();
  }

  absl::Status Listen(const std::string& address) {
    HW_RETURN_IF_ERROR(CheckAddress(address, options_.what));
    mg_callbacks callbacks = {};
    callbacks.begin_request = [](mg_connection* connection) { return Self(connection)->Answer(connection); };
    callbacks.http_error = [](mg_connection* connection, int status, const char*) {
      Self(connection)->Send(connection, {.status = status}, true);
      return 0;
    };
    // Its messages quote what clients send.
    callbacks.log_message = [](const mg_connection*, const char*) { return 1; };
    callbacks.log_access = callbacks.log_message;
    // clang-format off
    const char* const settings[] = {
        "listening_ports", address.c_str(),
        "num_threads", "4",
        "connection_queue", "16",
        "listen_backlog", "16",
        "request_timeout_ms", "2000",
        "linger_timeout_ms", "100",
        "max_request_size", "8192",
        "enable_keep_alive", "no",
        nullptr};
    // clang-format on
    mg_init_library(0);
    context_ = mg_start(&callbacks, this, const_cast<const char**>(settings));
    if (context_ == nullptr) {
      mg_exit_library();
      return absl::UnavailableError(absl::StrCat(options_.what, " address ", address, " cannot be bound"));
    }
    mg_server_port bound = {};
    if (mg_get_server_ports(context_, 1, &bound) == 1) {
      address_ = absl::StrCat(HttpHostOf(address), ":", bound.port);
    }
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

 private:
  static CivetServer* Self(const mg_connection* connection) {
    return static_cast<CivetServer*>(mg_get_user_data(mg_get_context(connection)));
  }

  void Knock() const {
    const absl::string_view host = absl::StripPrefix(absl::StripSuffix(HttpHostOf(address_), "]"), "[");
    addrinfo hints = {}, *to = nullptr;
    hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
    hints.ai_socktype = SOCK_STREAM;
    const std::string port = address_.substr(address_.rfind(':') + 1);
    if (getaddrinfo(std::string(host).c_str(), port.c_str(), &hints, &to) != 0) return;
    const int fd = socket(to->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0) {
      connect(fd, to->ai_addr, to->ai_addrlen);
      close(fd);
    }
    freeaddrinfo(to);
  }

  // The status, by which the library knows that the request has been answered.
  int Answer(mg_connection* connection) {
    const mg_request_info* const request = mg_get_request_info(connection);
    const absl::string_view method = request->request_method;
    const absl::string_view uri = request->request_uri == nullptr ? "" : request->request_uri;
    const char* const host = mg_get_header(connection, "Host");
    HttpAnswer answer;
    try {
      answer = options_.handler({uri.substr(0, uri.find('?')), host == nullptr ? "" : host});
    } catch (const std::exception& e) {
      // None may pass through the library's C frames.
      HW_LOG(ERROR).Field("error", e.what()).Field("what", options_.what) << "no answer over HTTP";
      answer = {.status = 500};
    }
    const bool is_head = method == "HEAD";
    if (answer.status == 200 && method != "GET" && !is_head) answer = {.status = 405};
    Send(connection, answer, !is_head);
    return answer.status;
  }

  void Send(mg_connection* connection, const HttpAnswer& answer, bool with_body) const {
    const char* const reason = ReasonPhrase(answer.status);
    absl::string_view body = answer.body;
    if (body.empty() && answer.status != 200) body = reason;
    const std::string head =
        absl::StrCat("HTTP/1.1 ", answer.status, " ", reason, "\r\nContent-Type: ", answer.type,
                     "; charset=utf-8\r\nContent-Length: ", body.size(), "\r\nCache-Control: no-store\r\n",
                     "Connection: close\r\n", answer.status == 405 ? "Allow: GET, HEAD\r\n" : "",
                     options_.headers, "\r\n");
    if (mg_write(connection, head.data(), head.size()) <= 0 || !with_body) return;
    mg_write(connection, body.data(), body.size());
  }

  const Options options_;
  std::string address_;
  mg_context* context_ = nullptr;
};

class NoServer final : public HttpServer {
 public:
  const std::string& address() const override { return address_; }

 private:
  const std::string address_;
};

}  // namespace

absl::string_view HttpHostOf(absl::string_view address) {
  if (absl::StartsWith(address, "[")) return address.substr(0, address.find(']') + 1);
  return address.substr(0, address.rfind(':'));
}

bool IsHttpAddress(absl::string_view host) {
  if (absl::StartsWith(host, "[")) return true;
  return !host.empty() && std::all_of(host.begin(), host.end(), [](char c) {
    return absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '.';
  });
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& address, Options options) {
  if (address.empty()) return std::make_unique<NoServer>();
  auto server = std::make_unique<CivetServer>(std::move(options));
  HW_RETURN_IF_ERROR(server->Listen(address));
  return server;
}

}  // namespace headwater
