// The prompts of a pass on their way.
#ifndef HW_WORKER_CUDA_CUDA_SEQUENCES_H_
#define HW_WORKER_CUDA_CUDA_SEQUENCES_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

#include "kernels/cuda/policy.h"
#include "worker/cuda/cuda_egress.h"
#include "worker/cuda/cuda_prefill.h"

namespace headwater {

struct CudaSequence {
  const CudaPrefillPrompt* prompt = nullptr;
  int64_t first_row = 0;  // in the pass
  int64_t num_tokens = 0;
  absl::Status status;  // not OK: it has ended
  PrefillResult result;
};

// Whether the job is dense in every layer, by its policy or for its length.
bool IsDense(const PrefillJob& job);

// The job's search; null: it is dense, or another policy's.
const kernels::ProbeParameters* ProbeOf(const PrefillJob& job);

// The policy that a prompt goes under as a whole; null: it is dense, or probe's, which the loop searches some
// queries at a time. Errors as kernels::MakeCudaPolicy().
absl::StatusOr<std::unique_ptr<kernels::CudaPolicy>> MakePolicyFor(
    const ModelConfig& config, const kernels::PolicyParameters& parameters, int64_t num_tokens);

// Whether GPUs share prompts under the policy, whatever their length: those that select single keys are one
// GPU's, and so are others whose lists have tiles that a rank's blocks of 128 tokens may cut.
bool MayShare(const ModelConfig& config, const kernels::PolicyParameters& parameters);

// UNIMPLEMENTED: GPUs do not share a prompt of that length under the policy, or not in that way.
absl::Status CheckShared(const ModelConfig& config, const kernels::PatternPolicy& policy, int64_t num_tokens,
                         int world_size, v1::Strategy strategy);

// A rank's part of a prompt.
struct CudaRankSize {
  int64_t num_tokens = 0;  // of the prompt
  int64_t local_tokens = 0;
  int64_t max_rank_tokens = 0;
  int world_size = 1;
  int checkpoint_layers = 0;
};
// Device memory of its pass, at most. Errors as kernels::MakeCudaPolicy().
absl::StatusOr<CudaPrefillPlan> PlanCudaRank(const ModelConfig& config, int64_t chunk_tokens,
                                             const kernels::PolicyParameters& parameters,
                                             const CudaRankSize& size);

// What RunCudaPrefill() refuses before it looks at the device. world_size: of the group that the pass is in.
absl::Status CheckPass(absl::Span<const CudaPrefillPrompt> prompts, const ModelConfig& config,
                       int world_size);

// One behind the other; *num_tokens: of all.
std::vector<CudaSequence> MakeSequences(absl::Span<const CudaPrefillPrompt> prompts, int64_t* num_tokens);

// What the device is told of them.
struct CudaPassInputs {
  std::vector<int32_t> ids;
  std::vector<int32_t> positions;   // of each token in its prompt
  std::vector<int32_t> cu_seqlens;  // first rows, and the number of rows
};
CudaPassInputs MakePassInputs(const std::vector<CudaSequence>& sequences);

// The heartbeat of all prompts: ends those that are cancelled, late, or failed in egress (null: none has
// begun), and drops their blocks. The error of one that has ended once all have.
absl::Status StepSequences(CudaEgress* egress, std::vector<CudaSequence>* sequences);

// Ends a prompt, unless it has ended, and drops its blocks. INTERNAL, NON_FINITE with the layer: for token
// `token` of the pass after that layer, or, with num_layers for the layer, for the logits.
void EndNonFinite(CudaEgress* egress, int32_t layer, int64_t token, std::vector<CudaSequence>* sequences);

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_SEQUENCES_H_
