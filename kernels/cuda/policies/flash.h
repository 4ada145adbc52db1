// FlashPrefill V1 and V2 as policies: CudaFlashSelect() of cuda/flash.h over a layer's own means.
#ifndef HW_KERNELS_CUDA_POLICIES_FLASH_H_
#define HW_KERNELS_CUDA_POLICIES_FLASH_H_

#include <memory>

#include "kernels/cuda/policy.h"
#include "kernels/reference/policies/flash.h"
#include "kernels/reference/policies/flash2.h"
#include "kernels/status.h"

namespace headwater::kernels {

// V1: lists per query head, tiles of 128 positions, no correction. `compat` is UNIMPLEMENTED.
Status MakeCudaFlash(const reference::FlashParameters& parameters, const CudaPolicyShape& shape,
                     std::unique_ptr<CudaPolicy>* made);

// V2: lists per KV head, and a correction from means of K and V. It is that of CudaMeanCorrection, with one
// mean for a superblock of which nothing is listed; V2's own has a mean for each block. The first
// dense_layers layers, and prompts of at most dense_tokens, have no lists. `compat` is UNIMPLEMENTED.
Status MakeCudaFlash2(const reference::Flash2Parameters& parameters, const CudaPolicyShape& shape,
                      std::unique_ptr<CudaPolicy>* made);

// Both. Makers: INVALID_ARGUMENT for parameters or a shape out of range; UNIMPLEMENTED for head_dim and GQA
// ratio, as attention. Select(): INVALID_ARGUMENT before Begin(), a layer outside the shape's, null or
// misaligned arrays; UNIMPLEMENTED over kCudaFlashMostTokens tokens, which Begin() refuses already. Cost of a
// layer: a read of Q and K (V2: and V), and num_q_heads * num_tokens^2 / 256 products of head_dim. Memory:
// lists of 4 bytes a block that a tile may list, but at most 256 MiB (what finds no room goes dense), and
// num_lists * num_tokens / 128 tiles of masks.

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_FLASH_H_
