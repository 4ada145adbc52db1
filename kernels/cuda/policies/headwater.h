// Headwater's own policy: each KV head is searched with a threshold of its own, or not at all, and block
// means stand for the keys that its lists leave out.
#ifndef HW_KERNELS_CUDA_POLICIES_HEADWATER_H_
#define HW_KERNELS_CUDA_POLICIES_HEADWATER_H_

#include <memory>

#include "kernels/cuda/policy.h"

namespace headwater::kernels {

// The search is CudaSelectBlocks() over the whole prompt, the correction CudaMeanCorrection. Lists have room
// for 128 blocks a tile on average; a tile that finds none goes dense and is counted. INVALID_ARGUMENT: a
// parameter out of range, thresholds that are not one for each layer and KV head.
Status MakeCudaHeadwater(const HeadwaterParameters& parameters, const CudaPolicyShape& shape,
                         std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_HEADWATER_H_
