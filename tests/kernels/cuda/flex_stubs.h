// Stands in for block_masks.cc where that is not linked.
#ifndef HW_TESTS_KERNELS_CUDA_FLEX_STUBS_H_
#define HW_TESTS_KERNELS_CUDA_FLEX_STUBS_H_

#include "kernels/cuda/block_masks.h"

namespace headwater::kernels {

__attribute__((weak)) CudaBlockMasks CudaBlockMasksOf(int64_t num_tokens, int32_t num_q_heads, int32_t,
                                                      bool) {
  return {nullptr, num_tokens, num_q_heads, 128};
}
__attribute__((weak)) Status CudaListsOfMasks(const CudaListsOfMasksArgs&, cudaStream_t) { return {}; }
__attribute__((weak)) uint64_t CudaPossibleBlocks(const CudaBlockMasks&) { return 0; }

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_FLEX_STUBS_H_
