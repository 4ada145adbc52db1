// Whether a prompt's time budget has room for what it costs. Pure.
#ifndef HW_WORKER_CUDA_CUDA_TIME_BUDGET_H_
#define HW_WORKER_CUDA_CUDA_TIME_BUDGET_H_

#include "absl/status/status.h"

#include "model/config.h"
#include "worker/prefill.h"
#include "worker/quality.h"

namespace headwater {

// FAILED_PRECONDITION, TIME_BUDGET_TOO_SHORT, with the time predicted: the job's time budget is under what
// its least attention would take over job.world_size() devices of that speed. dense: the whole prompt is.
absl::Status CheckTimeBudget(const PrefillJob& job, const ModelConfig& config, const ComputeSpeed& speed,
                             bool dense);

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_TIME_BUDGET_H_
