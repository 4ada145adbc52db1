// Launch of attention over ranges of keys and single keys.
#ifndef HW_KERNELS_CUDA_SM90_RANGE_ATTENTION_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_RANGE_ATTENTION_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/range_attention.h"

namespace headwater::kernels::sm90 {

// Checked arguments.
cudaError_t LaunchRangeAttention(const CudaRangeAttentionArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_RANGE_ATTENTION_LAUNCH_H_
