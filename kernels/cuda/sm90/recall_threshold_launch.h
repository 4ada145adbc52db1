// Launch of cuda/recall_threshold.h's kernels; arguments have been checked.
#ifndef HW_KERNELS_CUDA_SM90_RECALL_THRESHOLD_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_RECALL_THRESHOLD_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/recall_threshold.h"

namespace headwater::kernels::sm90 {

cudaError_t LaunchRecallCurves(const CudaRecallThresholdArgs& args, cudaStream_t stream);
cudaError_t LaunchThresholdsOfCurves(const CudaRecallGoal& goal, int32_t num_kv_heads, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_RECALL_THRESHOLD_LAUNCH_H_
