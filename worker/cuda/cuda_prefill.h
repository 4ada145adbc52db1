// The layer-major loop on one GPU. The whole prompt passes a layer before the next one starts; a layer's K
// and V leave the device while the next one is computed, so that the device holds those of two layers,
// whatever their number.
#ifndef HW_WORKER_CUDA_CUDA_PREFILL_H_
#define HW_WORKER_CUDA_CUDA_PREFILL_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "model/cuda/cuda_model.h"
#include "worker/cuda/cuda_egress.h"
#include "worker/job_control.h"
#include "worker/prefill.h"

namespace headwater {

// Device memory of one prompt besides the model's, in bytes, known before it starts.
struct CudaPrefillPlan {
  uint64_t tokens = 0;  // ids
  uint64_t hidden = 0;  // [tokens, hidden_size] f32
  uint64_t q = 0;       // [tokens, num_q_heads, head_dim] bf16; attention writes its output in its place
  uint64_t kv = 0;      // K and V of one layer, bf16
  int num_kv = 0;       // of those
  uint64_t logits = 0;
  uint64_t bad_rows = 0;
  uint64_t workspace = 0;

  // Each part rounded up to 256 bytes.
  uint64_t total_bytes() const;
};
CudaPrefillPlan PlanCudaPrefill(const ModelConfig& config, int64_t chunk_tokens, int64_t num_tokens);

struct CudaPrefillContext {
  CudaModel* model = nullptr;  // its device is used
  KvSender* sender = nullptr;
  JobControl* control = nullptr;
  const CudaEgressMemory* egress = nullptr;
  WorkerMetrics* metrics = nullptr;  // may be null
  absl::Duration stall_timeout = absl::Seconds(30);
  std::function<void(const PrefillProgress&)> progress;  // after every layer has been enqueued; may be empty
};

// Runs a job of one rank on the calling thread. When it returns OK, all blocks have been submitted. Equal
// jobs give bitwise equal KV. At most about 50 ms of work is enqueued beyond what has run, so that a
// cancelled job leaves the device soon.
//
// Errors as RunPrefill(); UNIMPLEMENTED: another policy than "dense", more than one rank; RESOURCE_EXHAUSTED:
// the plan does not fit the device's free memory, with both numbers.
absl::StatusOr<PrefillResult> RunCudaPrefill(const PrefillJob& job, const CudaPrefillContext& context);

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_PREFILL_H_
