// SharePrefill (arXiv:2505.19578) on the GPU; the rule is that of reference/policies/share.h.
#ifndef HW_KERNELS_CUDA_POLICIES_SHARE_H_
#define HW_KERNELS_CUDA_POLICIES_SHARE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/block_mass.h"
#include "kernels/cuda/policies/flex_plan.h"
#include "kernels/cuda/policy.h"
#include "kernels/cuda/sm90/share_launch.h"
#include "kernels/pattern/parameters.h"
#include "kernels/status.h"

namespace headwater::kernels {

// Which slot (sm90::SharePivots) each head may use. With pivots_per_layer: that many, and nothing else.
struct ShareSlots {
  int32_t count = 0;
  std::vector<std::vector<int32_t>> of_head;  // [num_layers][num_q_heads, or none]; -1: none
  // [num_layers]: slots whose pivot may lie in that layer, where a later one has heads that may want it.
  std::vector<std::vector<int32_t>> wanted;
};

// A list per query head. Who is pivot and who shares is decided on the device. Pivots by cluster: Finish()
// makes a new pivot's pattern from the layer's lse_ln, where a later layer has heads of its cluster. Pivots
// of each layer (pivots_per_layer): Select() finds their lse itself.
//
// Cost of a layer: FlexPrefill's (flex.h); for a pivot num_tokens^2 * head_dim FLOP for its average attention
// (twice that with pivots_per_layer) and one CTA's read of it; three launches for each slot that might have a
// new pivot. Memory: FlexPrefill's; an average map of 4 nb^2 bytes, 4 MiB at 131,072 tokens and 256 MiB at
// 1,048,576; for each slot a pattern of nb^2 / 8 bytes, V and D; with pivots_per_layer 4 bytes a token and
// query head.
class SharePolicy final : public CudaPolicy {
 public:
  static constexpr int64_t kMostTokens = int64_t{32768} * 128;  // CudaTopShareRows() knows so many blocks

  // Those of MakeCudaShare(), which checks them.
  SharePolicy(const ShareWithClusters& parameters, const CudaPolicyShape& shape);

  // 0: a number of tokens that Begin() refuses.
  size_t MemoryBytes(int64_t num_tokens) const override;
  // Also UNIMPLEMENTED: over kMostTokens. INTERNAL: a CUDA call failed.
  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) override;
  // Each layer of a prompt once, upwards, with Finish() before the next.
  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override;
  bool wants_lse() const override;
  Status Finish(const CudaPolicyLayer& layer, const float* lse_ln, cudaStream_t stream) override;

  // Device memory, of the last Select() and what followed; for tests.
  struct Stages {
    const sm90::ShareHead* heads;  // [num_q_heads]
    sm90::SharePivots pivots;
    CudaBlockMasks masks;
  };
  Stages stages() const { return {plan_.heads, plan_.pivots, plan_.flex.lists.masks}; }
  const ShareSlots& slots() const { return slots_; }

 private:
  struct Plan {
    FlexPlan flex;  // an average map [nb, nb] fits its scratch
    sm90::SharePivots pivots{};
    sm90::ShareHead* heads = nullptr;
    uint8_t* dense = nullptr;
    float* lse_ln = nullptr;  // with pivots_per_layer
    size_t bytes = 0;
  };

  Plan PlanOf(int64_t num_tokens, void* memory) const;
  sm90::ShareParams Params(int32_t layer) const;
  CudaMassProblem Problem(const CudaPolicyLayer& layer) const;
  Status MakePattern(const CudaPolicyLayer& layer, int32_t slot, const float* lse_ln,
                     cudaStream_t stream) const;
  Status MakePatternsOfLayer(const CudaPolicyLayer& layer, cudaStream_t stream) const;

  reference::ShareParameters parameters_;
  reference::FlexParameters flex_;
  CudaPolicyShape shape_;
  ShareSlots slots_;
  int64_t num_tokens_ = 0;  // 0: no prompt
  int32_t next_layer_ = 0;
  bool finish_due_ = false;  // of layer next_layer_ - 1
  Plan plan_;
};

// INVALID_ARGUMENT: a parameter that the reference refuses, a head in `clusters` that the shape does not have
// (not looked at with pivots_per_layer), a shape out of range. UNIMPLEMENTED: compat_ratio, block_tokens
// other than 128, over 512 query heads, head_dim, GQA ratio.
Status MakeCudaShare(const ShareWithClusters& parameters, const CudaPolicyShape& shape,
                     std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_SHARE_H_
