// Rows in e4m3 on the GPU: bits of the reference where the input is exact, half a step where it is computed.
#include "kernels/cuda/quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/layer_ops.h"
#include "kernels/reference/layer_ops.h"
#include "kernels/reference/quantize.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void ExpectOk(const Status& status) {
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

// [rows, width] in e4m3 on the device.
struct Rows {
  Rows(int64_t num_rows, int64_t row_width)
      : width(row_width),
        values(static_cast<size_t>(num_rows * row_width)),
        scale(static_cast<size_t>(num_rows)) {}

  reference::QuantizedRows Host() const {
    EXPECT_TRUE(values.Intact() && scale.Intact());
    return {values.Host(), scale.Host()};
  }

  int64_t width;
  DeviceArray<uint8_t> values;
  DeviceArray<float> scale;
};

// Names the first difference.
void ExpectSameBits(const reference::QuantizedRows& got, const reference::QuantizedRows& want) {
  ASSERT_EQ(got.values.size(), want.values.size());
  const size_t width = want.values.size() / want.scales.size();
  for (size_t row = 0; row < want.scales.size(); ++row) {
    ASSERT_EQ(got.scales[row], want.scales[row]) << "scale of row " << row;
  }
  for (size_t i = 0; i < want.values.size(); ++i) {
    ASSERT_EQ(int{got.values[i]}, int{want.values[i]}) << "row " << i / width << ", column " << i % width;
  }
}

// Rounding is at most 2^-4 of a value, or half of the smallest step, 2^-9. 1e-4: what the f32 value before it
// may be off.
void ExpectWithinHalfAStep(const reference::QuantizedRows& got, const std::vector<double>& want) {
  ASSERT_EQ(got.values.size(), want.size());
  const size_t width = want.size() / got.scales.size();
  for (size_t row = 0; row < got.scales.size(); ++row) {
    double most = 0x1p-64;
    for (size_t i = row * width; i < (row + 1) * width; ++i) most = std::max(most, std::fabs(want[i]));
    ASSERT_NEAR(got.scales[row] / (most / 448), 1, 1e-4) << "scale of row " << row;
    for (size_t i = row * width; i < (row + 1) * width; ++i) {
      const double value = static_cast<double>(reference::E4m3ToF32(got.values[i])) * got.scales[row];
      ASSERT_NEAR(value, want[i], (0x1p-4 + 1e-4) * std::fabs(want[i]) + 0x1.01p-10 * got.scales[row])
          << "row " << row << ", column " << i % width << ", bits " << int{got.values[i]};
    }
  }
}

// Rows of bad values have NaN throughout; the others are as without them.
void ExpectNanRows(const reference::QuantizedRows& got, const reference::QuantizedRows& clean,
                   const std::vector<size_t>& bad) {
  const size_t width = got.values.size() / got.scales.size();
  for (size_t i = 0; i < got.values.size(); ++i) {
    const size_t row = i / width;
    if (std::find(bad.begin(), bad.end(), row) != bad.end()) {
      ASSERT_TRUE(std::isnan(got.scales[row])) << "scale of row " << row << ": " << got.scales[row];
      ASSERT_EQ(got.values[i] & 0x7F, 0x7F) << "row " << row << ", column " << i % width;
    } else {
      ASSERT_EQ(got.scales[row], clean.scales[row]) << "scale of row " << row;
      ASSERT_EQ(int{got.values[i]}, int{clean.values[i]}) << "row " << row << ", column " << i % width;
    }
  }
}

reference::QuantizedRows Quantize(const std::vector<float>& x, int64_t num_rows, int64_t width) {
  const DeviceArray<uint16_t> dx(ToBf16(x));
  const Rows out(num_rows, width);
  ExpectOk(CudaQuantizeRows({dx.data(), out.values.data(), out.scale.data(), num_rows, width}, nullptr));
  EXPECT_TRUE(dx.Intact());
  return out.Host();
}

