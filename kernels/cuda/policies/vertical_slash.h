// Vertical-slash on the GPU: the pattern of reference/policies/vertical_slash.h, exact to the token.
#ifndef HW_KERNELS_CUDA_POLICIES_VERTICAL_SLASH_H_
#define HW_KERNELS_CUDA_POLICIES_VERTICAL_SLASH_H_

#include <memory>

#include "kernels/cuda/policies/tail_profile.h"
#include "kernels/cuda/policies/vertical_slash_stages.h"
#include "kernels/cuda/policy.h"

namespace headwater::kernels {

// Sets CudaSelection::ranges, a list per query head. `visited` and `possible` count pairs of 64 query rows
// and 64 keys (columns too are read 64 at a time); a tile without room for its lists goes dense and counts as
// an overflow. There is room for 512 ranges and 4,096 columns a tile on average, or for as many as the
// budgets can ask for where that is less. So columns always fit up to n_vertical 4,096, and ranges up to
// 65,536 tokens; beyond, unless distances leave over 512 gaps of more than 64 keys in a tile.
//
// Memory: under 15 bytes a head and token, and the lists' room: at most 8 bytes a range and 4 a column. In
// all 0.6 GB for 32 heads of 131,072 tokens at the default budgets, 1.0 GB at 3,500 columns and 100
// distances. Select() enqueues seven kernels: two passes over K a query head, four reads of the sums, two
// walks per tile.
class VerticalSlashPolicy final : public CudaPolicy {
 public:
  VerticalSlashPolicy(const reference::VerticalSlashParameters& parameters, const CudaPolicyShape& shape)
      : parameters_(parameters), shape_(shape) {}

  size_t MemoryBytes(int64_t num_tokens) const override;
  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) override;
  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override;

 private:
  struct Plan;  // of a prompt: the stages' arguments
  size_t MakePlan(int64_t num_tokens, void* memory, Plan* plan) const;

  const reference::VerticalSlashParameters parameters_;
  const CudaPolicyShape shape_;
  int64_t num_tokens_ = 0;
  void* memory_ = nullptr;
  CudaKeyRanges ranges_;
};

// INVALID_ARGUMENT: a parameter or the shape is out of range. UNIMPLEMENTED: last_q over kMostTailRows,
// head_dim, GQA ratio.
Status MakeCudaVerticalSlash(const reference::VerticalSlashParameters& parameters,
                             const CudaPolicyShape& shape, std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_VERTICAL_SLASH_H_
