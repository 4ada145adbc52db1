// Launches of cuda/block_mass.h's kernels; arguments have been checked.
#ifndef HW_KERNELS_CUDA_SM90_BLOCK_MASS_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_BLOCK_MASS_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_mass.h"

namespace headwater::kernels::sm90 {

cudaError_t LaunchBlockMass(const CudaBlockMassArgs& args, cudaStream_t stream);
cudaError_t LaunchLogSumExp(const CudaLogSumExpArgs& args, cudaStream_t stream);
cudaError_t LaunchRowMass(const CudaRowMassArgs& args, cudaStream_t stream);
cudaError_t LaunchRecall(const CudaRecallArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_BLOCK_MASS_LAUNCH_H_
