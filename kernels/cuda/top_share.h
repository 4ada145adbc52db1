// The largest scores of each row that together hold a given share, as bits of a mask, on a Hopper GPU.
#ifndef HW_KERNELS_CUDA_TOP_SHARE_H_
#define HW_KERNELS_CUDA_TOP_SHARE_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_masks.h"
#include "kernels/status.h"

namespace headwater::kernels {

enum class CudaTopShareRule {
  // XAttention's (reference/policies/xattention.h): blocks 0 and the row's own are kept; of the others the
  // largest, while the mass kept so far is under share * the row's total.
  kWithFirstAndOwn,
  // SharePrefill's pattern (reference/policies/share.h): the largest, until their sum is at least `share`
  // itself; at least one where it is over 0.
  kUntilSum,
};

// Device memory but for `shares`.
struct CudaTopShareArgs {
  // Row r of list l, of the mask's tile first_row + r: scores[l * list_stride + r * blocks], as many as the
  // masks have blocks. Those past the row's own block are not looked at.
  const float* scores = nullptr;
  int64_t list_stride = 0;
  // Tiles of 128 positions, at most 32768 blocks. Written: all words of tiles [first_row, first_row +
  // num_rows) of lists [first_list, first_list + num_lists).
  CudaBlockMasks masks;
  int32_t first_list = 0;
  int32_t num_lists = 0;
  int64_t first_row = 0;
  int64_t num_rows = 0;
  CudaTopShareRule rule = CudaTopShareRule::kWithFirstAndOwn;
  const double* shares = nullptr;  // host memory, read before the call returns: [num_shares], 0 to 1
  int32_t num_shares = 0;          // 1, or num_lists
  const uint8_t* flags = nullptr;  // [num_lists]; a zero leaves that list as it is. Null: all
};

// Of equal scores the lower block is taken first. Sums are exact in units of 2^-46 of the row's largest
// score; what is under 0 or NaN counts as 0, infinity as the largest finite number. Deterministic.
//
// Enqueues on `stream`. INVALID_ARGUMENT: null or misaligned arrays, sizes or shares out of range.
// UNIMPLEMENTED: more than 32768 blocks, a device that is not sm_90. Cost: a read of the rows, and 31 passes
// over each in shared memory.
Status CudaTopShareRows(const CudaTopShareArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_TOP_SHARE_H_
