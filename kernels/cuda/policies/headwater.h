// Headwater's own policy: each KV head is searched with a threshold of its own, or not at all, and block
// means stand for the keys that its lists leave out.
#ifndef HW_KERNELS_CUDA_POLICIES_HEADWATER_H_
#define HW_KERNELS_CUDA_POLICIES_HEADWATER_H_

#include <cstdint>
#include <memory>

#include "kernels/cuda/policy.h"

namespace headwater::kernels {

// Room of a tile's list, in blocks, on average over tiles and heads: for all that it may see while that takes
// 256 MiB at most, else for 128 beside its window. A tile that finds none goes dense and is counted.
int64_t HeadwaterBlocksPerTile(const HeadwaterParameters& parameters, const CudaPolicyShape& shape,
                               int64_t num_tokens);

// The search is CudaSelectBlocks() over the whole prompt, the correction CudaMeanCorrection.
// INVALID_ARGUMENT: a parameter out of range, thresholds that are not one for each layer and KV head.
Status MakeCudaHeadwater(const HeadwaterParameters& parameters, const CudaPolicyShape& shape,
                         std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_HEADWATER_H_
