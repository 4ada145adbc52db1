#include "kernels/cuda/quantize.h"

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/quantize_launch.h"

namespace headwater::kernels {

Status CudaQuantizeRows(const CudaQuantizeRowsArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_rows", a.num_rows, 0, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("width", a.width, 1, kMaxQuantizedWidth));
  if (a.width % 8 != 0) {
    return InvalidArgument("width is " + std::to_string(a.width) + "; a multiple of 8 is wanted");
  }
  if (a.num_rows == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("x", a.x));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("out", a.out));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("scale", a.scale));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchQuantizeRows(a, stream));
  return {};
}

}  // namespace headwater::kernels
