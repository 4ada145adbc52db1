// Linear layers on the GPU against the double-precision reference.
#include "kernels/cuda/linear.h"

#include <cmath>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/reference/layer_ops.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {
namespace {

struct Case {
  const char* name;
  int tokens, in, out;
  size_t shift = 0;  // elements by which the arrays are off their alignment of 256 bytes
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

std::unique_ptr<CudaLinear> Make(const CudaLinearOptions& options = {}) {
  std::unique_ptr<CudaLinear> linear;
  const Status status = CudaLinear::Create(options, &linear);
  EXPECT_TRUE(status.ok()) << status.message();
  return linear;
}

std::vector<float> Shifted(size_t shift, std::vector<float> values) {
  values.insert(values.begin(), shift, 0.0f);
  return values;
}

class Problem {
 public:
  Problem(const Case& c, bool wide, bool with_bias, bool accumulate)
      : c_(c),
        wide_(wide),
        x_(RandomBf16(static_cast<size_t>(c.tokens) * c.in, 1)),
        weight_(RandomBf16(static_cast<size_t>(c.out) * c.in, 2)),
        bias_(RandomBf16(c.out, 3)),
        before_(RandomBf16(static_cast<size_t>(c.tokens) * c.out, 4)),
        dx_(ToBf16(Shifted(c.shift, x_))),
        dweight_(ToBf16(Shifted(c.shift, weight_))),
        dbias_(ToBf16(Shifted(c.shift, bias_))),
        dy_(ToBf16(Shifted(c.shift, before_))),
        dbias_f32_(Shifted(c.shift, bias_)),
        dy_f32_(Shifted(c.shift, before_)) {
    args_.x = dx_.data() + c.shift;
    args_.weight = dweight_.data() + c.shift;
    args_.y = wide ? static_cast<void*>(dy_f32_.data() + c.shift) : dy_.data() + c.shift;
    args_.y_dtype = wide ? DType::kF32 : DType::kBF16;
    if (with_bias)
      args_.bias = wide ? static_cast<void*>(dbias_f32_.data() + c.shift) : dbias_.data() + c.shift;
    args_.accumulate = accumulate;
    args_.num_tokens = c.tokens;
    args_.in_features = c.in;
    args_.out_features = c.out;
  }

  const CudaLinearArgs& args() const { return args_; }

  std::vector<float> Got() const {
    std::vector<float> y = wide_ ? dy_f32_.Host() : ToFloat(dy_.Host());
    y.erase(y.begin(), y.begin() + static_cast<std::ptrdiff_t>(c_.shift));
    EXPECT_TRUE(dy_.Intact() && dy_f32_.Intact() && dx_.Intact() && dweight_.Intact());
    return y;
  }
  std::vector<double> Want() const {
    return reference::Linear(x_.data(), weight_.data(), args_.bias != nullptr ? bias_.data() : nullptr,
                             args_.accumulate ? before_.data() : nullptr, c_.tokens, c_.in, c_.out);
  }
  // One rounding of y, and f32 sums of `in` products of size 1. Split sums may round to y's type once more.
  double Tolerance() const { return wide_ ? 1e-5 : 2 * kBf16Error; }
  double Scale() const { return std::sqrt(c_.in); }

