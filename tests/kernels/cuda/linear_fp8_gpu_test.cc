// Linear layers with e4m3 operands against the double-precision product of what the operands stand for.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <ostream>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/linear.h"
#include "kernels/reference/layer_ops.h"
#include "kernels/reference/quantize.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {
namespace {

struct Case {
  const char* name;
  int tokens, in, out;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

std::unique_ptr<CudaLinear> Make(bool fast_accumulation = true) {
  CudaLinearOptions options;
  options.fast_accumulation = fast_accumulation;
  std::unique_ptr<CudaLinear> linear;
  const Status status = CudaLinear::Create(options, &linear);
  EXPECT_TRUE(status.ok()) << status.message();
  return linear;
}

// Largest error over the largest value wanted.
double LargestError(const std::vector<float>& got, const std::vector<double>& want) {
  double error = got.size() == want.size() ? 0 : INFINITY, largest = 0;
  for (size_t i = 0; i < want.size() && i < got.size(); ++i) {
    if (std::isnan(got[i])) return INFINITY;
    error = std::max(error, std::fabs(got[i] - want[i]));
    largest = std::max(largest, std::fabs(want[i]));
  }
  return error / largest;
}

// In the mean square.
double MeanError(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}

// Of f32 results. The matrix units cut a sum off some 13 bits below its leading one at each step of 32
// products; without fast accumulation that concerns partial sums of few steps.
double Tolerance(int in, bool fast_accumulation) {
  return 2e-3 + (fast_accumulation ? in / 32 * 0x1p-13 : 0);
}

class Problem {
 public:
  explicit Problem(const Case& c)
      : c_(c),
        x_(RandomBf16(static_cast<size_t>(c.tokens) * c.in, 1)),
        weight_(RandomBf16(static_cast<size_t>(c.out) * c.in, 2)),
        bias_(RandomBf16(c.out, 3)),
        before_(RandomBf16(static_cast<size_t>(c.tokens) * c.out, 4)),
        xq_(reference::QuantizeRows(x_.data(), c.tokens, c.in)),
        weightq_(reference::QuantizeRows(weight_.data(), c.out, c.in)),
        dx_(xq_.values),
        dweight_(weightq_.values),
        dx_scale_(xq_.scales),
        dweight_scale_(weightq_.scales),
        dbias_(ToBf16(bias_)) {
    const std::vector<float> x = xq_.Dequantized(), weight = weightq_.Dequantized();
    product_ = reference::Linear(x.data(), weight.data(), nullptr, nullptr, c.tokens, c.in, c.out);
  }

