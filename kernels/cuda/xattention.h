// XAttention's block selection (Xu et al., arXiv:2503.16428) on a Hopper GPU; reference and definitions:
// kernels/reference/policies/xattention.h.
#ifndef HW_KERNELS_CUDA_XATTENTION_H_
#define HW_KERNELS_CUDA_XATTENTION_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_masks.h"
#include "kernels/status.h"

namespace headwater::kernels {

// CudaTopShareRows() knows so many blocks.
inline constexpr int64_t kCudaXAttentionMostTokens = int64_t{32768} * 128;

// One sequence, whose keys are its queries'; device memory but for `thresholds`.
struct CudaXAttentionArgs {
  const void* q = nullptr;  // bf16 [num_tokens, num_q_heads, head_dim], 16-byte aligned, rotated
  const void* k = nullptr;  // bf16 [num_tokens, num_kv_heads, head_dim], likewise
  int64_t num_tokens = 0;   // 1 to kCudaXAttentionMostTokens
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64 or 128
  float softmax_scale = 0;
  int32_t stride = 16;                 // 4, 8 or 16
  double norm = 1;                     // over 0
  const double* thresholds = nullptr;  // host memory, read before the call returns: [num_thresholds], 0 to 1
  int32_t num_thresholds = 0;          // 1, or num_q_heads
  CudaBlockMasks masks;                // a list per query head, tiles of 128 positions; written
  float* scores = nullptr;             // [num_q_heads, blocks, blocks], written: E; or null
};

// At most 256 MiB (one row of blocks, where that is more) for strips of rows of some heads at a time. 0:
// invalid arguments; arrays are not looked at.
size_t CudaXAttentionWorkspaceBytes(const CudaXAttentionArgs& args);

// One pass of products: for each stride of queries it leaves log2 of the sum of exp over every key block's
// strides, num_tokens^2 / (128 * stride) floats a head; softmax over the row and E follow from these. E has a
// relative error of 1e-4 at most against double; blocks near a threshold may differ. Deterministic.
//
// Enqueues on `stream`; arrays and workspace (256-byte aligned) must live until it has passed.
// INVALID_ARGUMENT: null or misaligned arrays, parameters out of range, a workspace too small. UNIMPLEMENTED:
// stride, head_dim, GQA ratio, more tokens, a device that is not sm_90. What is not finite in Q or K spoils
// the rows of blocks that see it. Cost: num_tokens^2 * head_dim / stride FLOP a head.
Status CudaXAttentionMasks(const CudaXAttentionArgs& args, void* workspace, size_t workspace_bytes,
                           cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_XATTENTION_H_
