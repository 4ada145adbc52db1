// GlooCollectives: a group whose ranks are processes, over TCP.
#ifndef HW_WORKER_GLOO_COLLECTIVES_H_
#define HW_WORKER_GLOO_COLLECTIVES_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "worker/collectives.h"
#include "worker/rendezvous.h"

namespace headwater {

struct GlooOptions {
  int rank = 0;
  int world_size = 1;
  // Address or host name of the interface that the rank's sockets bind to; its peers must reach it.
  std::string host = "127.0.0.1";
  // Names the group among all that use the same rendezvous; no two groups may share it.
  std::string group_name;
  // Of forming the group; at most 10 minutes are waited for a peer's address.
  absl::Duration connect_timeout = absl::Seconds(30);
  // Of each operation, from its Wait().
  absl::Duration timeout = absl::Seconds(30);
};

// Gloo trusts its peers: the interface must not be open to strangers. It writes to sockets that may be
// closed, so the process must ignore SIGPIPE (BlockTerminationSignals() does). An operation that failed, and
// Abort(), reset the connections, which discards what peers have not received yet; the destructor does not.
//
// Created in two steps so that Abort() can end a Connect() that waits for a peer.
class GlooCollectives : public Collectives {
 public:
  // INVALID_ARGUMENT: rank or world size; UNAVAILABLE: the host cannot be bound.
  static absl::StatusOr<std::unique_ptr<GlooCollectives>> Create(const GlooOptions& options);

  // Connects every pair of ranks. Call once, before any operation. DEADLINE_EXCEEDED: a peer did not come;
  // UNAVAILABLE: a peer came and went; CANCELLED: Abort().
  virtual absl::Status Connect(RendezvousClient* rendezvous) = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_GLOO_COLLECTIVES_H_
