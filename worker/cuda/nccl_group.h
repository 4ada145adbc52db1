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

// NCCL trusts its peers: its sockets must not be open to strangers. NCCL gives a communicator back at
// leisure, after the peers of other processes have given up theirs: a thread of the group's own waits for
// that.
//
// Exchange() waits while 64 operations are under way. Who enqueues hundreds of launches of their own behind
// an exchange may be held by CUDA itself and come to no Check(): only an Abort() from another thread ends
// that. Groups that share a device must be used in the same order on all ranks.
//
// Created in two steps so that Abort() can end a Connect() that waits for a peer. Connect(), Exchange() and
// Check() are for one thread, whose current device Connect() and Exchange() set; Abort() is for any.
class NcclGroup : public DeviceGroup {
 public:
  // INVALID_ARGUMENT: rank, world size, device, name or a timeout; UNIMPLEMENTED: built without NCCL. Needs
  // no GPU; nor does a group of one rank, which sends nothing.
  static absl::StatusOr<std::unique_ptr<NcclGroup>> Create(const NcclOptions& options);

  // Forms the communicator and connects every pair of ranks. Call once, before any operation.
  // DEADLINE_EXCEEDED: a peer did not come; UNAVAILABLE: a peer came and went, or NCCL found no way to it;
  // CANCELLED: Abort(); INTERNAL, RESOURCE_EXHAUSTED: CUDA's. `rendezvous` ends with the group's end if that
  // comes while it is in use here.
  virtual absl::Status Connect(RendezvousClient* rendezvous) = 0;

  // The destructor waits for the peers' part of the parting, for 5 seconds at most; with operations under way
  // it aborts. The streams must have become idle before memory that was exchanged is used otherwise.
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_NCCL_GROUP_H_
