// Linear layers on the CPU: weights packed once, then y = x W^T + bias (+ y).
#ifndef HW_KERNELS_OPS_LINEAR_H_
#define HW_KERNELS_OPS_LINEAR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/status.h"

namespace headwater::kernels {

// Rows of a weight matrix, [rows, in_features] row-major.
struct WeightRows {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
};

struct LinearSpec {
  int64_t in_features = 0;
  // Stacked from top to bottom: one GEMM does Q, K and V, or gate and up.
  std::vector<WeightRows> weight;
  // [out_features] f32, or null.
  const float* bias = nullptr;
  // f32: exact f32 multiplication; bf16: x and W in bf16, f32 accumulation. f16 is refused.
  DType compute = DType::kF32;
};

// Immutable after Create(); Run() is thread-safe and uses the calling thread's OpenMP team.
class Linear {
 public:
  // Copies and packs the weights; `spec`'s memory may go afterwards. RESOURCE_EXHAUSTED: no memory.
  static Status Create(const LinearSpec& spec, std::unique_ptr<Linear>* linear);
  virtual ~Linear() = default;

  // x: [num_tokens, in_features] in the compute type, y: [num_tokens, out_features], f32, or bf16 where
  // compute is bf16 and `accumulate` is false. accumulate: y += instead of y = (the residual add). Rows are
  // contiguous.
  virtual Status Run(const void* x, int64_t num_tokens, void* y, DType y_dtype, bool accumulate) const = 0;

  virtual int64_t in_features() const = 0;
  virtual int64_t out_features() const = 0;
  virtual uint64_t packed_bytes() const = 0;
};

// Best type for linear layers and attention on this CPU: bf16 with AVX512-BF16 or AMX, else f32.
DType PreferredComputeType();

// Sets the size of the OpenMP team that the calling thread's kernel calls use; at least 1.
void SetNumThreads(int num_threads);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_OPS_LINEAR_H_
