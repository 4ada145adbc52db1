// Loops over one row, compiled once per instruction set. Internal to kernels/.
#ifndef HW_KERNELS_CPU_ROW_KERNELS_H_
#define HW_KERNELS_CPU_ROW_KERNELS_H_

#include <cstdint>

namespace headwater::kernels::cpu {

struct RowKernels {
  void (*f32_from_bf16)(const uint16_t* from, float* to, int64_t count);
  void (*bf16_from_f32)(const float* from, uint16_t* to, int64_t count);
  void (*f32_from_f16)(const uint16_t* from, float* to, int64_t count);
  void (*f16_from_f32)(const float* from, uint16_t* to, int64_t count);
  float (*sum_of_squares)(const float* x, int64_t count);
  // out = x * scale * weight
  void (*scale_by_weight)(const float* x, float scale, const float* weight, float* out, int64_t count);
  // Rotates the pairs (x[i], x[i + half]).
  void (*rotate)(const float* x, const float* cos, const float* sin, float* out, int64_t half);
  // out = gate / (1 + exp(-gate)) * up
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t count);
  bool (*all_finite)(const float* x, int64_t count);
};

// Those of ActivePath().
const RowKernels& ActiveRowKernels();

// One per instruction set, each defined in its own file.
extern const RowKernels kPortableRowKernels;
#if defined(__x86_64__)
extern const RowKernels kAvx2RowKernels;
extern const RowKernels kAvx512RowKernels;
#endif

}  // namespace headwater::kernels::cpu

#endif  // HW_KERNELS_CPU_ROW_KERNELS_H_
