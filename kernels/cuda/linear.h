// Linear layers on a GPU over cuBLASLt: y = x W^T + bias (+ y), f32 sums. Operands are bf16, or, with scales,
// e4m3: y[i, j] = x_scale[i] * weight_scale[j] * sum_k x[i, k] W[j, k] + bias[j] (+ y[i, j]), at twice the
// rate. quantize.h makes such operands.
#ifndef HW_KERNELS_CUDA_LINEAR_H_
#define HW_KERNELS_CUDA_LINEAR_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include <cuda_runtime_api.h>

#include "kernels/dtype.h"
#include "kernels/status.h"

namespace headwater::kernels {

// Arrays in device memory, contiguous and 16-byte aligned (256 and more allow cuBLASLt its best kernels); y
// does not overlap the others.
struct CudaLinearArgs {
  const void* x = nullptr;       // bf16 or e4m3 [num_tokens, in_features]
  const void* weight = nullptr;  // as x [out_features, in_features], the caller's: not copied
  // [out_features] of y_dtype, with e4m3 operands of bf16 (what cuBLASLt's bias epilogue adds), or null.
  const void* bias = nullptr;
  void* y = nullptr;             // [num_tokens, out_features]
  DType y_dtype = DType::kBF16;  // or f32
  bool accumulate = false;       // y += instead of y = (the residual add); y is read and written in place
  int64_t num_tokens = 0;        // at most 2^31 - 1
  int64_t in_features = 0;       // multiples of 8, of 16 with e4m3 operands, at most 2^24
  int64_t out_features = 0;
  // Both or neither; with them x and weight are e4m3.
  const float* x_scale = nullptr;       // [num_tokens]
  const float* weight_scale = nullptr;  // [out_features]
};

struct CudaLinearOptions {
  // Device memory of `workspace_bytes`, 256-byte aligned, that outlives the object; null: its own.
  void* workspace = nullptr;
  size_t workspace_bytes = size_t{32} << 20;  // at most 1 GiB; more than 32 MiB does not help on Hopper
  // Chosen kernels that are kept, per (num_tokens, features, operands, y_dtype, bias, accumulate, alignment):
  // the least recently used of too many goes. 1 to 4096.
  int32_t max_plans = 64;
  // Of e4m3 products only: sums stay in the matrix units, which keep fewer bits than f32; off, they go to f32
  // registers in between. On is what makes e4m3 fast. README.md has what it costs in precision.
  bool fast_accumulation = true;
};

// Serves any number of layers on the device that was current at Create(). Calls on one object come one at a
// time, on one stream or on streams that are ordered (the workspace is shared): thread-compatible.
class CudaLinear {
 public:
  // INVALID_ARGUMENT: an option is out of range. UNIMPLEMENTED: the device is not sm_90, or there is no
  // cuBLASLt. RESOURCE_EXHAUSTED: no memory for the workspace. INTERNAL: cuBLASLt or CUDA failed.
  static Status Create(const CudaLinearOptions& options, std::unique_ptr<CudaLinear>* linear);
  // What Run() refuses before it looks at a device.
  static Status Check(const CudaLinearArgs& args);
  // Waits for the device if the workspace is its own.
  ~CudaLinear();

  CudaLinear(const CudaLinear&) = delete;
  CudaLinear& operator=(const CudaLinear&) = delete;

  // Enqueues on `stream` (of the object's device, which must be current); arrays must live until it has
  // passed. num_tokens = 0: OK, does nothing. The first call of a shape asks cuBLASLt for a kernel, about 0.1
  // ms. Equal calls give equal bits. A NaN or an infinity in a row of x stays in that row.
  //
  // INVALID_ARGUMENT: null or misaligned arrays, sizes out of range, another device is current.
  // UNIMPLEMENTED: a type, or cuBLASLt has no kernel (e4m3 with a bias: none for fewer than 16 tokens of over
  // 8,192 features). INTERNAL: cuBLASLt or CUDA failed. Cost: 2 * num_tokens
  // * in_features * out_features FLOP.
  Status Run(const CudaLinearArgs& args, cudaStream_t stream);

  size_t workspace_bytes() const;

 private:
  struct State;
  explicit CudaLinear(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_LINEAR_H_
