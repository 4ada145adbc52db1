// Merging of partial attention results on a Hopper GPU.
#ifndef HW_KERNELS_CUDA_MERGE_H_
#define HW_KERNELS_CUDA_MERGE_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

// Two partial results of the same queries over disjoint keys, as CudaAttention() writes them. Device memory;
// `a`, `b` and the f32 output 16-byte aligned, lse_ln 4.
struct CudaMergeArgs {
  const float* a = nullptr;         // [num_rows, head_dim]; a row is a query of one head
  const float* a_lse_ln = nullptr;  // [num_rows]
  const float* b = nullptr;
  const float* b_lse_ln = nullptr;
  // Outputs, each may be null or the array of `a` or `b` of the same type and shape; not both null.
  float* out_f32 = nullptr;  // [num_rows, head_dim]
  void* out = nullptr;       // the same in bf16, 16-byte aligned
  float* lse_ln = nullptr;   // [num_rows], or null
  int64_t num_rows = 0;
  int32_t head_dim = 0;  // 64 or 128
};

// With w_x = exp(lse_x - max(lse_a, lse_b)): out = (w_a a + w_b b) / (w_a + w_b), lse = max + ln(w_a + w_b).
// A row that saw no key (lse -infinity) counts for nothing, whatever it holds; two of them give 0 and
// -infinity. NaN stays in its row. Exact but for f32 rounding, and deterministic: merging in a fixed order
// gives equal bits.
//
// Enqueues on `stream`; arrays must live until it has passed. No rows: OK. INVALID_ARGUMENT: null or
// misaligned arrays, a negative size. UNIMPLEMENTED: head_dim, a device that is not sm_90. INTERNAL: a CUDA
// call failed. Cost: a read of both results, a write of one.
Status CudaMergePartials(const CudaMergeArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_MERGE_H_
