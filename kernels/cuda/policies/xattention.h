// XAttention as a policy: cuda/xattention.h's masks, one list per query head.
#ifndef HW_KERNELS_CUDA_POLICIES_XATTENTION_H_
#define HW_KERNELS_CUDA_POLICIES_XATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/policy.h"
#include "kernels/cuda/xattention.h"
#include "kernels/reference/policies/xattention.h"
#include "kernels/status.h"

namespace headwater::kernels {

// Lists hold at most 64 Mi blocks; a tile that finds no room goes dense. Cost: CudaXAttentionMasks() and a
// read of the masks.
class XAttentionPolicy final : public CudaPolicy {
 public:
  XAttentionPolicy(const reference::XAttentionParameters& parameters, const CudaPolicyShape& shape)
      : parameters_(parameters), shape_(shape) {}

  size_t MemoryBytes(int64_t num_tokens) const override;
  // Also UNIMPLEMENTED: more tokens than CudaXAttentionMasks() knows.
  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) override;
  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override;

 private:
  struct Memory {
    CudaListsOfMasksArgs lists;
    void* workspace = nullptr;
    size_t workspace_bytes = 0, bytes = 0;
  };
  Memory Divide(int64_t num_tokens, void* memory) const;
  CudaXAttentionArgs ArgsFor(int64_t num_tokens) const;

  reference::XAttentionParameters parameters_;
  CudaPolicyShape shape_;
  int64_t num_tokens_ = 0;  // 0: no prompt
  Memory memory_;
};

// INVALID_ARGUMENT: a parameter or the shape is out of range. UNIMPLEMENTED: compat, a stride other than 4, 8
// and 16, head_dim, GQA ratio. chunk_tokens and keep_sink change nothing without compat.
Status MakeCudaXAttention(const reference::XAttentionParameters& parameters, const CudaPolicyShape& shape,
                          std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_XATTENTION_H_
