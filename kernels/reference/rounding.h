// Values as a GPU stores them.
#ifndef HW_KERNELS_REFERENCE_ROUNDING_H_
#define HW_KERNELS_REFERENCE_ROUNDING_H_

#include <cstdint>

#include "kernels/dtype.h"

namespace headwater::kernels::reference {

// To f32, and then to bf16, each to nearest even.
inline float RoundToBf16(double value) {
  const float single = static_cast<float>(value);
  uint16_t bits = 0;
  float rounded = 0;
  Convert(&single, DType::kF32, &bits, DType::kBF16, 1);
  Convert(&bits, DType::kBF16, &rounded, DType::kF32, 1);
  return rounded;
}

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_ROUNDING_H_