  // y after the call; empty where it fails, which is a failure of the test.
  std::vector<float> Run(CudaLinear* linear, bool wide, bool with_bias = false,
                         bool accumulate = false) const {
    const DeviceArray<float> y_f32(before_);
    const DeviceArray<uint16_t> y_bf16(ToBf16(before_));
    CudaLinearArgs args;
    args.x = dx_.data();
    args.weight = dweight_.data();
    args.bias = with_bias ? dbias_.data() : nullptr;
    args.y = wide ? static_cast<void*>(y_f32.data()) : y_bf16.data();
    args.y_dtype = wide ? DType::kF32 : DType::kBF16;
    args.accumulate = accumulate;
    args.num_tokens = c_.tokens;
    args.in_features = c_.in;
    args.out_features = c_.out;
    args.x_scale = dx_scale_.data();
    args.weight_scale = dweight_scale_.data();
    const Status status = linear->Run(args, nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
    const cudaError_t error = cudaDeviceSynchronize();
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
    if (!status.ok() || error != cudaSuccess) return {};
    EXPECT_TRUE(y_f32.Intact() && y_bf16.Intact() && dx_.Intact() && dweight_.Intact());
    return wide ? y_f32.Host() : ToFloat(y_bf16.Host());
  }

  // Of what the operands stand for.
  std::vector<double> Want(bool with_bias = false, bool accumulate = false) const {
    std::vector<double> want = product_;
    for (size_t i = 0; i < want.size(); ++i) {
      if (with_bias) want[i] += static_cast<double>(bias_[i % static_cast<size_t>(c_.out)]);
      if (accumulate) want[i] += static_cast<double>(before_[i]);
    }
    return want;
  }
  // Of what was quantized.
  std::vector<double> Unquantized() const {
    return reference::Linear(x_.data(), weight_.data(), nullptr, nullptr, c_.tokens, c_.in, c_.out);
  }

  const DeviceArray<uint8_t>& dx() const { return dx_; }
  const DeviceArray<float>& dx_scale() const { return dx_scale_; }

 private:
  Case c_;
  std::vector<float> x_, weight_, bias_, before_;
  reference::QuantizedRows xq_, weightq_;
  DeviceArray<uint8_t> dx_, dweight_;
  DeviceArray<float> dx_scale_, dweight_scale_;
  DeviceArray<uint16_t> dbias_;
  std::vector<double> product_;
};

// cuBLASLt has no kernel that adds a bias to a few long rows (cuda/linear.h says so). No model that is served
// has a bias there.
bool LacksBias(const Case& c) { return c.tokens < 16 && c.in > 8192; }

class CudaLinearFp8GpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaLinearFp8GpuTest, MatchesTheProductOfItsOperands) {
  HW_REQUIRE_SM90();
  const auto linear = Make();
  ASSERT_NE(linear, nullptr);
  const Problem problem(GetParam());
  for (const bool wide : {false, true}) {
    for (const bool with_bias : {false, true}) {
      for (const bool accumulate : {false, true}) {
        if (with_bias && LacksBias(GetParam())) continue;
        SCOPED_TRACE(testing::Message()
                     << "f32 " << wide << ", bias " << with_bias << ", accumulate " << accumulate);
        const double rounding = wide ? 0 : 2 * kBf16Error;
        EXPECT_LE(LargestError(problem.Run(linear.get(), wide, with_bias, accumulate),
                               problem.Want(with_bias, accumulate)),
                  Tolerance(GetParam().in, true) + rounding);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaLinearFp8GpuTest,
    ::testing::Values(Case{"one_token", 1, 576, 960}, Case{"smallest", 1, 16, 16}, Case{"few", 3, 64, 128},
                      Case{"eight", 8, 512, 272}, Case{"block_minus_1", 127, 512, 272},
                      Case{"block_plus_1", 129, 512, 272}, Case{"ragged", 333, 144, 208},
                      Case{"llama_qkv", 8, 4096, 6144}, Case{"llama_down", 3, 14336, 4096},
                      Case{"qwen2_qkv", 9, 3584, 4608}, Case{"qwen2_gate_up", 1, 3584, 37888},
                      Case{"qwen2_down", 2, 18944, 3584}),
    [](const auto& test) { return test.param.name; });

// What fp8 costs: the operands' rounding (3.7 % of normal values), and that of sums.
TEST(CudaLinearFp8GpuTest, ErrorAgainstTheUnquantizedProduct) {
  HW_REQUIRE_SM90();
  for (const int in : {512, 4096, 14336}) {
    const Problem problem({"", 33, in, 128});
    for (const bool fast : {false, true}) {
      SCOPED_TRACE(testing::Message() << in << " features, fast accumulation " << fast);
      const auto linear = Make(fast);
      const std::vector<float> got = problem.Run(linear.get(), true);
      ASSERT_FALSE(got.empty());
      const double error = MeanError(got, problem.Unquantized());
      const double of_sums = MeanError(got, problem.Want());
      std::printf("[ measured ] %d features, fast accumulation %d: error %.4f, of sums alone %.6f\n", in,
                  fast, error, of_sums);
      EXPECT_GT(error, 0.02);
      EXPECT_LT(error, fast ? 0.05 : 0.04);
      EXPECT_LE(LargestError(got, problem.Want()), Tolerance(in, fast));
    }
  }
}

// Small whole numbers and powers of two for scales: nothing rounds, so that every product and every scale
// must be in its place.
TEST(CudaLinearFp8GpuTest, WholeNumbersAreExact) {
  HW_REQUIRE_SM90();
  constexpr int kTokens = 131, kIn = 256, kOut = 144;
  std::vector<uint8_t> x(kTokens * kIn), weight(kOut * kIn);
  std::vector<float> x_scale(kTokens), weight_scale(kOut), want(kTokens * kOut), before(kTokens * kOut);
  constexpr uint8_t kMinusOne = 0xB8, kZero = 0, kOne = 0x38;
  const uint8_t codes[] = {kMinusOne, kZero, kOne};
  for (size_t i = 0; i < x.size(); ++i) x[i] = codes[(i * i / 7 + i / kIn) % 3];
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = codes[(i * 5 / 3 + i / kIn) % 3];
  for (int i = 0; i < kTokens; ++i) x_scale[i] = std::ldexp(1.0f, i % 7 - 3);
  for (int j = 0; j < kOut; ++j) weight_scale[j] = std::ldexp(1.0f, j % 5 - 1);
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kOut; ++j) {
      float sum = 0;
      for (int k = 0; k < kIn; ++k) {
        sum += reference::E4m3ToF32(x[i * kIn + k]) * reference::E4m3ToF32(weight[j * kIn + k]);
      }
      before[i * kOut + j] = static_cast<float>(i - j);
      want[i * kOut + j] = sum * x_scale[i] * weight_scale[j] + before[i * kOut + j];
    }
  }
  const DeviceArray<uint8_t> dx(x), dweight(weight);
  const DeviceArray<float> dx_scale(x_scale), dweight_scale(weight_scale), y(before);
  const Status status = Make()->Run({dx.data(), dweight.data(), nullptr, y.data(), DType::kF32, true, kTokens,
                                     kIn, kOut, dx_scale.data(), dweight_scale.data()},
                                    nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  const std::vector<float> got = y.Host();
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(got[i], want[i]) << "token " << i / kOut << ", channel " << i % kOut;
  }
}

// One plan, several scales.
TEST(CudaLinearFp8GpuTest, EqualShapesShareAPlanNotTheirScales) {
  HW_REQUIRE_SM90();
  const auto linear = Make();
  const Case c{"", 100, 128, 64};
  const Problem first(c), second(c);
  std::vector<float> scales = second.dx_scale().Host();
  for (float& scale : scales) scale *= 2;
  ASSERT_EQ(
      cudaMemcpy(second.dx_scale().data(), scales.data(), second.dx_scale().Bytes(), cudaMemcpyHostToDevice),
      cudaSuccess);
  std::vector<float> want = first.Run(linear.get(), true);
  for (float& value : want) value *= 2;
  EXPECT_TRUE(SameBits(second.Run(linear.get(), true), want));
}

TEST(CudaLinearFp8GpuTest, NanStaysInItsRow) {
  HW_REQUIRE_SM90();
  const auto linear = Make();
  const Case c{"", 100, 256, 128};
  const Problem problem(c);
  for (const bool accumulate : {false, true}) {
    const std::vector<float> want = problem.Run(linear.get(), accumulate, false, accumulate);
    const Problem spoilt(c);
    // As a row with a NaN is quantized.
    const float scale = NAN;
    ASSERT_EQ(cudaMemset(spoilt.dx().data() + 42 * 256, 0x7F, 256), cudaSuccess);
    ASSERT_EQ(cudaMemcpy(spoilt.dx_scale().data() + 42, &scale, sizeof scale, cudaMemcpyHostToDevice),
              cudaSuccess);
    const std::vector<float> got = spoilt.Run(linear.get(), accumulate, false, accumulate);
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      if (i / 128 == 42) {
        ASSERT_TRUE(std::isnan(got[i])) << "channel " << i % 128 << ": " << got[i];
      } else {
        ASSERT_EQ(got[i], want[i]) << "token " << i / 128 << ", channel " << i % 128;
      }
    }
  }
}

}  // namespace
}  // namespace headwater::kernels