 private:
  Case c_;
  bool wide_;
  std::vector<float> x_, weight_, bias_, before_;
  DeviceArray<uint16_t> dx_, dweight_, dbias_, dy_;
  DeviceArray<float> dbias_f32_, dy_f32_;
  CudaLinearArgs args_;
};

void Execute(CudaLinear* linear, const CudaLinearArgs& args) {
  const Status status = linear->Run(args, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

class CudaLinearGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaLinearGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const auto linear = Make();
  ASSERT_NE(linear, nullptr);
  for (const bool wide : {false, true}) {
    for (const bool with_bias : {false, true}) {
      for (const bool accumulate : {false, true}) {
        SCOPED_TRACE(testing::Message()
                     << "f32 " << wide << ", bias " << with_bias << ", accumulate " << accumulate);
        const Problem problem(GetParam(), wide, with_bias, accumulate);
        Execute(linear.get(), problem.args());
        EXPECT_LE(WorstError(problem.Got(), problem.Want(), problem.Scale()), problem.Tolerance());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaLinearGpuTest,
                         ::testing::Values(Case{"one_token", 1, 576, 960}, Case{"few", 3, 64, 128},
                                           Case{"smallest", 1, 8, 8}, Case{"block_minus_1", 127, 512, 264},
                                           Case{"block", 128, 512, 264}, Case{"block_plus_1", 129, 512, 264},
                                           Case{"ragged", 1000, 136, 200}, Case{"long_sums", 20, 14336, 64},
                                           Case{"sixteen_byte_aligned", 65, 256, 320, 8}),
                         [](const auto& test) { return test.param.name; });

// More shapes than plans, in turns: what was forgotten is chosen again.
TEST(CudaLinearGpuTest, FewPlansServeManyShapes) {
  HW_REQUIRE_SM90();
  CudaLinearOptions options;
  options.max_plans = 2;
  options.workspace_bytes = 0;
  const auto linear = Make(options);
  for (int round = 0; round < 2; ++round) {
    for (const int tokens : {1, 64, 3, 64, 200}) {
      const Problem problem({"", tokens, 256, 128}, false, true, false);
      Execute(linear.get(), problem.args());
      EXPECT_LE(WorstError(problem.Got(), problem.Want(), problem.Scale()), problem.Tolerance());
    }
  }
}

// One plan, several biases and addresses.
TEST(CudaLinearGpuTest, EqualShapesShareAPlanNotTheirArrays) {
  HW_REQUIRE_SM90();
  const auto linear = Make();
  const Case c{"", 100, 128, 64};
  const Problem first(c, false, true, false), second(c, false, true, false);
  const std::vector<float> bias(64, 100.0f);
  const DeviceArray<uint16_t> other_bias(ToBf16(bias));
  CudaLinearArgs changed = second.args();
  changed.bias = other_bias.data();
  Execute(linear.get(), first.args());
  Execute(linear.get(), changed);
  EXPECT_GT(second.Got()[0], first.Got()[0] + 50);
  Execute(linear.get(), second.args());
  EXPECT_TRUE(SameBits(first.Got(), second.Got()));
}

TEST(CudaLinearGpuTest, CallersWorkspaceIsUsedWithinItsBounds) {
  HW_REQUIRE_SM90();
  const DeviceArray<unsigned char> workspace(size_t{4} << 20);
  CudaLinearOptions options;
  options.workspace = workspace.data();
  options.workspace_bytes = workspace.size();
  const auto linear = Make(options);
  EXPECT_EQ(linear->workspace_bytes(), workspace.size());
  const Problem problem({"", 20, 14336, 64}, true, false, false);
  Execute(linear.get(), problem.args());
  EXPECT_LE(WorstError(problem.Got(), problem.Want(), problem.Scale()), problem.Tolerance());
  EXPECT_TRUE(workspace.Intact());
}

TEST(CudaLinearGpuTest, NanStaysInItsRow) {
  HW_REQUIRE_SM90();
  const auto linear = Make();
  const Case c{"", 100, 256, 128};
  const Problem clean(c, false, false, false), spoilt(c, false, false, false);
  const uint16_t nan = 0x7FC0;
  auto* const x = static_cast<uint16_t*>(const_cast<void*>(spoilt.args().x));
  ASSERT_EQ(cudaMemcpy(x + 42 * 256 + 7, &nan, sizeof nan, cudaMemcpyHostToDevice), cudaSuccess);
  Execute(linear.get(), clean.args());
  Execute(linear.get(), spoilt.args());
  const std::vector<float> want = clean.Got(), got = spoilt.Got();
  for (size_t i = 0; i < got.size(); ++i) {
    if (i / 128 == 42) {
      EXPECT_TRUE(std::isnan(got[i])) << i;
    } else {
      EXPECT_EQ(got[i], want[i]) << i;
    }
  }
}

TEST(CudaLinearGpuTest, NoTokensAreFine) {
  HW_REQUIRE_SM90();
  CudaLinearArgs args;
  args.in_features = args.out_features = 64;
  EXPECT_TRUE(Make()->Run(args, nullptr).ok());
}

// y has over 2^31 elements: the first and last rows are checked, the rest of x is NaN.
TEST(CudaLinearGpuTest, LargeOutput) {
  HW_REQUIRE_SM90();
  constexpr int64_t kTokens = 80'003, kIn = 64, kOut = 28672;
  static_assert(kTokens * kOut > int64_t{1} << 31);
  const std::vector<float> rows = RandomBf16(2 * kIn, 1), weight = RandomBf16(kOut * kIn, 2);
  const DeviceArray<uint16_t> x(kTokens * kIn), dweight(ToBf16(weight)), y(kTokens * kOut),
      drows(ToBf16(rows));
  for (const int64_t token : {int64_t{0}, kTokens - 2}) {
    ASSERT_EQ(cudaMemcpy(x.data() + token * kIn, drows.data(), drows.Bytes(), cudaMemcpyDeviceToDevice),
              cudaSuccess);
  }
  CudaLinearArgs args;
  args.x = x.data();
  args.weight = dweight.data();
  args.y = y.data();
  args.num_tokens = kTokens;
  args.in_features = kIn;
  args.out_features = kOut;
  Execute(Make().get(), args);
  const std::vector<double> want =
      reference::Linear(rows.data(), weight.data(), nullptr, nullptr, 2, kIn, kOut);
  for (const int64_t token : {int64_t{0}, kTokens - 2}) {
    std::vector<uint16_t> got(size_t{2} * kOut);
    ASSERT_EQ(cudaMemcpy(got.data(), y.data() + token * kOut, got.size() * 2, cudaMemcpyDeviceToHost),
              cudaSuccess);
    EXPECT_LE(WorstError(ToFloat(got), want, 8), 2 * kBf16Error) << token;
  }
  EXPECT_TRUE(y.Intact());
}

}  // namespace
}  // namespace headwater::kernels
