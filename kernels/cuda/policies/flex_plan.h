// The stages of FlexPrefill over one layer, put together, with their memory: FlexPrefill and SharePrefill are
// made of them.
#ifndef HW_KERNELS_CUDA_POLICIES_FLEX_PLAN_H_
#define HW_KERNELS_CUDA_POLICIES_FLEX_PLAN_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/policies/cover.h"
#include "kernels/cuda/policies/flex_stages.h"
#include "kernels/cuda/policies/memory.h"
#include "kernels/cuda/policies/tail_profile.h"
#include "kernels/cuda/policy.h"
#include "kernels/reference/policies/flex.h"
#include "kernels/status.h"

namespace headwater::kernels {

// INVALID_ARGUMENT: a parameter that the reference refuses, a shape out of range. UNIMPLEMENTED: block_tokens
// other than 128, head_dim, GQA ratio.
Status CheckFlexPlan(const reference::FlexParameters& parameters, const CudaPolicyShape& shape);

// What the stages read and write for a prompt; device memory. Masks have a list per query head.
struct FlexPlan {
  CudaTailProfileArgs profile;
  CudaCoverArgs cover;
  CudaFlexBudgetsArgs budgets;
  CudaFlexTopArgs top;  // scores: V and D, [2, num_q_heads, nb]
  CudaFlexPooledArgs pooled;
  CudaListsOfMasksArgs lists;
  float* k_mean = nullptr;
  void* scratch = nullptr;  // of one stage after the other
  size_t scratch_bytes = 0;
};

// `parameters` and `shape` have been checked; scratch has at least `least_scratch` bytes.
FlexPlan MakeFlexPlan(const reference::FlexParameters& parameters, const CudaPolicyShape& shape,
                      int64_t num_tokens, size_t least_scratch, PolicyMemory* memory);

// All enqueue on `stream`. First: V, D, JS distances, query-aware heads and budgets.
Status FlexScores(const FlexPlan& plan, const CudaPolicyLayer& layer, cudaStream_t stream);
// Then: the masks of columns and offsets, as many as the budgets say.
Status FlexColumnsAndOffsets(const FlexPlan& plan, cudaStream_t stream);
// Then: adds the blocks of the pooled map to the masks of query-aware heads.
Status FlexPooledBlocks(const FlexPlan& plan, const CudaPolicyLayer& layer, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_FLEX_PLAN_H_
