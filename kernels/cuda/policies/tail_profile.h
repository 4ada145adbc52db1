// Where the last queries of a prompt attend to, by column and by diagonal: what FlexPrefill
// (arXiv:2502.20766), SharePrefill (arXiv:2505.19578) and MInference's vertical-slash (arXiv:2407.02490)
// choose their patterns by.
#ifndef HW_KERNELS_CUDA_POLICIES_TAIL_PROFILE_H_
#define HW_KERNELS_CUDA_POLICIES_TAIL_PROFILE_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

inline constexpr int32_t kMostTailRows = 128;

// With A the causal softmax of softmax_scale * q k^T of query head h, over its last `rows` queries:
//
//   vertical[h, j] = factor * sum over those queries of A[., j]
//   slash[h, c]    = factor * the sum of the diagonal at distance num_tokens - 1 - c from query to key
//
// Device memory, contiguous; q and k 16-byte aligned, f32 arrays 4.
struct CudaTailProfileArgs {
  const void* q = nullptr;  // bf16 [num_tokens, num_q_heads, head_dim]
  const void* k = nullptr;  // bf16 [num_tokens, num_kv_heads, head_dim]
  int64_t num_tokens = 0;   // 1 to 2^31 - 1
  int32_t num_q_heads = 0;  // at most 65535
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64 or 128
  int32_t rows = 0;      // 1 to kMostTailRows, at most num_tokens
  float softmax_scale = 0;
  float factor = 0;           // positive; 1 / rows: means
  float* vertical = nullptr;  // [num_q_heads, num_tokens]
  float* slash = nullptr;     // [num_q_heads, num_tokens]
  // Sums of each over groups of 128 entries from entry 0 on, the last of which may be smaller; or null.
  float* vertical_sums = nullptr;  // [num_q_heads, ceil(num_tokens / 128)]
  float* slash_sums = nullptr;     // [num_q_heads, ceil(num_tokens / 128)]
};

// 256-byte aligned device memory that CudaTailProfile() needs, of valid sizes: under 6 bytes a token and
// head.
size_t CudaTailProfileWorkspaceBytes(const CudaTailProfileArgs& args);

// Every entry of the outputs is written. Products of bf16 summed in f32; probabilities under 2^-126 count as
// 0; relative error at most 2^-21 (1 + softmax_scale |q| |k|), for the largest rows. Equal calls give equal
// bits. A NaN in a row of Q or K spoils what that row takes part in: one in K all of its head.
//
// Enqueues on `stream`; arrays and workspace must live until it has passed. INVALID_ARGUMENT: null or
// misaligned arrays, a size out of range, a workspace too small. UNIMPLEMENTED: head_dim, GQA ratio, a device
// that is not sm_90. INTERNAL: a CUDA call failed. Cost: two passes of 2 * 128 * head_dim FLOP a token and
// query head on tensor cores (rows of 16 that `rows` does not reach are left out), which bound it; K is read
// twice, the outputs are written once.
Status CudaTailProfile(const CudaTailProfileArgs& args, void* workspace, size_t workspace_bytes,
                       cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_TAIL_PROFILE_H_
