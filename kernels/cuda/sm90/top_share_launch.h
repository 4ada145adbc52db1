// Launch of the selection of rows' largest scores.
#ifndef HW_KERNELS_CUDA_SM90_TOP_SHARE_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_TOP_SHARE_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

namespace headwater::kernels::sm90 {

inline constexpr int32_t kMostShareBlocks = 32768;  // 128 KiB of shared memory; sums of them fit 64 bits
inline constexpr int32_t kShareLists = 64;          // of one launch

// As CudaTopShareArgs of cuda/top_share.h.
struct TopShareParams {
  const float* scores;
  int64_t list_stride;
  uint32_t* words;  // of the launch's first list
  const uint8_t* flags;
  int32_t blocks;
  int32_t first_row;
  bool with_first_and_own;
  double shares[kShareLists];
};

cudaError_t LaunchTopShare(const TopShareParams& params, int32_t rows, int32_t lists, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_TOP_SHARE_LAUNCH_H_
