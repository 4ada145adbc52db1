// How much of the attention lies on which key blocks, on a Hopper GPU: maps of whole heads, masses of sampled
// queries, and what share of them block lists hold. Blocks are 128 tokens, nb of them a prompt. One sequence,
// whose keys are its queries'; arrays are device memory. Reference: kernels/reference/block_mass.h.
#ifndef HW_KERNELS_CUDA_BLOCK_MASS_H_
#define HW_KERNELS_CUDA_BLOCK_MASS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/attention.h"
#include "kernels/status.h"

namespace headwater::kernels {

// bf16, 16-byte aligned, contiguous, rotated.
struct CudaMassProblem {
  const void* q = nullptr;  // [num_tokens, num_q_heads, head_dim]
  const void* k = nullptr;  // [num_tokens, num_kv_heads, head_dim]
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;  // num_q_heads / num_kv_heads is 1 to 8
  int32_t head_dim = 0;      // 64 or 128
  float softmax_scale = 0;
  // Position of q's first query, of CudaRowMass() alone; a row before it is no query.
  int64_t first_query = 0;
};

struct CudaBlockMassArgs {
  CudaMassProblem problem;
  const float* lse_ln = nullptr;  // [num_tokens, num_q_heads], of CudaAttention() without lists
  // [num_heads]: query heads, in the order of the maps; a number that is none's leaves its map as it is.
  // Null: 0 to num_heads - 1.
  const int32_t* heads = nullptr;
  int32_t num_heads = 0;           // 0 to 65535
  const uint8_t* flags = nullptr;  // [num_q_heads]; a zero leaves that query head's map as it is. Null: all
  float* average = nullptr;        // [num_heads, nb, nb]; written, zeros above the diagonal
};

// average[., I, J]: mean over the queries of block I of the sum over the keys of block J that they see of
// exp(softmax_scale * q . k - lse_ln). Relative error 1e-4 against double. Deterministic.
//
// Enqueues on `stream`; arrays must live until it has passed. INVALID_ARGUMENT: null or misaligned arrays
// (lse_ln, heads and average 4 bytes, flags none), sizes out of range. UNIMPLEMENTED: head_dim, GQA ratio, a
// device that is not sm_90. What is not finite in Q, K or lse_ln spoils the entries that it enters. Cost:
// num_tokens^2 * head_dim FLOP a head.
Status CudaBlockMass(const CudaBlockMassArgs& args, cudaStream_t stream);

struct CudaLogSumExpArgs {
  CudaMassProblem problem;
  const int32_t* heads =
      nullptr;            // [num_heads]: query heads; a number that is none's is passed over. Null: as above
  int32_t num_heads = 0;  // 0 to 65535
  float* lse_ln = nullptr;  // [num_tokens, num_q_heads]; written for `heads`
};

// lse_ln as CudaAttention() without lists gives it, for heads whose attention is not wanted (yet). Enqueues,
// errors and what is not finite as CudaBlockMass(). Absolute error 1e-5 (1 + the largest |softmax_scale * q .
// k|). Deterministic. Cost: num_tokens^2 * head_dim FLOP a head.
Status CudaLogSumExp(const CudaLogSumExpArgs& args, cudaStream_t stream);

// Queries by their positions; one of both arrays. A position outside the prompt is no query: all zeros.
struct CudaSampledRows {
  const int64_t* positions = nullptr;      // [num_rows], in any order
  const int32_t* positions_i32 = nullptr;  // the same
  int32_t num_rows = 0;                    // 0 to 65536
};
// INVALID_ARGUMENT: not one of both arrays, or misaligned.
Status CheckSampledRows(const CudaSampledRows& rows);

struct CudaRowMassArgs {
  CudaMassProblem problem;
  CudaSampledRows rows;
  float* mass = nullptr;  // [num_rows, num_q_heads, nb]; written, zeros past a row's own block
};

// mass[r, h, J]: sum over the keys of block J of softmax(softmax_scale * q . k) of the row's query; sums
// to 1. Errors and determinism as CudaBlockMass(). Cost: 2 * num_tokens * head_dim FLOP a row and query head
// (each product is made once), two writes and two reads of `mass`.
Status CudaRowMass(const CudaRowMassArgs& args, cudaStream_t stream);

struct CudaRecallArgs {
  const float* mass = nullptr;  // [num_rows, num_q_heads, nb], of CudaRowMass()
  CudaSampledRows rows;
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  // As CudaAttention() takes them for the prompt, without correction; pack = num_q_heads / num_lists is 1 to
  // 8. num_lists 0: dense.
  CudaBlockLists lists;
  float* recall = nullptr;      // [num_rows, num_q_heads]; written
  CudaQueryRange queries = {};  // whose tiles the lists are of; rows outside are no queries
};

// recall[r, h]: the mass on the blocks that the list of r's tile and h's list holds; 1 where the tile is
// dense, 0 where the row is no query. Entries past the row's own block count for nothing. Deterministic.
// Enqueues on `stream`; errors as above. Cost: a read of the lists of the rows' tiles.
Status CudaRecallOfRows(const CudaRecallArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_BLOCK_MASS_H_
