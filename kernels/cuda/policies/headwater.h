// Headwater's own policy: each KV head is searched with a threshold of its own, or not at all, and block
// means stand for the keys that its lists leave out.
#ifndef HW_KERNELS_CUDA_POLICIES_HEADWATER_H_
#define HW_KERNELS_CUDA_POLICIES_HEADWATER_H_

#include <cstdint>
#include <memory>

#include "kernels/cuda/policy.h"

namespace headwater::kernels {

// Room for so many blocks a tile on average; a tile that finds none goes dense and is counted.
inline constexpr int64_t kHeadwaterBlocksPerTile = 128;

// The search is CudaSelectBlocks() over the whole prompt, the correction CudaMeanCorrection.
// INVALID_ARGUMENT: a parameter out of range, thresholds that are not one for each layer and KV head.
Status MakeCudaHeadwater(const HeadwaterParameters& parameters, const CudaPolicyShape& shape,
                         std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_HEADWATER_H_