TEST(CudaQuantizeRowsGpuTest, BitsOfTheReference) {
  HW_REQUIRE_SM90();
  for (const auto& [rows, width] :
       {std::pair(1, 8), std::pair(1, 4096), std::pair(8, 256), std::pair(127, 2056), std::pair(129, 4096),
        std::pair(5, 4104), std::pair(9, 8192), std::pair(7, 14336), std::pair(3, 18944), std::pair(5, 28672),
        std::pair(3, 32768), std::pair(8191, 64)}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << width);
    std::vector<float> x = RandomBf16(static_cast<size_t>(rows) * width, 1);
    for (size_t i = 0; i < x.size(); i += 7) x[i] *= 0x1p-8f;
    ExpectSameBits(Quantize(x, rows, width), reference::QuantizeRows(x.data(), rows, width));
  }
}

// Each row of another size, up to bf16's limits; rows of zeros; every bf16 of a few exponents.
TEST(CudaQuantizeRowsGpuTest, BitsOfTheReferenceAtExtremes) {
  HW_REQUIRE_SM90();
  constexpr int kRows = 260, kWidth = 2048;
  std::vector<float> x = RandomBf16(size_t{kRows} * kWidth, 2);
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kWidth; ++i) {
      float& value = x[static_cast<size_t>(row) * kWidth + i];
      if (row < 250) value = std::ldexp(value, row - 130);
      if (row == 250) value = 0;
      if (row == 251) value = -0.0f;
      if (row == 252) value = i == kWidth - 1 ? -3e38f : value;
      if (row >= 253) value = BF16ToF32(static_cast<uint16_t>(0x3000 + (row - 253) * kWidth + i));
    }
  }
  x = ToFloat(ToBf16(x));
  for (float& value : x) {
    if (!std::isfinite(value)) value = 1;
  }
  ExpectSameBits(Quantize(x, kRows, kWidth), reference::QuantizeRows(x.data(), kRows, kWidth));
}

TEST(CudaQuantizeRowsGpuTest, NanStaysInItsRow) {
  HW_REQUIRE_SM90();
  const std::vector<float> clean = RandomBf16(9 * 1024, 1);
  std::vector<float> spoilt = clean;
  spoilt[4 * 1024 + 1000] = kNan;
  spoilt[6 * 1024] = kInfinity;
  spoilt[7 * 1024 + 5] = -kInfinity;
  ExpectNanRows(Quantize(spoilt, 9, 1024), reference::QuantizeRows(clean.data(), 9, 1024), {4, 6, 7});
}

// Over 2^31 elements: the first and the last rows are checked, the rest of x is NaN.
TEST(CudaQuantizeRowsGpuTest, LargeArray) {
  HW_REQUIRE_SM90();
  constexpr int64_t kRows = 70'001, kWidth = 32768;
  static_assert(kRows * kWidth > int64_t{1} << 31);
  const std::vector<float> rows = RandomBf16(2 * kWidth, 1);
  const DeviceArray<uint16_t> x(kRows * kWidth), ends(ToBf16(rows));
  for (const int64_t row : {int64_t{0}, kRows - 2}) {
    ASSERT_EQ(cudaMemcpy(x.data() + row * kWidth, ends.data(), ends.Bytes(), cudaMemcpyDeviceToDevice),
              cudaSuccess);
  }
  const Rows out(kRows, kWidth);
  ExpectOk(CudaQuantizeRows({x.data(), out.values.data(), out.scale.data(), kRows, kWidth}, nullptr));
  const reference::QuantizedRows want = reference::QuantizeRows(rows.data(), 2, kWidth);
  const std::vector<float> scales = out.scale.Host();
  for (const int64_t row : {int64_t{0}, kRows - 2}) {
    reference::QuantizedRows got{std::vector<uint8_t>(2 * kWidth), {scales[row], scales[row + 1]}};
    ASSERT_EQ(cudaMemcpy(got.values.data(), out.values.data() + row * kWidth, got.values.size(),
                         cudaMemcpyDeviceToHost),
              cudaSuccess);
    ExpectSameBits(got, want);
  }
  EXPECT_TRUE(std::isnan(scales[2]) && std::isnan(scales[kRows - 3]));
  EXPECT_TRUE(out.values.Intact() && out.scale.Intact());
}

