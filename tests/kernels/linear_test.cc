#include "kernels/ops/linear.h"

#include <cmath>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/cpu/cpu_features.h"

namespace headwater::kernels {
namespace {

std::vector<float> Random(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<char> As(const std::vector<float>& values, DType dtype) {
  std::vector<char> bytes(values.size() * SizeOf(dtype));
  Convert(values.data(), DType::kF32, bytes.data(), dtype, values.size());
  return bytes;
}

std::vector<float> Rounded(const std::vector<float>& values, DType dtype) {
  const auto bytes = As(values, dtype);
  std::vector<float> wide(values.size());
  Convert(bytes.data(), dtype, wide.data(), DType::kF32, wide.size());
  return wide;
}

struct LinearCase {
  std::string name;
  int64_t in_features;
  std::vector<int64_t> rows;
  std::vector<int64_t> tokens;
};

const LinearCase kCases[] = {
    {"one", 1, {1}, {1, 2}},
    {"ragged", 37, {53}, {1, 3, 17}},
    {"stacked", 64, {64, 32, 32}, {1, 2, 31, 64, 130}},
    {"stacked_ragged", 100, {7, 90, 3}, {1, 33}},
    {"qkv", 576, {576, 192, 192}, {1, 5, 128, 200}},
    {"down", 1536, {576}, {1, 16, 77}},
};

// y = x W^T + bias (+ y0) in double, of inputs as they are after rounding to the compute type.
double Want(const std::vector<float>& x, const std::vector<float>& w, int64_t in, int64_t token,
            int64_t row) {
  double sum = 0;
  for (int64_t i = 0; i < in; ++i) {
    sum += static_cast<double>(x[static_cast<size_t>(token * in + i)]) *
           static_cast<double>(w[static_cast<size_t>(row * in + i)]);
  }
  return sum;
}

void CheckRun(const Linear& linear, const LinearCase& c, const std::vector<float>& w, const float* bias,
              DType compute, DType y_dtype, bool accumulate, int64_t tokens) {
  const int64_t out = linear.out_features();
  const auto values = Random(static_cast<size_t>(tokens * c.in_features), 5);
  const auto x = As(values, compute);
  const auto x_wide = Rounded(values, compute);
  const auto count = static_cast<size_t>(tokens * out);
  const auto y_before = Random(count, 6);
  auto y = As(y_before, y_dtype);
  y.resize(y.size() + 64, 0x5a);
  const Status status = linear.Run(x.data(), tokens, y.data(), y_dtype, accumulate);
  ASSERT_TRUE(status.ok()) << status.message();
  for (size_t i = count * SizeOf(y_dtype); i < y.size(); ++i) ASSERT_EQ(y[i], 0x5a);
  std::vector<float> got(count);
  Convert(y.data(), y_dtype, got.data(), DType::kF32, count);
  // Products of bf16 are exact in f32; sums of n terms of size 1 err by about n * 2^-24; a bf16 result is
  // rounded.
  const double absolute = 1e-6 * static_cast<double>(c.in_features) + 1e-6;
  const double relative = y_dtype == DType::kBF16 ? 0x1p-8 : 1e-6;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < out; ++r) {
      const auto at = static_cast<size_t>(t * out + r);
      double want = Want(x_wide, w, c.in_features, t, r);
      if (bias != nullptr) want += static_cast<double>(bias[r]);
      if (accumulate) want += static_cast<double>(y_before[at]);
      ASSERT_NEAR(static_cast<double>(got[at]), want, absolute + relative * std::fabs(want))
          << c.name << " tokens " << tokens << " at " << t << ", " << r;
    }
  }
}

void CheckCase(const LinearCase& c, DType weight_dtype, DType compute, bool with_bias) {
  std::vector<std::vector<char>> parts;
  std::vector<float> w;
  LinearSpec spec;
  spec.in_features = c.in_features;
  spec.compute = compute;
  for (size_t i = 0; i < c.rows.size(); ++i) {
    const auto values = Random(static_cast<size_t>(c.rows[i] * c.in_features), static_cast<uint32_t>(20 + i));
    parts.push_back(As(values, weight_dtype));
    const auto wide = Rounded(Rounded(values, weight_dtype), compute);
    w.insert(w.end(), wide.begin(), wide.end());
  }
  for (size_t i = 0; i < c.rows.size(); ++i)
    spec.weight.push_back({parts[i].data(), weight_dtype, c.rows[i]});
  const auto out = static_cast<int64_t>(w.size()) / c.in_features;
  auto bias = Random(static_cast<size_t>(out), 40);
  const auto bias_copy = bias;
  if (with_bias) spec.bias = bias.data();
  std::unique_ptr<Linear> linear;
  const Status status = Linear::Create(spec, &linear);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(linear->in_features(), c.in_features);
  EXPECT_EQ(linear->out_features(), out);
  EXPECT_GE(linear->packed_bytes(), w.size() * SizeOf(compute));
  // The layer keeps no pointer into the caller's memory.
  for (auto& part : parts) std::fill(part.begin(), part.end(), char{0x7f});
  std::fill(bias.begin(), bias.end(), NAN);
  const float* kept_bias = with_bias ? bias_copy.data() : nullptr;
  for (const int64_t tokens : c.tokens) {
    CheckRun(*linear, c, w, kept_bias, compute, DType::kF32, false, tokens);
    CheckRun(*linear, c, w, kept_bias, compute, DType::kF32, true, tokens);
    if (compute == DType::kBF16) CheckRun(*linear, c, w, kept_bias, compute, DType::kBF16, false, tokens);
  }
}

bool HasBF16() { return PreferredComputeType() == DType::kBF16; }

TEST(Linear, MatchesDoubleLoops) {
  for (const LinearCase& c : kCases) {
    for (const bool bias : {false, true}) {
      CheckCase(c, DType::kF32, DType::kF32, bias);
      if (HasBF16()) CheckCase(c, DType::kBF16, DType::kBF16, bias);
    }
  }
}

TEST(Linear, TakesWeightsOfAnyType) {
  const LinearCase c{"types", 96, {40, 24}, {1, 9}};
  for (const DType weight : {DType::kF32, DType::kF16, DType::kBF16}) {
    CheckCase(c, weight, DType::kF32, true);
    if (HasBF16()) CheckCase(c, weight, DType::kBF16, true);
  }
}

std::unique_ptr<Linear> Small(const std::vector<float>& weight, int64_t in_features) {
  LinearSpec spec;
  spec.in_features = in_features;
  spec.weight = {{weight.data(), DType::kF32, static_cast<int64_t>(weight.size()) / in_features}};
  std::unique_ptr<Linear> linear;
  EXPECT_TRUE(Linear::Create(spec, &linear).ok());
  return linear;
}

TEST(Linear, StaysRightWhenMoreTokenCountsComeThanTheCacheHolds) {
  const auto weight = Random(16 * 16, 1);
  const auto linear = Small(weight, 16);
  for (int round = 0; round < 2; ++round) {
    for (int64_t tokens = 1; tokens < 40; ++tokens) {
      CheckRun(*linear, {"cache", 16, {16}, {}}, weight, nullptr, DType::kF32, DType::kF32, false, tokens);
    }
  }
}

TEST(Linear, EqualCallsGiveEqualBitsFromManyThreads) {
  const auto weight = Random(256 * 192, 2);
  const auto linear = Small(weight, 256);
  const auto x = Random(100 * 256, 3);
  std::vector<float> want(100 * 192);
  ASSERT_TRUE(linear->Run(x.data(), 100, want.data(), DType::kF32, false).ok());
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) {
        std::vector<float> y(100 * 192);
        const int64_t tokens = i % 2 == 0 ? 100 : 37;
        const bool ok = linear->Run(x.data(), tokens, y.data(), DType::kF32, false).ok();
        if (!ok || (tokens == 100 && y != want)) ++wrong[t];
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

TEST(Linear, ZeroTokensDoNothing) {
  const auto weight = Random(16 * 16, 1);
  EXPECT_TRUE(Small(weight, 16)->Run(nullptr, 0, nullptr, DType::kF32, false).ok());
}

TEST(Linear, RefusesBadArguments) {
  const std::vector<float> weight(16 * 16, 1);
  const auto linear = Small(weight, 16);
  std::vector<float> y(16);
  EXPECT_EQ(linear->Run(weight.data(), -1, y.data(), DType::kF32, false).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(linear->Run(nullptr, 1, y.data(), DType::kF32, false).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(linear->Run(weight.data(), 1, nullptr, DType::kF32, false).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(linear->Run(weight.data(), 1, y.data(), DType::kBF16, false).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(linear->Run(weight.data(), 1, y.data(), DType::kF16, false).code(), StatusCode::kInvalidArgument);
}

TEST(Linear, RefusesBadSpecs) {
  const std::vector<float> weight(16 * 16, 1);
  struct Row {
    LinearSpec spec;
    std::string words;
  };
  const Row kRows[] = {
      {{16, {}, nullptr, DType::kF32}, "no weight"},
      {{0, {{weight.data(), DType::kF32, 16}}, nullptr, DType::kF32}, "in_features 0"},
      {{16, {{nullptr, DType::kF32, 16}}, nullptr, DType::kF32}, "data is null"},
      {{16, {{weight.data(), DType::kF32, 0}}, nullptr, DType::kF32}, "0 rows"},
      {{16, {{weight.data(), DType::kF32, 8}, {weight.data(), DType::kF32, INT64_MAX}}, nullptr, DType::kF32},
       "rows after 8"},
      {{16, {{weight.data(), DType::kF32, 16}}, nullptr, DType::kF16}, "f16"},
  };
  for (const Row& row : kRows) {
    std::unique_ptr<Linear> linear;
    const Status status = Linear::Create(row.spec, &linear);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(row.words), std::string::npos) << status.message();
  }
}

TEST(PreferredComputeType, FollowsTheCpu) {
  {
    const cpu::ScopedCpuPath forced(cpu::CpuPath::kPortable);
    EXPECT_EQ(PreferredComputeType(), DType::kF32);
  }
  EXPECT_EQ(PreferredComputeType(), cpu::IsSupported(cpu::CpuPath::kAvx512Bf16) ? DType::kBF16 : DType::kF32);
}

}  // namespace
}  // namespace headwater::kernels
