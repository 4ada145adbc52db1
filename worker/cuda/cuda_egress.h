// CudaEgress: K and V of finished layers on their way from device memory, through a bounded ring of pinned
// buffers, to the KV sender. When the decode node is slow the ring fills, K and V stay on the device, and
// compute waits.
#ifndef HW_WORKER_CUDA_CUDA_EGRESS_H_
#define HW_WORKER_CUDA_CUDA_EGRESS_H_

#include <cstdint>
#include <memory>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/sender.h"
#include "model/cuda/device_buffer.h"
#include "worker/job_control.h"
#include "worker/prefill.h"

namespace headwater {

// Pinned memory of the ring, kept from job to job. Must outlive the senders that were given blocks of it.
struct CudaEgressMemory {
  static constexpr int kSlots = 16;
  static constexpr uint64_t kSlotBytes = 16 << 20;

  // RESOURCE_EXHAUSTED: no pinned memory.
  static absl::StatusOr<CudaEgressMemory> Allocate();
  char* slot(int i) const { return slots.data() + static_cast<uint64_t>(i) * kSlotBytes; }

  DeviceBuffer slots;
  DeviceBuffer runs;  // kernels::CudaTokenRun of each slot, then one word of problems
};

class CudaEgress {
 public:
  // `job` must be the only rank's; everything must outlive this. UNIMPLEMENTED: a block of the cache is
  // larger than a slot.
  static absl::StatusOr<std::unique_ptr<CudaEgress>> Start(const PrefillJob& job, KvSender* sender,
                                                           JobControl* control,
                                                           const CudaEgressMemory* memory,
                                                           absl::Duration stall_timeout);
  // Ends at once; waits for copies under way.
  virtual ~CudaEgress() = default;

  // K and V of the layer, bf16 [tokens, num_kv_heads, head_dim] on the device, are whole once `ready`
  // (recorded already) has happened. They must not change before WaitCopied(layer). Layers come in order.
  // Returns at once.
  virtual void Send(int32_t layer, const void* k, const void* v, cudaEvent_t ready) = 0;

  // Waits until the layer's K and V have left the device; the time waited is added to *stalled. Errors:
  // UNAVAILABLE, KV_STREAM_STALLED; the sender's; INTERNAL, NON_FINITE: a value that f16 cannot hold; the
  // job's.
  virtual absl::Status WaitCopied(int32_t layer, absl::Duration* stalled) = 0;

  // Waits until the sender has been given every block of the layers sent. Errors as WaitCopied().
  virtual absl::Status Finish() = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_EGRESS_H_
