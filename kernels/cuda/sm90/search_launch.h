// Launches of the pattern search kernels.
#ifndef HW_KERNELS_CUDA_SM90_SEARCH_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_SEARCH_LAUNCH_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/cuda/sm90/search_params.h"

namespace headwater::kernels::sm90 {

cudaError_t LaunchWindowMeans(const WindowMeanParams& params, cudaStream_t stream);

// Maps of probes [num_heads, tiles * pack, head_dim] and means [num_heads, blocks, head_dim] with the
// dimensions 64 columns, rows, 64-column panels, heads; boxes of 128 rows and all panels.
cudaError_t LaunchSearch(const CUtensorMap& probes, const CUtensorMap& means, const SearchParams& params,
                         int head_dim, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_SEARCH_LAUNCH_H_
