// DeviceGroup: what the GPUs of a group send each other, from device memory to device memory.
#ifndef HW_WORKER_CUDA_DEVICE_GROUP_H_
#define HW_WORKER_CUDA_DEVICE_GROUP_H_

#include <cstdint>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace headwater {

// Device memory; no alignment is wanted.
struct DevicePart {
  char* data = nullptr;
  uint64_t bytes = 0;
};
using DeviceParts = std::vector<DevicePart>;

// All ranks call the same operations in the same order, from one thread each, on one stream each. After any
// error the group is dead: all further calls return that error, and what was enqueued ends soon.
class DeviceGroup {
 public:
  virtual ~DeviceGroup() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // Enqueues: the parts send[r] go to rank r, which gets them in its receive[this rank], part by part; both
  // have world_size() entries, this rank's own are ignored, and sizes of parts agree pairwise. Parts of 0
  // bytes are left out. Returns at once; the memory must stay until the stream has passed. `what` names the
  // operation in errors and must be a literal.
  virtual absl::Status Exchange(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                                absl::string_view what, cudaStream_t stream) = 0;

  // To be called at least every 100 ms while anything is under way. UNAVAILABLE: a peer or a link is gone;
  // DEADLINE_EXCEEDED: an operation has not ended `timeout` after the stream had come to it on this rank;
  // CANCELLED: Abort(). With rank and operation.
  virtual absl::Status Check() = 0;

  // Makes what is enqueued end (with no defined result) and all calls return CANCELLED. From any thread.
  virtual void Abort() = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_DEVICE_GROUP_H_
