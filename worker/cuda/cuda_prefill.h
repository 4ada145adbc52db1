// The layer-major loop on a GPU. The whole pass (a prompt, or several short ones packed) goes through a
// layer before the next one starts; a layer's K and V leave the device while the next one is computed, so
// that the device holds those of two layers, whatever their number.
#ifndef HW_WORKER_CUDA_CUDA_PREFILL_H_
#define HW_WORKER_CUDA_CUDA_PREFILL_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

#include "model/cuda/cuda_model.h"
#include "worker/collectives.h"
#include "worker/cuda/cuda_checkpoints.h"
#include "worker/cuda/cuda_egress.h"
#include "worker/cuda/cuda_plan.h"
#include "worker/cuda/device_group.h"
#include "worker/job_control.h"
#include "worker/prefill.h"

namespace headwater {

// What passes run with. Everything must outlive the call.
struct CudaPrefillContext {
  CudaModel* model = nullptr;  // its device is used
  CudaEgressMemory* egress = nullptr;
  WorkerMetrics* metrics = nullptr;  // may be null
  bool measure_recall = false;       // of long prompts without a quality, too
  ComputeSpeed* speed = nullptr;     // what passes measure and time budgets go by; may be null
  // Of the ranks that share the prompt, both or neither; the same ranks in both. Aborted where the pass
  // fails.
  Collectives* collectives = nullptr;
  DeviceGroup* devices = nullptr;
  // As PrefillContext's.
  CheckpointStore* checkpoints = nullptr;
  int checkpoint_layers = 0;
  int64_t least_checkpoint_tokens = kLeastCheckpointTokens;
  // As PrefillContext's, where some rank receives this much of a layer: of less, latency is too much.
  bool measure_link = false;
  uint64_t least_probe_bytes = uint64_t{64} << 20;
};

// One prompt of a pass.
struct CudaPrefillPrompt {
  const PrefillJob* job = nullptr;
  KvSender* sender = nullptr;
  JobControl* control = nullptr;
  std::function<void(const PrefillProgress&)> progress;  // after every layer has been enqueued; may be empty
  std::function<void(const absl::Status&)> ended = nullptr;  // as PrefillContext's
};

// Whether RunCudaPrefill() takes the job together with others: one rank, policy dense, or one that is dense
// at this length, no quality, and KV blocks that pass an egress buffer.
bool MayPackCuda(const PrefillJob& job);

// Runs a pass on the calling thread: one prompt, or several that MayPackCuda(). Where a result is OK, all of
// its blocks have been submitted. Equal passes give bitwise equal KV. At most about 50 ms of work is enqueued
// beyond what has run, so that a cancelled pass leaves the device soon; a prompt that is cancelled, whose
// sender fails or whose values are not finite, among others ends alone, and the pass with the last of them.
//
// Policies other than dense and probe attend to the whole prompt in one call, which may take seconds for a
// million tokens: a cancelled pass waits for it.
//
// Ranks of a group compute what one rank does: each has the K and V of all (cuda_group.h). Policies that look
// at single queries (probe, headwater) are asked for the rank's own; others, but for those that select single
// keys, get the Q of all ranks and select for the whole prompt, each rank the same. They
// take checkpoints, and go on from them, as RunPrefill() does.
//
// Errors as RunPrefill(); UNIMPLEMENTED: a policy that MakeCudaPolicy() does not make; in a group, one that
// selects single keys, or KV blocks that are no multiple of 128 tokens; KV blocks larger than an egress
// buffer; RESOURCE_EXHAUSTED: the plan does not fit the device's free memory, with both numbers;
// INVALID_ARGUMENT: prompts that cannot share a pass; FAILED_PRECONDITION, TIME_BUDGET_TOO_SHORT.
std::vector<absl::StatusOr<PrefillResult>> RunCudaPrefill(absl::Span<const CudaPrefillPrompt> prompts,
                                                          const CudaPrefillContext& context);

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_PREFILL_H_