TEST(CudaQuantizedRmsNormGpuTest, WithinHalfAStepOfTheReference) {
  HW_REQUIRE_SM90();
  for (const auto& [tokens, width] :
       {std::pair(3, 8), std::pair(1, 576), std::pair(129, 256), std::pair(127, 2056), std::pair(8, 4096),
        std::pair(5, 4104), std::pair(5, 8192), std::pair(3, 16384)}) {
    const size_t count = static_cast<size_t>(tokens) * width;
    const std::vector<float> more = RandomBf16(count, 2), weight = RandomBf16(width, 3);
    const DeviceArray<uint16_t> delta(ToBf16(more)), weight_bf16(ToBf16(weight));
    const DeviceArray<float> weight_f32(weight);
    for (const bool wide : {false, true}) {
      for (const bool with_delta : {false, true}) {
        SCOPED_TRACE(testing::Message()
                     << tokens << " x " << width << ", f32 " << wide << ", delta " << with_delta);
        std::vector<float> hidden = RandomBf16(count, 1);
        const DeviceArray<uint16_t> x_bf16(ToBf16(hidden));
        const DeviceArray<float> x_f32(hidden);
        const Rows out(tokens, width);
        CudaRmsNormArgs args;
        args.x = wide ? static_cast<void*>(x_f32.data()) : x_bf16.data();
        args.x_dtype = args.weight_dtype = wide ? DType::kF32 : DType::kBF16;
        args.delta = with_delta ? delta.data() : nullptr;
        args.weight = wide ? static_cast<const void*>(weight_f32.data()) : weight_bf16.data();
        args.out = out.values.data();
        args.epsilon = 1e-5f;
        args.num_tokens = tokens;
        args.width = width;
        args.scale = out.scale.data();
        ExpectOk(CudaRmsNorm(args, nullptr));
        if (with_delta) {
          for (size_t i = 0; i < count; ++i) hidden[i] += more[i];
          if (!wide) hidden = ToFloat(ToBf16(hidden));
        }
        EXPECT_TRUE(SameBits(wide ? x_f32.Host() : ToFloat(x_bf16.Host()), hidden));
        ExpectWithinHalfAStep(out.Host(),
                              reference::RmsNorm(hidden.data(), weight.data(), 1e-5f, tokens, width));
      }
    }
  }
}

reference::QuantizedRows SiluMul(const std::vector<float>& in, int64_t tokens, int64_t width) {
  const DeviceArray<uint16_t> gate_up(ToBf16(in));
  const Rows out(tokens, width);
  ExpectOk(CudaSiluMul({gate_up.data(), out.values.data(), tokens, width, out.scale.data()}, nullptr));
  EXPECT_TRUE(gate_up.Intact());
  return out.Host();
}

TEST(CudaQuantizedSiluMulGpuTest, WithinHalfAStepOfTheReference) {
  HW_REQUIRE_SM90();
  for (const auto& [tokens, width] :
       {std::pair(1, 8), std::pair(3, 1536), std::pair(129, 2048), std::pair(127, 8200), std::pair(8, 14336),
        std::pair(5, 18944), std::pair(5, 28672), std::pair(2, 32768), std::pair(8191, 16)}) {
    SCOPED_TRACE(testing::Message() << tokens << " x " << width);
    std::vector<float> in = RandomBf16(size_t{2} * tokens * width, 1);
    for (size_t i = 0; i < in.size(); i += 3) in[i] *= 16;
    ExpectWithinHalfAStep(SiluMul(in, tokens, width), reference::SiluMul(in.data(), tokens, width));
  }
}

// Where the exponential overflows the result is 0, as it should be.
TEST(CudaQuantizedSiluMulGpuTest, LargeGates) {
  HW_REQUIRE_SM90();
  std::vector<float> in(32, 1);
  const float gates[] = {-300, -100, -89, -88, -87, 88, 100, 300};
  std::copy(std::begin(gates), std::end(gates), in.begin());
  ExpectWithinHalfAStep(SiluMul(in, 1, 16), reference::SiluMul(in.data(), 1, 16));
}

TEST(CudaQuantizedSiluMulGpuTest, NanStaysInItsRow) {
  HW_REQUIRE_SM90();
  const std::vector<float> clean = RandomBf16(2 * 9 * 512, 1);
  std::vector<float> spoilt = clean;
  spoilt[4 * 1024 + 1000] = kNan;    // up
  spoilt[6 * 1024 + 3] = kInfinity;  // gate
  spoilt[7 * 1024] = -kInfinity;
  ExpectNanRows(SiluMul(spoilt, 9, 512), SiluMul(clean, 9, 512), {4, 6, 7});
}

}  // namespace
}  // namespace headwater::kernels
