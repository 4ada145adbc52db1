// Launches of vertical-slash's choice and of the merge into ranges.
#ifndef HW_KERNELS_CUDA_SM90_VERTICAL_SLASH_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_VERTICAL_SLASH_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/policies/vertical_slash_stages.h"

namespace headwater::kernels::sm90 {

inline constexpr int kChooseHeads = 128;  // of one launch

struct ChooseParams {
  CudaChooseArgs args;
  int first_head, heads;
  int32_t forced[2];                // columns, distances
  int32_t counts[2][kChooseHeads];  // of heads from first_head on; at most num_tokens
};

cudaError_t LaunchChoose(const ChooseParams& params, cudaStream_t stream);
cudaError_t LaunchMergeVerticalSlash(const CudaMergeVerticalSlashArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_VERTICAL_SLASH_LAUNCH_H_
