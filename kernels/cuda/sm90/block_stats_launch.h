// Launches of the block statistics kernels.
#ifndef HW_KERNELS_CUDA_SM90_BLOCK_STATS_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_BLOCK_STATS_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_stats.h"

namespace headwater::kernels::sm90 {

// Blocks of one head each: those of K first. k_heads or v_heads is 0 where nothing of it is wanted.
struct BlockStatsParams {
  CudaBlockStatsArgs args;
  int32_t k_heads;
  int32_t v_heads;
};

// CTAs = new blocks * (k_heads + v_heads), 1 to 2^31 - 1.
cudaError_t LaunchBlockStats(const BlockStatsParams& params, int64_t ctas, cudaStream_t stream);

cudaError_t LaunchMeanTables(const CudaMeanTablesArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_BLOCK_STATS_LAUNCH_H_
