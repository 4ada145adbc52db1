// The split of a fused QKV projection on the GPU: against the double-precision reference, and its statistics
// against the standalone kernel's.
#include <cmath>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/layer_ops.h"
#include "kernels/reference/layer_ops.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"
#include "tests/kernels/cuda/stats_arrays.h"

namespace headwater::kernels {
namespace {

constexpr float kEpsilon = 1e-5f;

enum class Norm { kNone, kBf16, kF32 };

struct Case {
  const char* name;
  int q_heads, kv_heads, head_dim, tokens;
  Norm norm = Norm::kNone;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// cos and sin of some angle per token and pair.
struct Angles {
  std::vector<float> cos, sin;

  Angles(int tokens, int half) {
    for (int token = 0; token < tokens; ++token) {
      for (int i = 0; i < half; ++i) {
        const double angle = token * std::pow(10000.0, -static_cast<double>(i) / half);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
};

struct Problem {
  Case c;
  size_t kv_elements;
  std::vector<float> qkv, q_norm, k_norm;
  Angles angles;
  DeviceArray<uint16_t> dqkv, q, k, v, dq_norm, dk_norm;
  DeviceArray<float> cos, sin, dq_norm_f32, dk_norm_f32;

  explicit Problem(const Case& test_case, float spoil = 0)
      : c(test_case),
        kv_elements(static_cast<size_t>(c.tokens) * c.kv_heads * c.head_dim),
        qkv(RandomBf16(static_cast<size_t>(c.tokens) * (c.q_heads + 2 * c.kv_heads) * c.head_dim, 1)),
        q_norm(RandomBf16(c.head_dim, 2)),
        k_norm(RandomBf16(c.head_dim, 3)),
        angles(c.tokens, c.head_dim / 2),
        dqkv(ToBf16(Spoil(qkv, spoil))),
        q(static_cast<size_t>(c.tokens) * c.q_heads * c.head_dim),
        k(kv_elements),
        v(kv_elements),
        dq_norm(ToBf16(q_norm)),
        dk_norm(ToBf16(k_norm)),
        cos(angles.cos),
        sin(angles.sin),
        dq_norm_f32(q_norm),
        dk_norm_f32(k_norm) {}

  // A value for token 5: of query head 1, the first of K's heads and the last of V's.
  std::vector<float>& Spoil(std::vector<float>& x, float value) const {
    if (value == 0) return x;
    float* const row = x.data() + size_t{5} * (c.q_heads + 2 * c.kv_heads) * c.head_dim;
    row[c.head_dim + 3] = row[c.q_heads * c.head_dim + 4] = value;
    row[(c.q_heads + 2 * c.kv_heads) * c.head_dim - 1] = value;
    return x;
  }

  CudaSplitQkvArgs Args() const {
    CudaSplitQkvArgs args;
    args.qkv = dqkv.data();
    args.num_tokens = c.tokens;
    args.num_q_heads = c.q_heads;
    args.num_kv_heads = c.kv_heads;
    args.head_dim = c.head_dim;
    args.epsilon = kEpsilon;
    if (c.norm != Norm::kNone) {
      const bool wide = c.norm == Norm::kF32;
      args.norm_dtype = wide ? DType::kF32 : DType::kBF16;
      args.q_norm = wide ? static_cast<void*>(dq_norm_f32.data()) : dq_norm.data();
      args.k_norm = wide ? static_cast<void*>(dk_norm_f32.data()) : dk_norm.data();
    }
    args.cos = cos.data();
    args.sin = sin.data();
    args.q = q.data();
    args.k = k.data();
    args.v = v.data();
    return args;
  }

  reference::Qkv Reference() const {
    reference::SplitQkvArgs args;
    args.qkv = qkv.data();
    args.num_tokens = c.tokens;
    args.num_q_heads = c.q_heads;
    args.num_kv_heads = c.kv_heads;
    args.head_dim = c.head_dim;
    args.q_norm = c.norm == Norm::kNone ? nullptr : q_norm.data();
    args.k_norm = c.norm == Norm::kNone ? nullptr : k_norm.data();
    args.epsilon = kEpsilon;
    args.cos = angles.cos.data();
    args.sin = angles.sin.data();
    return reference::SplitQkv(args);
  }

  CudaBlockStatsArgs StandaloneArgs(const StatsArrays& arrays) const {
    return {k.data(), v.data(), c.tokens, c.kv_heads, c.head_dim, 0, arrays.Views()};
  }
};

void Execute(const CudaSplitQkvArgs& args) {
  const Status status = CudaSplitQkv(args, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

class CudaSplitQkvGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaSplitQkvGpuTest, MatchesReferenceAndStandaloneStatistics) {
  HW_REQUIRE_SM90();
  const Problem problem(GetParam());
  const Case& c = problem.c;
  const StatsArrays fused(c.tokens, c.kv_heads, c.head_dim), standalone(c.tokens, c.kv_heads, c.head_dim);
  CudaSplitQkvArgs args = problem.Args();
  args.stats = fused.Views();

  Execute(args);

  const reference::Qkv want = problem.Reference();
  EXPECT_LE(WorstError(ToFloat(problem.q.Host()), want.q, 0.1), kBf16Error);
  EXPECT_LE(WorstError(ToFloat(problem.k.Host()), want.k, 0.1), kBf16Error);
  EXPECT_LE(WorstError(ToFloat(problem.v.Host()), want.v, 0), 0);
  EXPECT_TRUE(problem.q.Intact() && problem.k.Intact() && problem.v.Intact());
  ASSERT_TRUE(CudaBlockStatistics(problem.StandaloneArgs(standalone), nullptr).ok());
  fused.ExpectSameBits(standalone);
  EXPECT_TRUE(fused.Intact());
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaSplitQkvGpuTest,
    ::testing::Values(Case{"one_token", 8, 2, 128, 1}, Case{"block_minus_1", 8, 2, 128, 127},
                      Case{"block", 8, 2, 128, 128}, Case{"block_plus_1", 8, 2, 128, 129},
                      Case{"ragged", 8, 2, 128, 8191}, Case{"mha", 3, 3, 128, 300},
                      Case{"gqa3", 9, 3, 64, 300}, Case{"gqa5", 5, 1, 128, 300}, Case{"gqa7", 7, 1, 64, 300},
                      Case{"gqa8", 16, 2, 128, 300}, Case{"one_token_64", 8, 2, 64, 1, Norm::kBf16},
                      Case{"block_minus_1_64", 8, 2, 64, 127}, Case{"block_plus_1_64", 8, 2, 64, 129},
                      Case{"ragged_64", 4, 1, 64, 8191}, Case{"norm", 8, 2, 128, 300, Norm::kBf16},
                      Case{"norm_f32", 8, 2, 128, 300, Norm::kF32},
                      Case{"norm_64", 14, 2, 64, 300, Norm::kF32}),
    [](const auto& test) { return test.param.name; });

// A chunk writes the blocks behind the ones before it, and equal calls give equal bits with or without
// statistics.
TEST(CudaSplitQkvGpuTest, ChunksAppendTheirBlocks) {
  HW_REQUIRE_SM90();
  const Case c{"", 8, 2, 128, 1000, Norm::kBf16};
  const Problem whole(c), chunked(c);
  const StatsArrays all(c.tokens, c.kv_heads, c.head_dim), parts(c.tokens, c.kv_heads, c.head_dim);
  CudaSplitQkvArgs args = whole.Args();
  args.stats = all.Views();
  Execute(args);

  for (const auto& [begin, end] : {std::pair(0, 384), std::pair(384, 512), std::pair(512, 1000)}) {
    args = chunked.Args();
    args.num_tokens = end - begin;
    args.qkv = chunked.dqkv.data() + size_t{12} * 128 * begin;
    args.cos += 64 * begin;
    args.sin += 64 * begin;
    args.q = chunked.q.data() + size_t{8} * 128 * begin;
    args.k = chunked.k.data() + size_t{2} * 128 * begin;
    args.v = chunked.v.data() + size_t{2} * 128 * begin;
    args.stats = parts.Views();
    args.first_token = begin;
    Execute(args);
  }

  parts.ExpectSameBits(all);
  EXPECT_TRUE(parts.Intact());
  EXPECT_TRUE(SameBits(chunked.q.Host(), whole.q.Host()));
  Execute(chunked.Args());
  EXPECT_TRUE(SameBits(chunked.k.Host(), whole.k.Host()));
  EXPECT_TRUE(SameBits(chunked.v.Host(), whole.v.Host()));
}

TEST(CudaSplitQkvGpuTest, OneStatisticAlone) {
  HW_REQUIRE_SM90();
  const Problem problem({"", 8, 2, 64, 300});
  const StatsArrays all(300, 2, 64), one(300, 2, 64);
  CudaSplitQkvArgs args = problem.Args();
  args.stats = all.Views();
  Execute(args);
  args.stats = {};
  args.stats.v_max_norm = one.narrow(3).data();

  Execute(args);

  EXPECT_TRUE(SameBits(one.narrow(3).Host(), all.narrow(3).Host()));
  EXPECT_TRUE(std::isnan(one.narrow(2).Host()[0]) && std::isnan(one.wide(0).Host()[0]));
}

TEST(CudaSplitQkvGpuTest, NanStaysInItsHead) {
  HW_REQUIRE_SM90();
  for (const Norm norm : {Norm::kNone, Norm::kBf16}) {
    const Problem problem({"", 8, 2, 128, 300, norm}, std::nanf(""));

    Execute(problem.Args());

    // The reference's NaNs, no more and no fewer.
    const reference::Qkv want = problem.Reference();
    EXPECT_TRUE(std::isnan(want.q[(5 * 8 + 1) * 128 + 3]) && !std::isnan(want.q[(5 * 8 + 2) * 128 + 3]));
    EXPECT_LE(WorstError(ToFloat(problem.q.Host()), want.q, 0.1), kBf16Error);
    EXPECT_LE(WorstError(ToFloat(problem.k.Host()), want.k, 0.1), kBf16Error);
    EXPECT_LE(WorstError(ToFloat(problem.v.Host()), want.v, 0), 0);
  }
}

// Over 2^31 elements in and out: the first and the last tokens, NaN patterns between them.
TEST(CudaSplitQkvGpuTest, LargeArraysAreAddressedInFull) {
  HW_REQUIRE_SM90();
  const Case c{"", 32, 8, 64, 200};
  const Problem ends(c);
  constexpr int64_t kTokens = 1'100'003, kFirst = kTokens - 200;
  const size_t row = size_t{48} * 64, q_row = size_t{32} * 64, kv_row = size_t{8} * 64;
  static_assert(kTokens * 32 * 64 > int64_t{1} << 31);
  const DeviceArray<uint16_t> qkv(kTokens * row), q(kTokens * q_row), k(kTokens * kv_row),
      v(kTokens * kv_row);
  const DeviceArray<float> cos(size_t{kTokens} * 32), sin(size_t{kTokens} * 32);
  const auto put = [](const auto& from, auto* to) {
    ASSERT_EQ(cudaMemcpy(to, from.data(), from.Bytes(), cudaMemcpyDeviceToDevice), cudaSuccess);
  };
  for (const int64_t at : {int64_t{0}, kFirst}) {
    put(ends.dqkv, qkv.data() + at * row);
    put(ends.cos, cos.data() + at * 32);
    put(ends.sin, sin.data() + at * 32);
  }
  CudaSplitQkvArgs args = ends.Args();
  Execute(args);
  args.qkv = qkv.data();
  args.num_tokens = kTokens;
  args.cos = cos.data();
  args.sin = sin.data();
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  StatsArrays stats(kTokens, 8, 64);
  args.stats = stats.Views();

  Execute(args);

  const auto same = [](const auto& array, size_t offset, const DeviceArray<uint16_t>& want) {
    std::vector<uint16_t> got(want.size());
    EXPECT_EQ(cudaMemcpy(got.data(), array.data() + offset, want.Bytes(), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return SameBits(got, want.Host());
  };
  for (const int64_t at : {int64_t{0}, kFirst}) {
    EXPECT_TRUE(same(q, at * q_row, ends.q));
    EXPECT_TRUE(same(k, at * kv_row, ends.k));
    EXPECT_TRUE(same(v, at * kv_row, ends.v));
  }
  const StatsArrays standalone(kTokens, 8, 64);
  ASSERT_TRUE(CudaBlockStatistics({k.data(), v.data(), kTokens, 8, 64, 0, standalone.Views()}, nullptr).ok());
  stats.ExpectSameBits(standalone);
  // The last block has the last tokens only.
  EXPECT_FALSE(std::isnan(stats.wide(0).Host().back()));
  EXPECT_TRUE(q.Intact() && k.Intact() && v.Intact() && stats.Intact());
}

}  // namespace
}  // namespace headwater::kernels
