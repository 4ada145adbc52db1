#include "kernels/ops/layer_ops.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "tests/kernels/attention_cases.h"

namespace headwater::kernels {
namespace {

// One rounding to the output type, and a few in f32.
double ToleranceOf(DType dtype) {
  return dtype == DType::kF32 ? 2e-6 : dtype == DType::kF16 ? 0x1p-11 + 2e-6 : 0x1p-8 + 2e-6;
}

std::vector<float> Random(size_t count, uint32_t seed, float spread = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<char> As(const std::vector<float>& values, DType dtype) {
  std::vector<char> bytes(values.size() * SizeOf(dtype));
  Convert(values.data(), DType::kF32, bytes.data(), dtype, values.size());
  return bytes;
}

std::vector<float> Widened(const void* from, DType dtype, size_t count) {
  std::vector<float> values(count);
  Convert(from, dtype, values.data(), DType::kF32, count);
  return values;
}

// An output array of one type, followed by a canary.
class Output {
 public:
  Output(DType dtype, size_t count)
      : dtype_(dtype), count_(count), bytes_(count * SizeOf(dtype) + 64, 0x5a) {}
  void* data() { return bytes_.data(); }
  std::vector<float> values() const { return Widened(bytes_.data(), dtype_, count_); }
  bool Intact() const {
    for (size_t i = count_ * SizeOf(dtype_); i < bytes_.size(); ++i) {
      if (bytes_[i] != 0x5a) return false;
    }
    return true;
  }

 private:
  DType dtype_;
  size_t count_;
  std::vector<char> bytes_;
};

// |got - want| <= tolerance * (|want| + scale)
void ExpectNear(float got, double want, double tolerance, double scale, const std::string& what) {
  EXPECT_NEAR(static_cast<double>(got), want, tolerance * (std::fabs(want) + scale)) << what;
}

constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

TEST(LayerOps, EmbedTokensCopiesRows) {
  for (const DType dtype : kTypes) {
    const auto table = As(Random(11 * 35, 1), dtype);
    const auto wide = Widened(table.data(), dtype, 11 * 35);
    const std::vector<int32_t> ids = {10, 0, 3, 3};
    Output out(DType::kF32, 4 * 35);
    EmbedTokens(table.data(), dtype, 35, ids.data(), 4, static_cast<float*>(out.data()));
    for (size_t i = 0; i < 4; ++i) {
      for (size_t j = 0; j < 35; ++j)
        EXPECT_EQ(out.values()[i * 35 + j], wide[static_cast<size_t>(ids[i]) * 35 + j]);
    }
    EXPECT_TRUE(out.Intact());
  }
}

TEST(LayerOps, RmsNormMatchesDoubleLoops) {
  for (const auto path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    for (const int64_t width : {1, 7, 64, 511, 512, 513, 1536}) {
      for (const int64_t tokens : {1, 3, 97}) {
        const auto x = Random(static_cast<size_t>(tokens * width), 2, 3);
        const auto weight = Random(static_cast<size_t>(width), 3);
        for (const DType dtype : kTypes) {
          Output out(dtype, x.size());
          RmsNorm(x.data(), weight.data(), 1e-5f, tokens, width, out.data(), dtype);
          const auto got = out.values();
          EXPECT_TRUE(out.Intact());
          for (int64_t i = 0; i < tokens; ++i) {
            double sum = 0;
            for (int64_t j = 0; j < width; ++j)
              sum += std::pow(static_cast<double>(x[static_cast<size_t>(i * width + j)]), 2);
            for (int64_t j = 0; j < width; ++j) {
              const auto at = static_cast<size_t>(i * width + j);
              const double want = static_cast<double>(x[at]) /
                                  std::sqrt(sum / static_cast<double>(width) + 1e-5) *
                                  static_cast<double>(weight[static_cast<size_t>(j)]);
              ExpectNear(got[at], want, ToleranceOf(dtype), 1e-4, "width " + std::to_string(width));
            }
          }
        }
      }
    }
  }
}

TEST(LayerOps, RopeTableIsExactToF32AtLargePositions) {
  RopeFrequencies frequencies;
  for (int i = 0; i < 32; ++i) frequencies.inverse.push_back(std::pow(10000.0, -i / 32.0));
  for (const int64_t begin : {int64_t{0}, int64_t{1} << 20, int64_t{1} << 22, int64_t{1} << 31}) {
    std::vector<float> cos(40 * 32);
    std::vector<float> sin(40 * 32);
    RopeTable(frequencies, begin, 40, cos.data(), sin.data());
    for (int64_t i = 0; i < 40; ++i) {
      for (size_t j = 0; j < 32; ++j) {
        const long double angle =
            static_cast<long double>(begin + i) * static_cast<long double>(frequencies.inverse[j]);
        // Half a unit of f32 below 1, and what double leaves.
        EXPECT_NEAR(static_cast<double>(cos[static_cast<size_t>(i) * 32 + j]),
                    static_cast<double>(std::cos(angle)), 0x1p-25 + 1e-9);
        EXPECT_NEAR(static_cast<double>(sin[static_cast<size_t>(i) * 32 + j]),
                    static_cast<double>(std::sin(angle)), 0x1p-25 + 1e-9);
      }
    }
  }
}

TEST(LayerOps, RopeTableKeepsTheWholeProductAtHugePositions) {
  RopeFrequencies frequencies;
  frequencies.inverse = {1.0 / 3.0};
  const int64_t position = (int64_t{1} << 53) - 1;
  float cos = 0;
  float sin = 0;
  RopeTable(frequencies, position, 1, &cos, &sin);
  // position * inverse has 106 bits; its two halves are exact in long double, and so is the sum's residue.
  const long double high = static_cast<long double>(position) * static_cast<long double>(1.0 / 3.0);
  const __int128 numerator =
      static_cast<__int128>(position) * static_cast<__int128>(std::ldexp(1.0 / 3.0, 54));
  const auto whole = static_cast<long double>(static_cast<int64_t>(numerator >> 54));
  const auto part =
      static_cast<long double>(static_cast<int64_t>(numerator & ((int64_t{1} << 54) - 1))) / 0x1p54L;
  ASSERT_NEAR(static_cast<double>(high - whole), static_cast<double>(part), 0.01);
  const long double want_cos = std::cos(whole) * std::cos(part) - std::sin(whole) * std::sin(part);
  EXPECT_NEAR(static_cast<double>(cos), static_cast<double>(want_cos), 1e-7);
}

TEST(LayerOps, RopeTableAppliesTheAttentionFactor) {
  RopeFrequencies frequencies;
  frequencies.inverse = {1.0, 0.1};
  frequencies.attention_factor = 1.5;
  std::vector<float> cos(2);
  std::vector<float> sin(2);
  RopeTable(frequencies, 3, 1, cos.data(), sin.data());
  EXPECT_FLOAT_EQ(cos[0], static_cast<float>(1.5 * std::cos(3.0)));
  EXPECT_FLOAT_EQ(sin[1], static_cast<float>(1.5 * std::sin(0.3)));
}

struct SplitCase {
  int64_t tokens;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t head_dim;
  bool norm;
};

// What SplitQkv() must make of head `head` (counted over Q, then K) of one row.
std::vector<double> RotatedHead(const SplitQkvArgs& args, int64_t token, int32_t head, const float* norm) {
  const int64_t dim = args.head_dim;
  const float* x = args.qkv + (token * (args.num_q_heads + 2 * args.num_kv_heads) + head) * dim;
  std::vector<double> row(x, x + dim);
  double sum = 0;
  for (const double value : row) sum += value * value;
  const double scale =
      norm == nullptr ? 1.0
                      : 1 / std::sqrt(sum / static_cast<double>(dim) + static_cast<double>(args.epsilon));
  for (size_t i = 0; i < row.size(); ++i)
    row[i] *= scale * (norm == nullptr ? 1.0 : static_cast<double>(norm[i]));
  const size_t half = row.size() / 2;
  std::vector<double> out(row.size());
  for (size_t i = 0; i < half; ++i) {
    const auto c = static_cast<double>(args.cos[static_cast<size_t>(token) * half + i]);
    const auto s = static_cast<double>(args.sin[static_cast<size_t>(token) * half + i]);
    out[i] = row[i] * c - row[i + half] * s;
    out[i + half] = row[i + half] * c + row[i] * s;
  }
  return out;
}

void CheckSplit(const SplitCase& c, DType dtype) {
  const int32_t heads = c.q_heads + 2 * c.kv_heads;
  const auto qkv = Random(static_cast<size_t>(c.tokens * heads * c.head_dim), 5, 2);
  const auto q_norm = Random(static_cast<size_t>(c.head_dim), 6);
  const auto k_norm = Random(static_cast<size_t>(c.head_dim), 7);
  const auto cos = Random(static_cast<size_t>(c.tokens * c.head_dim / 2), 8);
  const auto sin = Random(static_cast<size_t>(c.tokens * c.head_dim / 2), 9);
  Output q(dtype, static_cast<size_t>(c.tokens * c.q_heads * c.head_dim));
  Output k(dtype, static_cast<size_t>(c.tokens * c.kv_heads * c.head_dim));
  Output v(dtype, static_cast<size_t>(c.tokens * c.kv_heads * c.head_dim));
  SplitQkvArgs args{qkv.data(),
                    c.tokens,
                    c.q_heads,
                    c.kv_heads,
                    c.head_dim,
                    c.norm ? q_norm.data() : nullptr,
                    c.norm ? k_norm.data() : nullptr,
                    1e-6f,
                    cos.data(),
                    sin.data(),
                    dtype,
                    q.data(),
                    k.data(),
                    v.data()};
  SplitQkv(args);
  EXPECT_TRUE(q.Intact() && k.Intact() && v.Intact());
  const auto got_q = q.values();
  const auto got_k = k.values();
  const auto got_v = v.values();
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int32_t h = 0; h < heads; ++h) {
      const bool is_q = h < c.q_heads;
      const bool is_v = h >= c.q_heads + c.kv_heads;
      const auto want = RotatedHead(args, t, h, is_q ? args.q_norm : args.k_norm);
      for (int32_t i = 0; i < c.head_dim; ++i) {
        const auto at = static_cast<size_t>(i);
        if (is_v) {
          const auto row =
              static_cast<size_t>((t * c.kv_heads + h - c.q_heads - c.kv_heads) * c.head_dim) + at;
          const auto from = static_cast<size_t>((t * heads + h) * c.head_dim) + at;
          ExpectNear(got_v[row], static_cast<double>(qkv[from]), ToleranceOf(dtype), 1e-6, "v");
        } else if (is_q) {
          ExpectNear(got_q[static_cast<size_t>((t * c.q_heads + h) * c.head_dim) + at], want[at],
                     ToleranceOf(dtype), 2, "q");
        } else {
          ExpectNear(got_k[static_cast<size_t>((t * c.kv_heads + h - c.q_heads) * c.head_dim) + at], want[at],
                     ToleranceOf(dtype), 2, "k");
        }
      }
    }
  }
}

TEST(LayerOps, SplitQkvMatchesDoubleLoops) {
  const SplitCase kCases[] = {{1, 1, 1, 16, false}, {1, 9, 3, 64, true},  {37, 9, 3, 64, false},
                              {13, 4, 2, 80, true}, {5, 2, 1, 256, true}, {3, 5, 5, 18, true}};
  for (const auto path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    for (const SplitCase& c : kCases) {
      for (const DType dtype : kTypes) CheckSplit(c, dtype);
    }
  }
}

TEST(LayerOps, SiluMulMatchesDoubleLoops) {
  for (const auto path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    for (const int64_t width : {1, 15, 512, 1000}) {
      const auto values = Random(static_cast<size_t>(3 * 2 * width), 4, 8);
      for (const DType in : kTypes) {
        const auto bytes = As(values, in);
        const auto wide = Widened(bytes.data(), in, values.size());
        for (const DType out_type : kTypes) {
          Output out(out_type, static_cast<size_t>(3 * width));
          SiluMul(bytes.data(), in, 3, width, out.data(), out_type);
          EXPECT_TRUE(out.Intact());
          const auto got = out.values();
          for (int64_t i = 0; i < 3; ++i) {
            for (int64_t j = 0; j < width; ++j) {
              const auto gate = static_cast<double>(wide[static_cast<size_t>(2 * i * width + j)]);
              const auto up = static_cast<double>(wide[static_cast<size_t>((2 * i + 1) * width + j)]);
              ExpectNear(got[static_cast<size_t>(i * width + j)], gate / (1 + std::exp(-gate)) * up,
                         ToleranceOf(out_type), 1e-3, "width " + std::to_string(width));
            }
          }
        }
      }
    }
  }
}

TEST(LayerOps, SiluMulHoldsAtExtremes) {
  const std::vector<float> values = {-200, 200, -88, 0, NAN, 1, 1, 1, 5, 1};
  for (const auto path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    std::vector<float> out(5);
    SiluMul(values.data(), DType::kF32, 1, 5, out.data(), DType::kF32);
    EXPECT_NEAR(out[0], 0.0, 1e-30);
    EXPECT_EQ(out[1], 200.0f);
    EXPECT_NEAR(out[2], 0.0, 1e-30);
    EXPECT_EQ(out[3], 0.0f);
    EXPECT_TRUE(std::isnan(out[4]));
  }
}

TEST(LayerOps, FindsTheFirstNonFiniteRow) {
  for (const auto path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    std::vector<float> x = Random(200 * 131, 10, 1e30f);
    EXPECT_EQ(FirstNonFiniteRow(x.data(), 200, 131), -1);
    x[199 * 131 + 130] = INFINITY;
    EXPECT_EQ(FirstNonFiniteRow(x.data(), 200, 131), 199);
    x[77 * 131] = -INFINITY;
    EXPECT_EQ(FirstNonFiniteRow(x.data(), 200, 131), 77);
    x[12 * 131 + 64] = std::numeric_limits<float>::signaling_NaN();
    EXPECT_EQ(FirstNonFiniteRow(x.data(), 200, 131), 12);
    EXPECT_EQ(FirstNonFiniteRow(x.data(), 12, 131), -1);
    EXPECT_EQ(FirstNonFiniteRow(x.data(), 0, 131), -1);
  }
}

}  // namespace
}  // namespace headwater::kernels
