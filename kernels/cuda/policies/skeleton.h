// SparseSkeleton as a policy: CudaSkeletonSelect() of cuda/skeleton.h, per query head.
#ifndef HW_KERNELS_CUDA_POLICIES_SKELETON_H_
#define HW_KERNELS_CUDA_POLICIES_SKELETON_H_

#include <memory>

#include "kernels/cuda/policy.h"
#include "kernels/reference/policies/skeleton.h"
#include "kernels/status.h"

namespace headwater::kernels {

// Lists per query head, tiles of 128 positions. Prompts of at most sink_tokens + local_tokens have no lists.
// INVALID_ARGUMENT: parameters or shape out of range. UNIMPLEMENTED: head_dim and GQA ratio, as attention.
// Select() refuses what CudaSkeletonSelect() does, Select() before Begin(), and a layer outside the shape's.
// Memory: that function's workspace, masks, and lists of 4 bytes a block, but at most 256 MiB (a tile that
// finds no room goes dense).
Status MakeCudaSkeleton(const reference::SkeletonParameters& parameters, const CudaPolicyShape& shape,
                        std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_SKELETON_H_
