#include "kernels/cuda/tensor_map.h"

#include <cuda_runtime_api.h>

namespace headwater::kernels {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there: linking libcuda would keep programs from starting without a GPU.
EncodeTiled FindEncodeTiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                       &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace

Status MakeTensorMap(const void* base, std::initializer_list<TensorMapDimension> dimensions,
                     CUtensorMap* map) {
  static const EncodeTiled encode = FindEncodeTiled();
  if (encode == nullptr) return {StatusCode::kUnimplemented, "the CUDA driver has no cuTensorMapEncodeTiled"};
  cuuint64_t sizes[5], strides[5];
  cuuint32_t boxes[5], steps[5];
  cuuint32_t rank = 0;
  for (const TensorMapDimension& dimension : dimensions) {
    sizes[rank] = static_cast<cuuint64_t>(dimension.size);
    if (rank > 0) strides[rank - 1] = static_cast<cuuint64_t>(dimension.stride_bytes);
    boxes[rank] = static_cast<cuuint32_t>(dimension.box);
    steps[rank] = 1;
    ++rank;
  }
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(base), sizes, strides, boxes,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {StatusCode::kInternal, "cuTensorMapEncodeTiled: error " + std::to_string(result)};
}

}  // namespace headwater::kernels
