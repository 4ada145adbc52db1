#include "coordinator/page/page_server.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include <civetweb.h>
#include <openssl/sha.h>

#include "base/clock.h"
#include "base/log.h"
#include "coordinator/page/page_files.h"
#include "coordinator/page/snapshot_json.h"

namespace headwater {
namespace {

constexpr absl::Duration kFresh = absl::Milliseconds(200);

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

// 'sha256-...' of an inline style or script.
std::string HashSource(const std::string& text) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest);
  return absl::StrCat(
      "'sha256-",
      absl::Base64Escape(absl::string_view(reinterpret_cast<const char*>(digest), sizeof(digest))), "'");
}

// Of HOST:PORT, [ADDRESS]:PORT or either without a port.
absl::string_view HostOf(absl::string_view address) {
  if (absl::StartsWith(address, "[")) return address.substr(0, address.find(']') + 1);
  return address.substr(0, address.rfind(':'));
}

bool IsAddress(absl::string_view host) {
  if (absl::StartsWith(host, "[")) return true;
  return !host.empty() && std::all_of(host.begin(), host.end(), [](char c) {
    return absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '.';
  });
}

class CivetPageServer final : public PageServer {
 public:
  explicit CivetPageServer(Source source) : source_(std::move(source)) {
    const std::string script = absl::StrCat(kPagePartsJs, kPageJs);
    html_ = absl::StrReplaceAll(kPageHtml, {{"/*page.css*/", kPageCss}, {"/*page.js*/", script}});
    headers_ = absl::StrCat(
        "Cache-Control: no-store\r\nConnection: close\r\n"
        "Content-Security-Policy: default-src 'none'; style-src ",
        HashSource(kPageCss), "; script-src ", HashSource(script),
        "; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
        "Cross-Origin-Resource-Policy: same-origin\r\nReferrer-Policy: no-referrer\r\n"
        "X-Content-Type-Options: nosniff\r\n");
  }

  ~CivetPageServer() override {
    if (context_ == nullptr) return;
    mg_stop(context_);
    mg_exit_library();
  }

  absl::Status Listen(const std::string& address) {
    // A comma or a letter behind the port has a meaning of its own to the library.
    const size_t colon = address.rfind(':');
    const absl::string_view port =
        colon == std::string::npos ? absl::string_view() : absl::string_view(address).substr(colon + 1);
    const absl::string_view host = HostOf(address);
    const bool digits = std::all_of(
        port.begin(), port.end(), [](char c) { return absl::ascii_isdigit(static_cast<unsigned char>(c)); });
    if (port.empty() || !digits || !IsAddress(host) || address.find(',') != std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat("page address '", absl::CHexEscape(address),
                                                     "' is not ADDRESS:PORT, as 127.0.0.1:9080"));
    }
    mg_callbacks callbacks = {};
    callbacks.begin_request = [](mg_connection* connection) { return Self(connection)->Answer(connection); };
    callbacks.http_error = [](mg_connection* connection, int status, const char*) {
      Self(connection)->Send(connection, status, "text/plain", ReasonPhrase(status), true);
      return 0;
    };
    // Its messages quote what clients send.
    callbacks.log_message = [](const mg_connection*, const char*) { return 1; };
    callbacks.log_access = callbacks.log_message;
    // clang-format off
    const char* const options[] = {
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
    context_ = mg_start(&callbacks, this, const_cast<const char**>(options));
    if (context_ == nullptr) {
      mg_exit_library();
      return absl::UnavailableError(absl::StrCat("page address ", address, " cannot be bound"));
    }
    mg_server_port bound = {};
    if (mg_get_server_ports(context_, 1, &bound) == 1) address_ = absl::StrCat(host, ":", bound.port);
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

 private:
  static CivetPageServer* Self(const mg_connection* connection) {
    return static_cast<CivetPageServer*>(mg_get_user_data(mg_get_context(connection)));
  }

  void Send(mg_connection* connection, int status, absl::string_view type, absl::string_view body,
            bool with_body, absl::string_view more_headers = "") const {
    const std::string head = absl::StrCat(
        "HTTP/1.1 ", status, " ", ReasonPhrase(status), "\r\nContent-Type: ", type,
        "; charset=utf-8\r\nContent-Length: ", body.size(), "\r\n", headers_, more_headers, "\r\n");
    if (mg_write(connection, head.data(), head.size()) <= 0 || !with_body) return;
    mg_write(connection, body.data(), body.size());
  }

  bool IsHost(const char* header) const {
    if (header == nullptr) return false;
    const absl::string_view host = HostOf(header);
    return IsAddress(host) || absl::EqualsIgnoreCase(host, "localhost");
  }

  // The status, by which the library knows that the request has been answered.
  int Answer(mg_connection* connection) {
    const mg_request_info* const request = mg_get_request_info(connection);
    const absl::string_view method = request->request_method;
    const absl::string_view uri = request->request_uri == nullptr ? "" : request->request_uri;
    const absl::string_view path = uri.substr(0, uri.find('?'));
    const bool with_body = method != "HEAD";
    const auto refuse = [&](int status, absl::string_view more_headers = "") {
      Send(connection, status, "text/plain", ReasonPhrase(status), with_body, more_headers);
      return status;
    };
    if (!IsHost(mg_get_header(connection, "Host"))) return refuse(421);
    if (path != "/" && path != "/state.json") return refuse(404);
    if (method != "GET" && method != "HEAD") return refuse(405, "Allow: GET, HEAD\r\n");
    if (path == "/") {
      Send(connection, 200, "text/html", html_, with_body);
      return 200;
    }
    const std::shared_ptr<const std::string> state = State();
    if (state == nullptr) return refuse(503);
    Send(connection, 200, "application/json", *state, with_body);
    return 200;
  }

  // Null: the source failed.
  std::shared_ptr<const std::string> State() {
    absl::MutexLock lock(&mutex_);
    const absl::Time now = Clock::Real()->Now();
    if (state_ != nullptr && now >= state_at_ && now - state_at_ < kFresh) return state_;
    state_ = nullptr;
    try {
      const absl::StatusOr<Snapshot> snapshot = source_();
      if (snapshot.ok()) state_ = std::make_shared<const std::string>(SnapshotJson(*snapshot));
    } catch (const std::exception& e) {
      // None may pass through the library's C frames.
      HW_LOG(ERROR).Field("error", e.what()) << "no state for the page";
    }
    state_at_ = now;
    return state_;
  }

  const Source source_;
  std::string html_;
  std::string headers_;
  std::string address_;
  mg_context* context_ = nullptr;
  absl::Mutex mutex_;
  std::shared_ptr<const std::string> state_ ABSL_GUARDED_BY(mutex_);
  absl::Time state_at_ ABSL_GUARDED_BY(mutex_);
};

class NoPage final : public PageServer {
 public:
  const std::string& address() const override { return address_; }

 private:
  const std::string address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PageServer>> PageServer::Start(const std::string& address, Source source) {
  if (address.empty()) return std::make_unique<NoPage>();
  auto server = std::make_unique<CivetPageServer>(std::move(source));
  const absl::Status listening = server->Listen(address);
  if (!listening.ok()) return listening;
  return server;
}

}  // namespace headwater
