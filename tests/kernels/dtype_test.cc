#include "kernels/dtype.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/cpu/cpu_features.h"

namespace headwater::kernels {
namespace {

constexpr cpu::CpuPath kPaths[] = {cpu::CpuPath::kPortable, cpu::CpuPath::kAvx2, cpu::CpuPath::kAvx512};

float FloatOf(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t BitsOf(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

TEST(DType, EveryF16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = F16ToF32(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(F16ToF32(F32ToF16(value)))) << bits;
      continue;
    }
    EXPECT_EQ(F32ToF16(value), bits);
    const int exponent = static_cast<int>((bits >> 10) & 0x1f);
    const double mantissa = bits & 0x3ff;
    if (exponent == 31) continue;
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
    EXPECT_EQ(static_cast<double>(value), (bits & 0x8000) != 0 ? -magnitude : magnitude) << bits;
  }
}

TEST(DType, F32ToF16RoundsHalfToEven) {
  EXPECT_EQ(F32ToF16(65504.0f), 0x7bff);
  EXPECT_EQ(F32ToF16(65519.99f), 0x7bff);
  EXPECT_EQ(F32ToF16(65520.0f), 0x7c00);
  EXPECT_EQ(F32ToF16(-INFINITY), 0xfc00);
  EXPECT_EQ(F32ToF16(1.0f + 0x1p-11f), 0x3c00);
  EXPECT_EQ(F32ToF16(1.0f + 0x3p-11f), 0x3c02);
  EXPECT_EQ(F32ToF16(0x1p-25f), 0x0000);
  EXPECT_EQ(F32ToF16(0x1.8p-24f), 0x0002);
  EXPECT_EQ(F32ToF16(0x1.000002p-25f), 0x0001);
  EXPECT_EQ(F32ToF16(-0.0f), 0x8000);
}

// Values around every rounding boundary, specials, and random bits.
std::vector<float> Values() {
  std::vector<float> values = {
      0.0f,   -0.0f, INFINITY,  -INFINITY, NAN, FloatOf(0x7f800001), FloatOf(0xffffffff),
      1e-45f, 3e38f, 65519.99f, 65520.0f};
  std::mt19937 random(3);
  for (int i = 0; i < 20011; ++i) values.push_back(FloatOf(static_cast<uint32_t>(random())));
  for (uint32_t i = 0; i < 2000; ++i) values.push_back(FloatOf(0x3f800000u + i * 0x800u));
  return values;
}

TEST(DType, ConvertAgreesWithSingleElementsOnEveryPath) {
  const std::vector<float> values = Values();
  const size_t count = values.size();
  for (const auto path : kPaths) {
    if (!cpu::IsSupported(path)) continue;
    const cpu::ScopedCpuPath forced(path);
    std::vector<uint16_t> bf16(count);
    std::vector<uint16_t> f16(count);
    Convert(values.data(), DType::kF32, bf16.data(), DType::kBF16, count);
    Convert(values.data(), DType::kF32, f16.data(), DType::kF16, count);
    std::vector<float> from_bf16(count);
    std::vector<float> from_f16(count);
    Convert(bf16.data(), DType::kBF16, from_bf16.data(), DType::kF32, count);
    Convert(f16.data(), DType::kF16, from_f16.data(), DType::kF32, count);
    std::vector<uint16_t> f16_from_bf16(count);
    Convert(bf16.data(), DType::kBF16, f16_from_bf16.data(), DType::kF16, count);
    for (size_t i = 0; i < count; ++i) {
      ASSERT_EQ(bf16[i], F32ToBF16(values[i])) << std::hex << BitsOf(values[i]) << " on " << NameOf(path);
      ASSERT_EQ(f16[i], F32ToF16(values[i])) << std::hex << BitsOf(values[i]) << " on " << NameOf(path);
      ASSERT_EQ(BitsOf(from_bf16[i]), static_cast<uint32_t>(bf16[i]) << 16);
      ASSERT_EQ(BitsOf(from_f16[i]), BitsOf(F16ToF32(f16[i])));
      ASSERT_EQ(f16_from_bf16[i], F32ToF16(from_bf16[i]));
    }
  }
}

TEST(DType, ConvertWritesOnlyCountElements) {
  const std::vector<float> values(40, 1.0f);
  for (const auto path : kPaths) {
    if (!cpu::IsSupported(path)) continue;
    const cpu::ScopedCpuPath forced(path);
    for (size_t count = 0; count < 40; ++count) {
      for (const DType to : {DType::kF16, DType::kBF16}) {
        std::vector<uint16_t> out(41, 0x1234);
        Convert(values.data(), DType::kF32, out.data(), to, count);
        for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i] != 0x1234, i < count);
      }
    }
  }
}

TEST(DType, ConvertToTheSameTypeCopiesOrStays) {
  std::vector<float> values = {1, 2, 3};
  std::vector<float> copy(3);
  Convert(values.data(), DType::kF32, copy.data(), DType::kF32, 3);
  EXPECT_EQ(copy, values);
  Convert(values.data(), DType::kF32, values.data(), DType::kF32, 3);
  EXPECT_EQ(copy, values);
  Convert(nullptr, DType::kF32, nullptr, DType::kBF16, 0);
}

}  // namespace
}  // namespace headwater::kernels
