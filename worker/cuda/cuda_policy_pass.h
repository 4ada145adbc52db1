// CudaPolicyPass: one prompt, or a rank's part of it, under a policy of kernels/cuda/policy.h, layer by
// layer, with what its quality asks for and the report of what was read.
#ifndef HW_WORKER_CUDA_CUDA_POLICY_PASS_H_
#define HW_WORKER_CUDA_CUDA_POLICY_PASS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kernels/cuda/policy.h"
#include "model/config.h"
#include "worker/cuda/cuda_layer_log.h"
#include "worker/cuda/cuda_plan.h"
#include "worker/cuda/cuda_policy_group.h"
#include "worker/cuda/cuda_policy_log.h"
#include "worker/prefill.h"

namespace headwater {

struct CudaPolicyPassOptions {
  const ModelConfig* config = nullptr;
  const PrefillJob* job = nullptr;
  kernels::CudaPolicy* policy = nullptr;
  const CudaPolicyGroup* group = nullptr;  // of several ranks: `policy` takes ranges and is headwater
  // Of a rank whose policy does not take ranges: the group is of one, layers' Q is the whole prompt's, and
  // Attend() is for these queries, whose output goes to `part_out`, [queries, num_q_heads, head_dim].
  std::vector<kernels::CudaQueryRange> parts;
  char* part_out = nullptr;
  // Brings f32 [num_tokens, num_q_heads] of the other ranks' queries to its places; where `parts` are.
  std::function<absl::Status(float* lse_ln)> gather_lse;
  CudaPolicyPlan plan;     // PlanCudaPolicy()'s
  char* memory = nullptr;  // of plan.total_bytes(), 256-byte aligned
  cudaStream_t stream = nullptr;
  bool measure_recall = false;                // of long prompts without a quality, too
  const ComputeSpeed* speed = nullptr;        // read where the job has a time budget
  std::function<absl::Status()> step;         // the loop's heartbeat
  absl::Time start = absl::InfiniteFuture();  // of the job's time budget
};

// Calls enqueue on the options' stream, for layers in order; with a quality, Select() waits for the device.
// Ranks of a group take the same steps and come to the same thresholds: they share what they count.
class CudaPolicyPass {
 public:
  // What the options point to must outlive this, and so must the memory until the stream has passed.
  static absl::StatusOr<std::unique_ptr<CudaPolicyPass>> Begin(const CudaPolicyPassOptions& options);

  // layer.q: this rank's queries, one range after the other.

  // Finds out what the layer reads. True: everything, and nothing is left of it to do here.
  absl::StatusOr<bool> Select(const kernels::CudaPolicyLayer& layer);
  // One call a range, however long. out: q's own memory, or apart where the policy wants that.
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
  const std::vector<kernels::CudaQueryRange>& ranges() const { return options_.group->ranges(); }
  // Of this rank's ranges.
  kernels::CudaPolicyLayer Part(const kernels::CudaPolicyLayer& layer, size_t range) const;
  // Of the layer's sampled queries, those of a range.
  CudaPolicyGroup::Run RunOf(int32_t layer, size_t range) const;
  absl::Span<const int64_t> Positions(int32_t layer) const;
  // settings: in place of the policy's own, or null.
  absl::Status SelectRanges(const kernels::CudaPolicyLayer& layer,
                            const kernels::CudaSearchSettings* settings);
  absl::Status AttendParts(const kernels::CudaPolicyLayer& layer);
  absl::Status FindEnough(const kernels::CudaPolicyLayer& layer);
  absl::Status Sample(const kernels::CudaPolicyLayer& layer, int32_t rows);
  absl::Status Measure(const kernels::CudaPolicyLayer& layer);
  absl::Status CountLists(int32_t layer);
  absl::StatusOr<bool> Keep(const kernels::CudaPolicyLayer& layer);
  absl::Status Wait(int32_t layer);
  absl::StatusOr<ContractRules> RulesFor(int32_t layer) const;
  std::vector<GroupSetting> SettingsOf(int32_t layer) const;

  const CudaPolicyPassOptions options_;
  const ModelConfig& config_;
  const PrefillJob& job_;
  const kernels::HeadwaterParameters* const own_;  // null: another policy
  const int64_t num_tokens_;
  const kernels::CudaPolicyShape shape_;
  const int64_t mass_row_;  // floats of a sampled query's
  char *policy_memory_ = nullptr, *workspace_ = nullptr, *out_ = nullptr, *part_ = nullptr;
  float *lse_ = nullptr, *mass_ = nullptr, *curve_ = nullptr;
  int64_t* rows_ = nullptr;
  CudaPolicyCounters counters_;
  std::vector<kernels::CudaSelection> selections_;  // by range
  int32_t num_lists_ = 0;                           // of the layer's selections
  std::pair<int32_t, uint64_t> possible_{0, 0};     // of tiles of so many positions
  CudaPolicyLog log_;
  CudaEvent arrived_;
  absl::Duration waited_;
  double density_;
  double kept_density_;  // of the last layer whose quality was kept: of no moment's chance, as density_ is
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_POLICY_PASS_H_
