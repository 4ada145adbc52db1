// Launch of the kernels that make block lists of bit masks.
#ifndef HW_KERNELS_CUDA_SM90_BLOCK_MASKS_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_BLOCK_MASKS_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_masks.h"

namespace headwater::kernels::sm90 {

// num_lists * tiles is 1 to 2^31 - 1.
cudaError_t LaunchListsOfMasks(const CudaListsOfMasksArgs& args, cudaStream_t stream);

cudaError_t LaunchCountLists(const CudaCountListsArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_BLOCK_MASKS_LAUNCH_H_
