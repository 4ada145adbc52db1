// Rows in e4m3 with a scale each, as cuda/quantize.h makes them: the bits, from the format's definition.
#ifndef HW_KERNELS_REFERENCE_QUANTIZE_H_
#define HW_KERNELS_REFERENCE_QUANTIZE_H_

#include <cstdint>
#include <vector>

namespace headwater::kernels::reference {

// Rounds to nearest, ties to even; what is beyond 448, infinity included, becomes 448; NaN: 0x7F.
uint8_t F32ToE4m3(float value);
// Exact.
float E4m3ToF32(uint8_t bits);

struct QuantizedRows {
  std::vector<uint8_t> values;  // [rows, width]
  std::vector<float> scales;    // [rows]

  // values * scales, rounded to f32.
  std::vector<float> Dequantized() const;
};
QuantizedRows QuantizeRows(const float* x, int64_t num_rows, int64_t width);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_QUANTIZE_H_
