// CudaEgress: K and V of finished layers on their way from device memory, through a bounded ring of pinned
// buffers, to the KV sender. When the decode node is slow the ring fills, K and V stay on the device, and
// compute waits.
#ifndef HW_WORKER_CUDA_CUDA_EGRESS_H_
#define HW_WORKER_CUDA_CUDA_EGRESS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/sender.h"
#include "model/cuda/device_buffer.h"
#include "worker/egress.h"
#include "worker/prefill.h"

namespace headwater {

// The ring: pinned memory and who reads it, kept from pass to pass, so that a pass may start while the
// senders of the last one still read. Must outlive the senders that were given blocks of it.
struct CudaEgressMemory {
  // Many small ones: K or V of a packed prompt's layer takes one, however short the prompt is.
  static constexpr int kSlots = 64;
  static constexpr uint64_t kSlotBytes = 4 << 20;

  // RESOURCE_EXHAUSTED: no pinned memory. stall_timeout: EgressRing's.
  static absl::StatusOr<std::unique_ptr<CudaEgressMemory>> Allocate(
      absl::Duration stall_timeout = absl::Seconds(30));

  DeviceBuffer slots;
  DeviceBuffer runs;  // of each slot a kernels::CudaTokenRun and a word of problems
  std::unique_ptr<EgressRing> ring;
  int64_t next_use = 0;
};

// One prompt of a pass; of one that is shared, this rank's tokens leave.
struct CudaEgressItem {
  const PrefillJob* job = nullptr;
  KvSender* sender = nullptr;
  int64_t first_row = 0;  // of its tokens in the pass's K and V
};

// Thread-compatible; one thread of its own copies and hands on.
class CudaEgress {
 public:
  // What the job control says, and its heartbeat; called while the loop waits, at least every 20 ms.
  using Step = std::function<absl::Status()>;

  // UNIMPLEMENTED: a block of the job's cache is larger than a slot.
  static absl::Status CheckBlocks(const PrefillJob& job);

  // What the items point to and `memory`, which serves one at a time, must outlive this. Errors:
  // CheckBlocks()'s, CUDA's.
  static absl::StatusOr<std::unique_ptr<CudaEgress>> Start(std::vector<CudaEgressItem> items,
                                                           CudaEgressMemory* memory);
  // Ends at once; waits for copies under way.
  virtual ~CudaEgress() = default;

  // K and V of the layer, bf16 [tokens, num_kv_heads, head_dim] on the device, are whole once `ready`
  // (recorded already) has happened. They must not change before WaitCopied(layer). Layers come in order.
  // Returns at once.
  virtual void Send(int32_t layer, const void* k, const void* v, cudaEvent_t ready) = 0;

  // Waits until the layer's K and V have left the device; the time waited is added to *stalled. Errors:
  // UNAVAILABLE, KV_STREAM_STALLED; the step's; CUDA's. An item's own error is no error here.
  virtual absl::Status WaitCopied(int32_t layer, const Step& step, absl::Duration* stalled) = 0;

  // Waits until the senders have been given every block of the layers sent. Errors as WaitCopied().
  virtual absl::Status Finish(const Step& step) = 0;

  // The senders have been given every block of the layers below.
  virtual int32_t handed_below() const = 0;

  // Nothing more of item i is copied or handed on.
  virtual void Drop(size_t i) = 0;
  // Why item i ended early: its sender's error; INTERNAL, NON_FINITE: a value that f16 cannot hold. Any
  // thread.
  virtual absl::Status item_status(size_t i) const = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_EGRESS_H_
