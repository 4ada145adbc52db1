// Launches of XAttention's scores.
#ifndef HW_KERNELS_CUDA_SM90_XATTENTION_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_XATTENTION_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

namespace headwater::kernels::sm90 {

// Query blocks [first_row, first_row + rows) of heads [first_head, first_head + heads).
struct XAttentionParams {
  const void* q;
  const void* k;
  int64_t num_tokens;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  float scale_log2;  // softmax_scale * log2(e) / (stride * norm)
  int32_t first_head;
  int32_t heads;
  int32_t first_row;
  int32_t rows;
  int32_t blocks;
  float* partial;  // [heads, rows * (128 / stride), blocks]: log2 of sums of exp
  // Row r of head h at scores[h * scores_head + r * blocks].
  float* scores;
  int64_t scores_head;
};

cudaError_t LaunchXAttention(const XAttentionParams& params, int32_t stride, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_XATTENTION_LAUNCH_H_
