// Launch that makes A-shape's ranges.
#ifndef HW_KERNELS_CUDA_SM90_A_SHAPE_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_A_SHAPE_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/range_attention.h"

namespace headwater::kernels::sm90 {

// One list that all heads share: at most two ranges a tile.
struct AShapeParams {
  int64_t tiles;
  int32_t sink_tokens, window_tokens, num_q_heads;
  int32_t* counts;       // [tiles]
  int64_t* offsets;      // [tiles]
  CudaKeyRange* ranges;  // [2 * tiles]
  uint64_t* visited;     // zero; steps of 64 keys of all heads are added
};

cudaError_t LaunchAShape(const AShapeParams& params, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_A_SHAPE_LAUNCH_H_
