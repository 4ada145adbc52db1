// The reference of e4m3 against the format's definition.
#include "kernels/reference/quantize.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/reference/layer_ops.h"

namespace headwater::kernels::reference {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> Normal(size_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

TEST(E4m3Test, KnownValues) {
  const struct {
    float value;
    int bits;
  } rows[] = {{0, 0x00},   {-0.0f, 0x80}, {1, 0x38},       {-1, 0xB8},      {1.5f, 0x3C},
              {448, 0x7E}, {-448, 0xFE},  {0x1p-6f, 0x08}, {0x1p-9f, 0x01}, {7 * 0x1p-9f, 0x07},
              {240, 0x77}, {256, 0x78},   {0.4375f, 0x2E}};
  for (const auto& row : rows) {
    EXPECT_EQ(F32ToE4m3(row.value), row.bits) << row.value;
    EXPECT_EQ(E4m3ToF32(static_cast<uint8_t>(row.bits)), row.value) << row.bits;
  }
}

TEST(E4m3Test, EveryCodeComesBack) {
  for (int bits = 0; bits < 256; ++bits) {
    const float value = E4m3ToF32(static_cast<uint8_t>(bits));
    if ((bits & 0x7F) == 0x7F) {
      EXPECT_TRUE(std::isnan(value)) << bits;
    } else {
      EXPECT_EQ(F32ToE4m3(value), bits) << value;
    }
  }
}

TEST(E4m3Test, RoundsToNearestAndTiesToEven) {
  for (int bits = 0; bits < 0x7E; ++bits) {
    const float low = E4m3ToF32(static_cast<uint8_t>(bits)), high = E4m3ToF32(static_cast<uint8_t>(bits + 1));
    const float middle = (low + high) / 2;
    EXPECT_EQ(F32ToE4m3(middle), bits + (bits & 1)) << middle;
    EXPECT_EQ(F32ToE4m3(std::nextafter(middle, low)), bits) << middle;
    EXPECT_EQ(F32ToE4m3(std::nextafter(middle, high)), bits + 1) << middle;
  }
}

TEST(E4m3Test, SaturatesAndKeepsNan) {
  for (const float value : {449.0f, 464.0f, 1e30f, kInfinity}) {
    EXPECT_EQ(F32ToE4m3(value), 0x7E) << value;
    EXPECT_EQ(F32ToE4m3(-value), 0xFE) << value;
  }
  EXPECT_EQ(F32ToE4m3(std::numeric_limits<float>::quiet_NaN()), 0x7F);
}

TEST(QuantizeRowsTest, TheLargestValueOfARowIs448) {
  const QuantizedRows rows = QuantizeRows(std::vector<float>{1, -4, 0.5f, 0, 0, 0}.data(), 2, 3);

  EXPECT_EQ(rows.values, (std::vector<uint8_t>{0x6E, 0xFE, 0x66, 0, 0, 0}));  // 112, -448, 56
  EXPECT_EQ(rows.scales, (std::vector<float>{4.0f / 448, 0x1p-64f / 448}));
}

TEST(QuantizeRowsTest, WhatIsNotFiniteSpoilsItsRowAlone) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity}) {
    const QuantizedRows rows = QuantizeRows(std::vector<float>{1, bad, 1, 2}.data(), 2, 2);

    EXPECT_TRUE(std::isnan(rows.scales[0])) << bad;
    EXPECT_EQ(rows.values, (std::vector<uint8_t>{0x7F, 0x7F, 0x76, 0x7E})) << bad;
  }
}

// 3 bits of mantissa: a rounding is 2.6 % of a normal value in the mean square, that of a product of two 3.7
// %, and sums of independent products keep it.
TEST(QuantizeRowsTest, AProductOfNormalRowsIsThreeToFourPerCentOff) {
  constexpr int kTokens = 16, kIn = 1024, kOut = 64;
  const std::vector<float> x = Normal(kTokens * kIn, 1), weight = Normal(kOut * kIn, 2);
  const std::vector<float> xq = QuantizeRows(x.data(), kTokens, kIn).Dequantized(),
                           wq = QuantizeRows(weight.data(), kOut, kIn).Dequantized();

  const std::vector<double> want = Linear(x.data(), weight.data(), nullptr, nullptr, kTokens, kIn, kOut),
                            got = Linear(xq.data(), wq.data(), nullptr, nullptr, kTokens, kIn, kOut);

  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  EXPECT_GT(std::sqrt(error / size), 0.03);
  EXPECT_LT(std::sqrt(error / size), 0.04);
}

}  // namespace
}  // namespace headwater::kernels::reference
