// CUDA errors as kernels::Status.
#ifndef HW_KERNELS_CUDA_CUDA_STATUS_H_
#define HW_KERNELS_CUDA_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

// OK, RESOURCE_EXHAUSTED (no memory) or INTERNAL; the message names `call`. Clears the error.
Status CudaStatus(cudaError_t error, const char* call);

// UNIMPLEMENTED: the current device is not compute capability 9.0. Cached per device.
Status RequireSm90(int* num_sms);

}  // namespace headwater::kernels

#define HW_KERNELS_RETURN_IF_CUDA_ERROR(call) \
  HW_KERNELS_RETURN_IF_ERROR(::headwater::kernels::CudaStatus((call), #call))

#endif  // HW_KERNELS_CUDA_CUDA_STATUS_H_
