// Launches of the kernels that write e4m3 rows. Arguments are as in quantize.h and layer_ops.h, checked, with
// rows to work on.
#ifndef HW_KERNELS_CUDA_SM90_QUANTIZE_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_QUANTIZE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/quantize.h"

namespace headwater::kernels::sm90 {

cudaError_t LaunchQuantizeRows(const CudaQuantizeRowsArgs& args, cudaStream_t stream);
// args.scale is given.
cudaError_t LaunchQuantizedSiluMul(const CudaSiluMulArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_QUANTIZE_LAUNCH_H_
