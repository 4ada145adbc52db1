// HttpServer: answers GET and HEAD of a few paths, in plaintext and from threads of its own, so that what
// keeps gRPC's threads busy does not keep it from answering.
#ifndef HW_BASE_HTTP_SERVER_H_
#define HW_BASE_HTTP_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headwater {

struct HttpRequest {
  absl::string_view path;  // without what follows a '?'
  absl::string_view host;  // as the client names it; empty: it does not
};

struct HttpAnswer {
  int status = 200;
  std::string type = "text/plain";  // sent with "; charset=utf-8"
  std::string body = {};            // empty and another status than 200: what HTTP calls that
};

// Of HOST:PORT, [ADDRESS]:PORT or either without a port.
absl::string_view HttpHostOf(absl::string_view address);
// Whether that is an address and not a name.
bool IsHttpAddress(absl::string_view host);

class HttpServer {
 public:
  // Called from four threads at once; must not wait for long. What it throws is answered with 500.
  using Handler = std::function<HttpAnswer(const HttpRequest&)>;
  struct Options {
    std::string what;          // in error texts: "page"
    std::string headers = {};  // of every answer, each ending in "\r\n"
    Handler handler;           // methods other than GET and HEAD are refused after it said 200
  };

  // address: HOST:PORT with an address for HOST, port 0 takes a free one; empty: nothing is served. Four
  // threads answer, 16 connections wait, a request has 8 KiB at most, and a client that is slow to ask or to
  // read is dropped after 2 s. INVALID_ARGUMENT; UNAVAILABLE: the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& address, Options options);
  // Waits for the requests under way.
  virtual ~HttpServer() = default;

  // Where it listens; empty: nowhere.
  virtual const std::string& address() const = 0;
};

}  // namespace headwater

#endif  // HW_BASE_HTTP_SERVER_H_
