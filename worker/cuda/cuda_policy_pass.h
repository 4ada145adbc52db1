// CudaPolicyPass: one prompt under a policy of kernels/cuda/policy.h, layer by layer, with what its quality
// asks for and the report of what was read.
#ifndef HW_WORKER_CUDA_CUDA_POLICY_PASS_H_
#define HW_WORKER_CUDA_CUDA_POLICY_PASS_H_

#include <cstdint>
#include <functional>
#include <memory>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kernels/cuda/policy.h"
#include "model/config.h"
#include "worker/cuda/cuda_layer_log.h"
#include "worker/cuda/cuda_plan.h"
#include "worker/cuda/cuda_policy_log.h"
#include "worker/prefill.h"

namespace headwater {

struct CudaPolicyPassOptions {
  const ModelConfig* config = nullptr;
  const PrefillJob* job = nullptr;
  kernels::CudaPolicy* policy = nullptr;
  CudaPolicyPlan plan;     // PlanCudaPolicy()'s
  char* memory = nullptr;  // of plan.total_bytes(), 256-byte aligned
  cudaStream_t stream = nullptr;
  bool measure_recall = false;                // of long prompts without a quality, too
  const ComputeSpeed* speed = nullptr;        // read where the job has a time budget
  std::function<absl::Status()> step;         // the loop's heartbeat
  absl::Time start = absl::InfiniteFuture();  // of the job's time budget
};

// FAILED_PRECONDITION, TIME_BUDGET_TOO_SHORT, with the time predicted: the job's time budget is under what
// its least attention would take. dense: the whole prompt is.
absl::Status CheckTimeBudget(const PrefillJob& job, const ModelConfig& config, const ComputeSpeed& speed,
                             bool dense);

// Calls enqueue on the options' stream, for layers in order; with a quality, Select() waits for the device.
class CudaPolicyPass {
 public:
  // What the options point to must outlive this, and so must the memory until the stream has passed.
  static absl::StatusOr<std::unique_ptr<CudaPolicyPass>> Begin(const CudaPolicyPassOptions& options);

  // Finds out what the layer reads. True: everything, and nothing is left of it to do here.
  absl::StatusOr<bool> Select(const kernels::CudaPolicyLayer& layer);
  // One call over the whole prompt, however long. out: q's own memory, or apart where the policy wants that.
  absl::Status Attend(const kernels::CudaPolicyLayer& layer, char** out);
  // Of the last layer that was taken, or a guess.
  double density() const { return density_; }

  // A layer that has run.
  CudaPolicyLog::Read Take(int32_t layer, PrefillProgress* progress);
  // Of the layers taken.
  v1::AttentionReport Report() const;

 private:
  explicit CudaPolicyPass(const CudaPolicyPassOptions& options);
  absl::Status Init();
  int32_t RowsToSample() const;
  absl::Status FindEnough(const kernels::CudaPolicyLayer& layer);
  absl::Status Sample(const kernels::CudaPolicyLayer& layer, int32_t rows);
  absl::Status Measure(const kernels::CudaPolicyLayer& layer);
  absl::StatusOr<bool> Keep(const kernels::CudaPolicyLayer& layer);
  absl::Status Wait(int32_t layer);
  ContractRules RulesFor(int32_t layer) const;
  std::vector<GroupSetting> SettingsOf(int32_t layer) const;

  const CudaPolicyPassOptions options_;
  const ModelConfig& config_;
  const PrefillJob& job_;
  const kernels::HeadwaterParameters* const own_;  // null: another policy
  const int64_t num_tokens_;
  const kernels::CudaPolicyShape shape_;
  char *policy_memory_ = nullptr, *workspace_ = nullptr, *out_ = nullptr;
  float *lse_ = nullptr, *mass_ = nullptr, *curve_ = nullptr;
  int64_t* rows_ = nullptr;
  CudaPolicyCounters counters_;
  kernels::CudaSelection selection_;
  CudaPolicyLog log_;
  CudaEvent arrived_;
  absl::Duration waited_;
  double density_;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_POLICY_PASS_H_
