// The live page: GET / is one HTML file, GET /state.json what it shows. Nothing else is served, and nothing
// can be changed through it.
#ifndef HW_COORDINATOR_PAGE_PAGE_SERVER_H_
#define HW_COORDINATOR_PAGE_PAGE_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

#include "coordinator/snapshot.h"

namespace headwater {

class PageServer {
 public:
  // Asked at most five times a second, however many look at the page. Called from the server's threads, one
  // at a time; must not wait for long, nor call the server. An error is answered with 503.
  using Source = std::function<absl::StatusOr<Snapshot>()>;

  // address: HOST:PORT with an address for HOST, port 0 takes a free one; empty: nothing is served.
  // Plaintext, without authentication. Four threads answer; a client that is slow to ask or to read is
  // dropped after 2 s. A request must name an address or "localhost" as its host, so that no web site can
  // have a browser ask under a name of its own. INVALID_ARGUMENT, UNAVAILABLE: the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<PageServer>> Start(const std::string& address, Source source);
  // Waits for the requests under way.
  virtual ~PageServer() = default;

  // Where it listens; empty: nowhere.
  virtual const std::string& address() const = 0;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_PAGE_PAGE_SERVER_H_
