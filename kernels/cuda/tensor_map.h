// Tensor maps (TMA descriptors) of bf16 arrays, 128-byte swizzle.
#ifndef HW_KERNELS_CUDA_TENSOR_MAP_H_
#define HW_KERNELS_CUDA_TENSOR_MAP_H_

#include <cstdint>
#include <initializer_list>

#include <cuda.h>

#include "kernels/status.h"

namespace headwater::kernels {

// One dimension: its size, the distance of its elements in bytes (2 for the innermost), and the box's size.
struct TensorMapDimension {
  int64_t size;
  int64_t stride_bytes;
  int32_t box;
};

// Innermost dimension first; it is 64 elements (128 bytes) wide in the box. Out-of-range elements read as 0
// and are not written. UNIMPLEMENTED: the driver knows no tensor maps. INTERNAL: the driver refused (a size,
// stride or address that is not a multiple of 16 bytes).
Status MakeTensorMap(const void* base, std::initializer_list<TensorMapDimension> dimensions,
                     CUtensorMap* map);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_TENSOR_MAP_H_
