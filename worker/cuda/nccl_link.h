// NcclLink: a communicator of NCCL's that any thread may end, and the error that ended it.
#ifndef HW_WORKER_CUDA_NCCL_LINK_H_
#define HW_WORKER_CUDA_NCCL_LINK_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include <cuda_runtime_api.h>
#include <nccl.h>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

#include "model/cuda/device_buffer.h"
#include "worker/cuda/device_group.h"

namespace headwater {

// The communicator is a non-blocking one: no call here waits for a peer or for the device, except the
// destructor. NCCL gives a communicator back on a thread of its own, since that waits for what runs on the
// device and for the peers' sockets to close. Thread-safe.
//
// NCCL's errors are UNAVAILABLE, with its text, and end the link. After its end all calls return its error.
class NcclLink {
 public:
  NcclLink(int rank, int world_size, int device) : rank_(rank), world_size_(world_size), device_(device) {}
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;
  // Ends the link. Waits until NCCL has given back what it holds, for 5 seconds at most.
  ~NcclLink();

  // "rank 0 of 2: <what> <text>".
  std::string Describe(absl::string_view what, absl::string_view text) const;
  // An error of NCCL's, of this link or not.
  absl::Status Error(ncclResult_t result, absl::string_view what) const;

  // Begins the communicator; the rank's device must be current. Call once.
  absl::Status Init(const ncclUniqueId& id);
  // What may be in use until the communicator has gone.
  absl::Status Keep(cudaStream_t stream, DeviceBuffer memory);

  // Sends and receives as DeviceGroup::Exchange() does. The stream has them when Ready().
  absl::Status Launch(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                      absl::string_view what, cudaStream_t stream);
  // Whether NCCL has done with the last call; true where there is no communicator.
  absl::StatusOr<bool> Ready(absl::string_view what);

  // OK until the link has ended.
  absl::Status error() const;
  // Calls `cancel` if the link ends, with its mutex held; null: no longer. Returns error().
  absl::Status OnEnd(std::function<void()> cancel);
  // Ends the link with `why` and returns the error that stands, the first. What is enqueued ends soon.
  absl::Status Fail(absl::Status why) { return End(std::move(why), false); }
  // After the link's end: waits until NCCL has given back what it holds, for at most `timeout`. False: it has
  // not.
  bool WaitUntilGivenBack(absl::Duration timeout) const;
  // Ends a link whose operations have all ended.
  void Finish() { End(absl::CancelledError("the group has ended"), true).IgnoreError(); }

 private:
  // All of it may wait for the device or for peers when it is given back.
  struct Communicator {
    explicit Communicator(ncclComm_t nccl) : comm(nccl) {}
    ~Communicator();

    const ncclComm_t comm;
    cudaStream_t stream = nullptr;
    DeviceBuffer memory;
  };

  absl::Status End(absl::Status why, bool finish);
  ncclResult_t EnqueueParts(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                            ncclComm_t comm, cudaStream_t stream) const;
  void GiveBack(std::unique_ptr<Communicator> communicator, bool finish);

  const int rank_;
  const int world_size_;
  const int device_;
  const std::shared_ptr<absl::Notification> given_back_ = std::make_shared<absl::Notification>();

  mutable absl::Mutex mutex_;
  absl::Status error_ ABSL_GUARDED_BY(mutex_) = absl::OkStatus();
  std::function<void()> cancel_ ABSL_GUARDED_BY(mutex_);
  // Whoever ends the link takes it. NCCL's calls on it are made under the mutex; none of them waits.
  std::unique_ptr<Communicator> communicator_ ABSL_GUARDED_BY(mutex_);
  bool giving_back_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_NCCL_LINK_H_
