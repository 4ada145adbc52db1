// Launch of the merge of partial attention results.
#ifndef HW_KERNELS_CUDA_SM90_MERGE_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_MERGE_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

namespace headwater::kernels::sm90 {

// As CudaMergeArgs of cuda/merge.h.
struct MergeParams {
  const float* a;
  const float* a_lse_ln;
  const float* b;
  const float* b_lse_ln;
  float* out_f32;
  void* out;
  float* lse_ln;
  int64_t num_rows;
};

cudaError_t LaunchMerge(const MergeParams& params, int head_dim, int num_sms, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_MERGE_LAUNCH_H_
