// CudaBackend: prefill on one GPU, which may share prompts with those of other workers.
#ifndef HW_WORKER_CUDA_CUDA_BACKEND_H_
#define HW_WORKER_CUDA_CUDA_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"

#include "worker/backend.h"
#include "worker/options.h"

namespace headwater {

class CudaBackend {
 public:
  // Loads the model that the options name onto the GPU of --device=cuda:N, within --memory_budget or 90 % of
  // the memory that is free there. Errors as CudaModel::Load(); INVALID_ARGUMENT: no such GPU; UNIMPLEMENTED:
  // --compute=f32. A fault that leaves the GPU of no use to this process ends it with status 70, soon after
  // the pass's INTERNAL results.
  static absl::StatusOr<std::unique_ptr<PrefillBackend>> Load(const WorkerOptions& options);
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_BACKEND_H_
