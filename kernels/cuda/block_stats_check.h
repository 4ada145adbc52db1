// Checks of block statistics, which two operations write.
#ifndef HW_KERNELS_CUDA_BLOCK_STATS_CHECK_H_
#define HW_KERNELS_CUDA_BLOCK_STATS_CHECK_H_

#include <cstdint>

#include "kernels/cuda/block_stats.h"
#include "kernels/status.h"

namespace headwater::kernels {

// Alignment, and bounds in pairs; says of which of K and V anything is wanted.
Status CheckBlockStats(const CudaBlockStats& stats, bool* wants_k, bool* wants_v);

// Heads and head_dim that the kernels know.
Status CheckStatsHeads(int32_t num_kv_heads, int32_t head_dim);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_BLOCK_STATS_CHECK_H_
