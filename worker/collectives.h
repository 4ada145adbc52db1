// Collectives: what the ranks of a group say to each other from host memory. Implementations: in-process
// (threads), Gloo (TCP). GPUs have cuda/device_group.h beside it.
#ifndef HW_WORKER_COLLECTIVES_H_
#define HW_WORKER_COLLECTIVES_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace headwater {

class Transport;

// A group to be formed.
struct GroupSpec {
  std::string name;
  int rank = 0;
  int world_size = 1;
  std::string rendezvous_address;
  absl::Duration connect_timeout;              // of forming it
  absl::Duration timeout;                      // of each operation
  absl::Duration device_timeout;               // of each one between GPUs, which no slow core delays
  std::shared_ptr<const Transport> transport;  // to the rendezvous; null: plaintext
};

// One transfer under way; both buffers must stay until Wait() has returned.
class PendingExchange {
 public:
  virtual ~PendingExchange() = default;
  // Waits for both directions. UNAVAILABLE: a peer or the link is gone; DEADLINE_EXCEEDED: the operation's
  // deadline passed; CANCELLED: Abort(). The message names rank, peer and operation.
  virtual absl::Status Wait() = 0;
};

// All ranks call the same operations in the same order, from one thread each. Every operation has the
// deadline that the group was made with. After any error the group is dead: all further calls return that
// error.
class Collectives {
 public:
  virtual ~Collectives() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // Starts sending `send` to rank `to` and receiving exactly receive.size() bytes from rank `from`. Either
  // span may be empty (nothing is transferred that way). Returns at once.
  virtual std::unique_ptr<PendingExchange> StartExchange(int to, absl::Span<const char> send, int from,
                                                         absl::Span<char> receive) = 0;

  // Every rank gets every rank's `bytes` bytes: out holds world_size * bytes in rank order.
  virtual absl::Status AllGather(const void* in, uint64_t bytes, void* out) = 0;

  // Makes the operations under way and all later ones return CANCELLED, on this rank. From any thread.
  virtual void Abort() = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_COLLECTIVES_H_
