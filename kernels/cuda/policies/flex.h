// FlexPrefill (arXiv:2502.20766) on the GPU; the rule is that of reference/policies/flex.h.
#ifndef HW_KERNELS_CUDA_POLICIES_FLEX_H_
#define HW_KERNELS_CUDA_POLICIES_FLEX_H_

#include <memory>

#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/policies/flex_plan.h"
#include "kernels/cuda/policy.h"
#include "kernels/reference/policies/flex.h"
#include "kernels/status.h"

namespace headwater::kernels {

// A list per query head; every layer on its own. Prompts of at most max(256, min_budget_tokens rounded up to
// blocks) tokens are dense. Lists have room for every causal block of every head up to 2^26 entries.
//
// Cost of a layer: 4 * 128 * head_dim FLOP a token and query head on tensor cores for the tail profile, reads
// of it, one read of K for its means; in query-aware heads a read of Q and the pooled map. Memory: about 16
// bytes a token and query head, masks of nb^2 / 8 bytes a head, 256 MiB of pooled maps or one, and lists.
class FlexPolicy final : public CudaPolicy {
 public:
  // Those of MakeCudaFlex(), which checks them.
  FlexPolicy(const reference::FlexParameters& parameters, const CudaPolicyShape& shape)
      : parameters_(parameters), shape_(shape) {}

  size_t MemoryBytes(int64_t num_tokens) const override;
  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) override;
  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override;

  // Of the last Select() of a prompt that is not dense; for tests.
  const CudaBlockMasks& masks() const { return plan_.lists.masks; }

 private:
  bool Dense(int64_t num_tokens) const;

  reference::FlexParameters parameters_;
  CudaPolicyShape shape_;
  int64_t num_tokens_ = 0;  // 0: no prompt
  FlexPlan plan_;           // of a prompt that is not dense
};

// Errors of CheckFlexPlan().
Status MakeCudaFlex(const reference::FlexParameters& parameters, const CudaPolicyShape& shape,
                    std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_FLEX_H_
