// NcclGroup: a group whose ranks have a GPU each, over NCCL. The ranks are threads, processes or machines.
#ifndef HW_WORKER_CUDA_NCCL_GROUP_H_
#define HW_WORKER_CUDA_NCCL_GROUP_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "worker/cuda/device_group.h"
#include "worker/rendezvous.h"

namespace headwater {

struct NcclOptions {
  int rank = 0;
  int world_size = 1;
  // CUDA device of this rank; no two ranks may share one.
  int device = 0;
  // Names the group among all that use the same rendezvous; no two groups may share it.
  std::string group_name;
  // Of forming the group; at most 10 minutes are waited for a peer to come.
  absl::Duration connect_timeout = absl::Seconds(30);
  // Of each operation, from when the stream has come to it on this rank.
  absl::Duration timeout = absl::Seconds(30);
};

// NCCL trusts its peers: its sockets must not be open to strangers.
//
// Exchange() waits while 64 operations are under way. Whoever enqueues hundreds of launches of their own
// behind an exchange may be held by CUDA itself and come to no Check(): only an Abort() from another thread
// ends that. Operations of groups that share a device must be enqueued in the same order on all ranks. A peer
// of an aborted group notices by its own timeout.
//
// Created in two steps so that Abort() can end a Connect() that waits for a peer. Connect(), Exchange() and
// Check() are for one thread, whose current device Connect() and Exchange() set; Abort() is for any.
class NcclGroup : public DeviceGroup {
 public:
  // INVALID_ARGUMENT: rank, world size, device, name or a timeout; UNIMPLEMENTED: built without NCCL. Needs
  // no GPU; nor does a group of one rank, which sends nothing.
  static absl::StatusOr<std::unique_ptr<NcclGroup>> Create(const NcclOptions& options);

  // Forms the communicator and connects every pair of ranks. Call once, before any operation. An Abort()
  // meanwhile aborts `rendezvous` too. DEADLINE_EXCEEDED: a peer did not come; UNAVAILABLE: a peer came and
  // went, or NCCL cannot reach it; CANCELLED: Abort(); INTERNAL, RESOURCE_EXHAUSTED: CUDA's.
  virtual absl::Status Connect(RendezvousClient* rendezvous) = 0;

  // The destructor aborts what is under way. NCCL gives back what it holds when the peers of other processes
  // have gone from it too: that is waited for 5 seconds at most, and goes on in the background after. After
  // an abort, memory that was exchanged is free when the stream has become idle.
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_NCCL_GROUP_H_
