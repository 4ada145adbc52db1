// Launches of the layer operations' kernels. Arguments are as in layer_ops.h, checked, with tokens to work
// on.
#ifndef HW_KERNELS_CUDA_SM90_LAYER_OPS_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_LAYER_OPS_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/layer_ops.h"

namespace headwater::kernels::sm90 {

inline constexpr int kSplitQueryHeads = 4;  // of one CTA

cudaError_t LaunchEmbedTokens(const CudaEmbedTokensArgs& args, cudaStream_t stream);
cudaError_t LaunchRmsNorm(const CudaRmsNormArgs& args, cudaStream_t stream);
cudaError_t LaunchRopeTable(const CudaRopeTableArgs& args, cudaStream_t stream);
cudaError_t LaunchSplitQkv(const CudaSplitQkvArgs& args, int64_t ctas, cudaStream_t stream);
// args.scale is null.
cudaError_t LaunchSiluMul(const CudaSiluMulArgs& args, cudaStream_t stream);
// *args.row is -1 before.
cudaError_t LaunchFirstNonFiniteRow(const CudaFirstNonFiniteRowArgs& args, cudaStream_t stream);
cudaError_t LaunchStoreToHost(const uint32_t* from, uint32_t* to, int64_t count, cudaStream_t stream);
cudaError_t LaunchPackKv(const CudaPackKvArgs& args, int num_sms, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_LAYER_OPS_LAUNCH_H_
