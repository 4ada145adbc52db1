// Launches of the profile of a prompt's last rows.
#ifndef HW_KERNELS_CUDA_SM90_LAST_ROWS_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_LAST_ROWS_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/policies/last_rows.h"

namespace headwater::kernels::sm90 {

inline constexpr int kLastRowsKeys = 64;

struct LastRowsParams {
  CudaLastRowsArgs args;  // checked, last_rows at most num_tokens
  int tile_rows;          // 64 or 128, which holds last_rows
  int64_t blocks;         // of 64 keys
  int64_t split_blocks;   // that one CTA goes through
  int splits;
  float2* stats;  // [num_q_heads, splits, tile_rows]: shift and sum of each row's part
  float* parts;   // [num_q_heads, blocks, tile_rows + 64]: sums of a block's diagonals
};

cudaError_t LaunchLastRows(const LastRowsParams& params, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_LAST_ROWS_LAUNCH_H_
