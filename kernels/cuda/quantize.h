// Rows in e4m3 with an f32 scale each: what a linear layer in fp8 multiplies (linear.h). Activations have a
// scale per token, weights one per output channel.
//
// With `most` the largest magnitude of a row, at least kLeastRowMaximum:
//   scale = most / 448        out[i] = e4m3(x[i] * (448 / most))
// both quotients rounded to f32, products to nearest even. A row of zeros has zeros and the smallest scale.
// A row with a NaN or an infinity has the scale NaN and NaN in all its elements: so is its product.
//
// CudaRmsNorm() and CudaSiluMul() quantize what they compute by the same rule.
#ifndef HW_KERNELS_CUDA_QUANTIZE_H_
#define HW_KERNELS_CUDA_QUANTIZE_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

inline constexpr float kMostE4m3 = 448;
// Keeps 448 / most finite. A row below it is as good as zeros, and loses precision.
inline constexpr float kLeastRowMaximum = 0x1p-64f;
// A row stays in the registers of one CTA.
inline constexpr int64_t kMaxQuantizedWidth = 32768;

struct CudaQuantizeRowsArgs {
  const void* x = nullptr;  // bf16 [num_rows, width]
  void* out = nullptr;      // e4m3 [num_rows, width]
  float* scale = nullptr;   // [num_rows]
  int64_t num_rows = 0;     // at most 2^31 - 1
  int64_t width = 0;        // a multiple of 8, at most kMaxQuantizedWidth
};

// Arrays are in device memory, contiguous and 16-byte aligned, and do not overlap. Enqueues on `stream` (the
// current device's) and returns; arrays must live until the stream has passed. num_rows = 0: OK, nothing is
// enqueued. Deterministic. Cost: one read of x, one write of the outputs, 3 bytes an element.
//
// INVALID_ARGUMENT: null or misaligned arrays, sizes out of range. UNIMPLEMENTED: a device that is not sm_90.
// INTERNAL: a CUDA call failed.
Status CudaQuantizeRows(const CudaQuantizeRowsArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_QUANTIZE_H_
