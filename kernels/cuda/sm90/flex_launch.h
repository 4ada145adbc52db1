// Launches of FlexPrefill's stages.
#ifndef HW_KERNELS_CUDA_SM90_FLEX_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_FLEX_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/policies/flex_stages.h"
#include "kernels/cuda/sm90/cover_launch.h"

namespace headwater::kernels::sm90 {

cudaError_t LaunchFlexBudgets(const CudaFlexBudgetsArgs& args, cudaStream_t stream);
cudaError_t LaunchFlexTop(const CudaFlexTopArgs& args, cudaStream_t stream);
cudaError_t LaunchFlexMasks(const uint32_t* bits, const CudaBlockMasks& masks, cudaStream_t stream);

// Query-aware heads take slots in ascending order; `slots` of them are worked on at a time. A slot's map
// holds row I's I + 1 columns at I (I + 1) / 2.
struct FlexPooledParams {
  CudaFlexPooledArgs args;
  int64_t blocks;  // nb
  int64_t map;     // entries: nb (nb + 1) / 2
  int32_t slots;
  int32_t* heads;      // [num_q_heads], of slots
  int32_t* num_heads;  // how many are query aware
  float* q_mean;       // [slots, blocks, head_dim]
  float* maps;         // [slots, map]
  uint64_t* ties;      // [slots, blocks]
  CoverParams share;   // over maps; first_active is set for each launch
};

cudaError_t LaunchFlexPooled(const FlexPooledParams& params, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_FLEX_LAUNCH_H_
