#include "kernels/dtype.h"

#include <algorithm>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/row_kernels.h"

namespace headwater::kernels {
namespace cpu {

const RowKernels& ActiveRowKernels() {
#if defined(__x86_64__)
  const CpuPath path = ActivePath();
  if (path >= CpuPath::kAvx512) return kAvx512RowKernels;
  if (path >= CpuPath::kAvx2) return kAvx2RowKernels;
#endif
  return kPortableRowKernels;
}

}  // namespace cpu

float F16ToF32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  uint32_t wide = sign | (mantissa << 13);
  if (exponent == 0x1f) {
    wide |= 0x7f800000u | (mantissa != 0 ? 0x00400000u : 0u);
  } else {
    wide |= (exponent + 112) << 23;
  }
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t F32ToF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x1ffu));
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (bits < 0x38800000u) {
    // Subnormal: the addition rounds at the place of the last f16 bit.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

void Convert(const void* from, DType from_dtype, void* to, DType to_dtype, size_t count) {
  if (count == 0) return;
  if (from_dtype == to_dtype) {
    if (from != to) std::memcpy(to, from, count * SizeOf(from_dtype));
    return;
  }
  const cpu::RowKernels& kernels = cpu::ActiveRowKernels();
  const auto widen = from_dtype == DType::kBF16 ? kernels.f32_from_bf16 : kernels.f32_from_f16;
  const auto narrow = to_dtype == DType::kBF16 ? kernels.bf16_from_f32 : kernels.f16_from_f32;
  if (to_dtype == DType::kF32) {
    widen(static_cast<const uint16_t*>(from), static_cast<float*>(to), static_cast<int64_t>(count));
  } else if (from_dtype == DType::kF32) {
    narrow(static_cast<const float*>(from), static_cast<uint16_t*>(to), static_cast<int64_t>(count));
  } else {
    constexpr size_t kPiece = 256;
    float wide[kPiece];
    for (size_t done = 0; done < count; done += kPiece) {
      const auto piece = static_cast<int64_t>(std::min(kPiece, count - done));
      widen(static_cast<const uint16_t*>(from) + done, wide, piece);
      narrow(wide, static_cast<uint16_t*>(to) + done, piece);
    }
  }
}

}  // namespace headwater::kernels
