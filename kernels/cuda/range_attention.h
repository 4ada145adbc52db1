// Attention over ranges of keys and single keys on a Hopper GPU, exact to the token: for patterns that are
// not made of blocks.
#ifndef HW_KERNELS_CUDA_RANGE_ATTENTION_H_
#define HW_KERNELS_CUDA_RANGE_ATTENTION_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

inline constexpr int64_t kRangeRows = 64;  // query rows that share lists; range lengths are multiples of it

inline int64_t CudaRangeTiles(int64_t num_tokens) { return (num_tokens + kRangeRows - 1) / kRangeRows; }

// Keys [begin, end), those after the row that reads them and past the prompt excepted.
struct CudaKeyRange {
  int32_t begin, end;
};

// What each tile of 64 query rows of a head reads, in device memory; list l, tile t has the number
// l * CudaRangeTiles(num_tokens) + t. Ranges and columns are trusted: kernels do not check them.
struct CudaKeyRanges {
  int32_t num_lists = 0;                   // query heads, or 1 that all of them share
  const int32_t* range_counts = nullptr;   // -1: every causal key, and no columns
  const int64_t* range_offsets = nullptr;  // first entry in `ranges`
  // Lengths are multiples of 64, begins need not be. Ascending, apart from each other; begins are not
  // negative, ends lie at most 63 past the tile's own keys.
  const CudaKeyRange* ranges = nullptr;
  // Single keys outside the tile's ranges, before its first row. All null: none.
  const int32_t* column_counts = nullptr;
  const int64_t* column_offsets = nullptr;
  const int32_t* columns = nullptr;
  // Of the keys in ranges, row p sees key j if j < sink_tokens or j > p - window_tokens. Both negative: all.
  int32_t sink_tokens = -1;
  int32_t window_tokens = -1;
};

// One prompt: bf16 arrays in device memory, 16-byte aligned, contiguous.
struct CudaRangeAttentionArgs {
  const void* q = nullptr;  // [num_tokens, num_q_heads, head_dim], rotated
  const void* k = nullptr;  // [num_tokens, num_kv_heads, head_dim], rotated
  const void* v = nullptr;  // as k
  void* out = nullptr;      // as q; may be q itself
  float* lse_ln = nullptr;  // [num_tokens, num_q_heads] natural log of the sum of exp(scaled score), or null
  int64_t num_tokens = 0;   // 1 to 2^31 - 257
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;  // num_q_heads / num_kv_heads is 1 to 8
  int32_t head_dim = 0;      // 64 or 128
  float softmax_scale = 0;
  CudaKeyRanges ranges;
};

// out = softmax(softmax_scale * q k^T over the keys that a row sees) v per query head; head h reads KV head
// h / (num_q_heads / num_kv_heads). Rows that see nothing get 0 and -infinity. Precision as CudaAttention();
// deterministic: equal calls give equal bits. A NaN or infinity in Q or K spoils the rows that see it; one in
// V may also spoil rows of tiles that read it.
//
// Enqueues on `stream`; arrays must live until it has passed. INVALID_ARGUMENT: null or misaligned arrays,
// sizes out of range. UNIMPLEMENTED: head_dim, GQA ratio, a device that is not sm_90. INTERNAL: a CUDA call
// failed. Cost: 4 * head_dim FLOP per row and key, 64 columns at a time, with mma.sync (half of what
// CudaAttention() reaches).
Status CudaRangeAttention(const CudaRangeAttentionArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_RANGE_ATTENTION_H_
