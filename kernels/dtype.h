// Element types of tensors in host memory, and conversions of single elements.
#ifndef HW_KERNELS_DTYPE_H_
#define HW_KERNELS_DTYPE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace headwater::kernels {

enum class DType : uint8_t { kF32, kF16, kBF16 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr const char* NameOf(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kF16 ? "f16" : "bf16";
}

inline float BF16ToF32(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value = 0;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t F32ToBF16(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}

// Exact.
float F16ToF32(uint16_t bits);

// Rounds to nearest, ties to even; overflow becomes infinity; NaN stays NaN.
uint16_t F32ToF16(float value);

// Converts `count` elements between any two types; rounds to nearest even; f16 overflow becomes infinity.
// `from` and `to` must not overlap unless they are equal types at the same address. Vectorised; one thread.
void Convert(const void* from, DType from_dtype, void* to, DType to_dtype, size_t count);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_DTYPE_H_
