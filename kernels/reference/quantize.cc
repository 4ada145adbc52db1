#include "kernels/reference/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace headwater::kernels::reference {
namespace {

constexpr float kMost = 448;
constexpr float kLeastMaximum = 0x1p-64f;
constexpr uint8_t kNan = 0x7F;
constexpr int kLeastExponent = -6, kMantissaBits = 3;

}  // namespace

uint8_t F32ToE4m3(float value) {
  if (std::isnan(value)) return kNan;
  const int sign = std::signbit(value) ? 0x80 : 0;
  const double size = std::min(std::fabs(static_cast<double>(value)), static_cast<double>(kMost));
  int exponent = kLeastExponent;
  if (size > 0) exponent = std::max(exponent, std::ilogb(size));
  // In steps of the last bit; nearbyint() rounds ties to even. 16 steps are 8 of the next exponent.
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, kMantissaBits - exponent)));
  return static_cast<uint8_t>(sign | (((exponent - kLeastExponent) << kMantissaBits) + steps));
}

float E4m3ToF32(uint8_t bits) {
  const int size = bits & 0x7F, field = size >> kMantissaBits, mantissa = size & 7;
  if (size == kNan) return std::numeric_limits<float>::quiet_NaN();
  const int exponent = kLeastExponent - kMantissaBits + std::max(field, 1) - 1;
  const float value = std::ldexp(static_cast<float>(mantissa + (field > 0 ? 8 : 0)), exponent);
  return (bits & 0x80) != 0 ? -value : value;
}

std::vector<float> QuantizedRows::Dequantized() const {
  const size_t width = scales.empty() ? 1 : values.size() / scales.size();
  std::vector<float> x(values.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = E4m3ToF32(values[i]) * scales[i / width];
  return x;
}

QuantizedRows QuantizeRows(const float* x, int64_t num_rows, int64_t width) {
  QuantizedRows out;
  for (int64_t row = 0; row < num_rows; ++row, x += width) {
    float most = kLeastMaximum;
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
      finite = finite && std::isfinite(x[i]);
      most = std::max(most, std::fabs(x[i]));
    }
    const float inverse = finite ? kMost / most : std::numeric_limits<float>::quiet_NaN();
    out.scales.push_back(finite ? most / kMost : inverse);
    for (int64_t i = 0; i < width; ++i) out.values.push_back(F32ToE4m3(x[i] * inverse));
  }
  return out;
}

}  // namespace headwater::kernels::reference
