// Where a prompt's last rows look: sums of their attention by column and by distance.
#ifndef HW_KERNELS_CUDA_POLICIES_LAST_ROWS_H_
#define HW_KERNELS_CUDA_POLICIES_LAST_ROWS_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

inline constexpr int32_t kMostLastRows = 128;

// Device memory; q and k bf16, 16-byte aligned, contiguous.
struct CudaLastRowsArgs {
  const void* q = nullptr;    // [num_tokens, num_q_heads, head_dim], rotated
  const void* k = nullptr;    // [num_tokens, num_kv_heads, head_dim], rotated
  float* vertical = nullptr;  // [num_q_heads, num_tokens] by key; written
  float* slash = nullptr;     // [num_q_heads, num_tokens] by query - key; written
  int64_t num_tokens = 0;     // 1 to 2^31 - 257
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float softmax_scale = 0;
  int32_t last_rows = 0;  // 1 to kMostLastRows; more than num_tokens counts as num_tokens
};

// Device memory that CudaLastRows() needs, 256-byte aligned: 8 or 12 bytes a head and token. Checked args.
size_t CudaLastRowsWorkspaceBytes(const CudaLastRowsArgs& args);

// Probabilities are those of the causal softmax over all keys, f32 throughout. A relative error of 1e-4 at
// most against double on inputs of unit variance; deterministic. What is not finite in Q or K may make any
// sum of its heads NaN.
//
// Enqueues on `stream`; arrays and workspace must live until it has passed. INVALID_ARGUMENT: null or
// misaligned arrays, sizes out of range, a workspace too small. UNIMPLEMENTED: head_dim, GQA ratio, a device
// that is not sm_90. INTERNAL: a CUDA call failed. Cost: two reads of K a query head, from L2 where heads of
// a group meet, and 4 * head_dim FLOP per last row (of 64 or 128) and key.
Status CudaLastRows(const CudaLastRowsArgs& args, void* workspace, size_t workspace_bytes,
                    cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_LAST_ROWS_H_
