// SparseSkeleton's selection on a Hopper GPU, of one layer of one prompt: reference/policies/skeleton.h has
// the rule and the names.
#ifndef HW_KERNELS_CUDA_SKELETON_H_
#define HW_KERNELS_CUDA_SKELETON_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_masks.h"
#include "kernels/reference/policies/skeleton.h"
#include "kernels/status.h"

namespace headwater::kernels {

struct CudaSkeletonArgs {
  const void* q = nullptr;  // bf16 [num_tokens, num_q_heads, head_dim], rotated; 16-byte aligned, as k
  const void* k = nullptr;  // bf16 [num_tokens, num_kv_heads, head_dim], rotated
  int64_t num_tokens = 0;   // over sink_tokens + local_tokens: shorter prompts go dense
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64 or 128
  float softmax_scale = 0;
  const reference::SkeletonParameters* parameters = nullptr;  // host memory
};

// Stages, within the workspace: what SkeletonHead has under these names. Rows without an interior (tokens
// before sinks + local) are not written.
struct CudaSkeletonStages {
  float *mu, *sigma, *lambda, *delta, *h;  // [num_q_heads, num_tokens]
  float *s, *v;                            // [num_q_heads, num_tokens]; s by distance
  double* coefficients;                    // [num_q_heads, 2 head_dim]: alpha, then kappa
  double* constants;                       // [num_q_heads, 3]: of which the last is zeta
  float* tau;                              // [num_q_heads]
  float *s_block, *v_block, *h_block;      // [num_q_heads, ceil(num_tokens / 64)]
};

// What the calls below refuse, but for arrays: INVALID_ARGUMENT or UNIMPLEMENTED, as said there.
Status CheckCudaSkeletonArgs(const CudaSkeletonArgs& args);

// Device memory that the two calls below share, 256-byte aligned. 0 where args are out of range, q and k
// aside. Some 30 bytes a token and query head, head_dim / 4 bytes a token and KV head, and up to 300 MB for
// the regression.
size_t CudaSkeletonWorkspaceBytes(const CudaSkeletonArgs& args);
CudaSkeletonStages CudaSkeletonStagesIn(const CudaSkeletonArgs& args, void* workspace);

// Tables of the frequencies, once per prompt and before its selections; q and k may be null.
Status CudaSkeletonTables(const CudaSkeletonArgs& args, void* workspace, size_t workspace_bytes,
                          cudaStream_t stream);

// Sets the bits of the blocks that each tile of 128 positions of each query head keeps; all words of `masks`
// (of CudaBlockMasksOf(), per query head) are written. f32, where the regression is f64: pairs of blocks
// whose sum is within 0.02 of tau may be decided otherwise than by the reference. Where rows are fewer than a
// few head_dim, rounding decides what s, v and h are by themselves; the sums of interior pairs are as the
// reference's. A row whose sinks or local keys are over 88 (natural units) above its mean keeps only what is
// forced. Equal calls give equal bits. NaN and infinities in q or k leave at least the forced blocks.
//
// Enqueues on `stream`; arrays and workspace must live until it has passed. INVALID_ARGUMENT: null or
// misaligned arrays, sizes or parameters out of range, no row with an interior, a workspace too small,
// masks that do not fit. UNIMPLEMENTED: head_dim or GQA ratio, a device that is not sm_90. INTERNAL: a CUDA
// call failed.
//
// Cost, with N tokens and H query heads: two reads of q, five of k; by tensor cores, N H head_dim (1.8
// head_dim + 1.1 (sinks + local)) + 2 N num_kv_heads head_dim^2 products of bf16 and 2.5 H samples
// head_dim^2 of f64. 131,072 tokens, head_dim 128: 5.3 ms of an H100 with 32 query and 8 KV heads, of which
// the sums over sinks and local keys take 1.3, mu and sigma 1.3, the design 0.8, its system 0.9 and the
// system's solution 0.24; 1.5 ms with 8 and 1.
Status CudaSkeletonSelect(const CudaSkeletonArgs& args, const CudaBlockMasks& masks, void* workspace,
                          size_t workspace_bytes, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_SKELETON_H_
