// The tail profile on the GPU against FlexPrefill's reference, and against loops where that has no such case.
#include "kernels/cuda/policies/tail_profile.h"

#include <cmath>

#include "gtest/gtest.h"

#include "kernels/reference/policies/flex.h"
#include "tests/kernels/cuda/flex_problem.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {
namespace {

constexpr double kTiny = 1e-7;  // errors are relative to the entry and this

struct Case {
  const char* name;
  int tokens, q_heads, kv_heads, head_dim;
  int rows = 128;
  float strength = 1;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

struct Profile {
  std::vector<float> vertical, slash, vertical_sums, slash_sums;
};

Profile ProfileOf(const FlexProblem& problem, int rows, float factor) {
  const size_t heads = static_cast<size_t>(problem.problem.num_q_heads);
  const size_t tokens = heads * problem.problem.num_tokens, blocks = heads * problem.Blocks();
  DeviceArray<float> vertical(tokens), slash(tokens), vertical_sums(blocks), slash_sums(blocks);
  auto args = problem.Of<CudaTailProfileArgs>();
  args.k = problem.dk.data();
  args.rows = rows;
  args.factor = factor;
  args.vertical = vertical.data();
  args.slash = slash.data();
  args.vertical_sums = vertical_sums.data();
  args.slash_sums = slash_sums.data();
  DeviceArray<unsigned char> workspace(CudaTailProfileWorkspaceBytes(args));
  const Status status = CudaTailProfile(args, workspace.data(), workspace.size(), nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(vertical.Intact() && slash.Intact() && vertical_sums.Intact() && slash_sums.Intact() &&
              workspace.Intact());
  return {vertical.Host(), slash.Host(), vertical_sums.Host(), slash_sums.Host()};
}

std::vector<float> Row(const std::vector<float>& x, size_t row, size_t length) {
  return {x.begin() + row * length, x.begin() + (row + 1) * length};
}

std::vector<double> Sums(const std::vector<double>& x) {
  std::vector<double> sums((x.size() + 127) / 128);
  for (size_t i = 0; i < x.size(); ++i) sums[i / 128] += x[i];
  return sums;
}

// Sums over the last rows, times factor.
void Loops(const reference::PolicyProblem& p, int head, int rows, double factor,
           std::vector<double>* vertical, std::vector<double>* slash) {
  vertical->assign(p.num_tokens, 0);
  slash->assign(p.num_tokens, 0);
  for (int64_t token = p.num_tokens - rows; token < p.num_tokens; ++token) {
    std::vector<double> x(token + 1);
    double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j <= token; ++j) {
      for (int i = 0; i < p.head_dim; ++i) x[j] += double{p.Q(token, head)[i]} * p.K(j, head)[i];
      top = std::max(top, x[j] *= p.softmax_scale);
    }
    for (double& value : x) sum += value = std::exp(value - top);
    for (int64_t j = 0; j <= token; ++j) {
      (*vertical)[j] += factor * x[j] / sum;
      (*slash)[p.num_tokens - 1 - token + j] += factor * x[j] / sum;
    }
  }
}

class TailProfileGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(TailProfileGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const FlexProblem problem(c.tokens, c.q_heads, c.kv_heads, c.head_dim, c.strength);
  const int rows = std::min(c.rows, c.tokens);
  reference::FlexParameters parameters;
  parameters.block_tokens = c.rows;

  const Profile got = ProfileOf(problem, rows, 1.0f / static_cast<float>(rows));

  const auto blocks = static_cast<size_t>(problem.Blocks());
  const double error = problem.ScoreError();
  for (int h = 0; h < c.q_heads; ++h) {
    const reference::FlexHead want = reference::flex::ScoreHead(problem.problem, parameters, h);
    EXPECT_LE(WorstError(Row(got.vertical, h, c.tokens), want.vertical, kTiny), error) << "head " << h;
    EXPECT_LE(WorstError(Row(got.slash, h, c.tokens), want.slash, kTiny), error) << "head " << h;
    EXPECT_LE(WorstError(Row(got.vertical_sums, h, blocks), Sums(want.vertical), kTiny), error);
    EXPECT_LE(WorstError(Row(got.slash_sums, h, blocks), Sums(want.slash), kTiny), error);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, TailProfileGpuTest,
                         ::testing::Values(Case{"one_token", 1, 2, 1, 128}, Case{"five_tokens", 5, 2, 1, 64},
                                           Case{"block_less_1", 127, 3, 3, 128},
                                           Case{"block", 128, 3, 1, 128}, Case{"block_plus_1", 129, 4, 1, 64},
                                           Case{"ragged", 3001, 8, 2, 128}, Case{"mha_d64", 2100, 2, 2, 64},
                                           Case{"gqa8", 1500, 8, 1, 128}, Case{"gqa3", 1025, 6, 2, 128},
                                           Case{"rows_64", 2049, 4, 2, 128, 64},
                                           Case{"rows_64_few", 100, 4, 2, 128, 64},
                                           Case{"rows_16", 700, 2, 1, 64, 16},
                                           Case{"peaked", 1999, 4, 2, 128, 128, 4}),
                         [](const auto& test) { return test.param.name; });

// Sums of a number of rows that no tile of 16 ends at, over chunks of 256 and of 512 keys.
TEST(TailProfileGpuTest, SumsOfAnyNumberOfRows) {
  HW_REQUIRE_SM90();
  constexpr int kRows = 77;
  for (const int tokens : {33'001, 70'001}) {
    const FlexProblem problem(tokens, 32, 4, 64);

    const Profile got = ProfileOf(problem, kRows, 1);

    const double error = problem.ScoreError();
    for (const int head : {0, 31}) {
      std::vector<double> vertical, slash;
      Loops(problem.problem, head, kRows, 1, &vertical, &slash);
      EXPECT_LE(WorstError(Row(got.vertical, head, tokens), vertical, kTiny * kRows), error);
      EXPECT_LE(WorstError(Row(got.slash, head, tokens), slash, kTiny * kRows), error);
    }
  }
}

TEST(TailProfileGpuTest, EqualCallsGiveEqualBits) {
  HW_REQUIRE_SM90();
  const FlexProblem problem(20'001, 8, 2, 128);

  const Profile first = ProfileOf(problem, 128, 1), second = ProfileOf(problem, 128, 1);

  EXPECT_TRUE(SameBits(first.vertical, second.vertical) && SameBits(first.slash, second.slash));
  EXPECT_TRUE(SameBits(first.vertical_sums, second.vertical_sums));
  EXPECT_TRUE(SameBits(first.slash_sums, second.slash_sums));
}

TEST(TailProfileGpuTest, NanInAKeySpoilsItsHeadsOnly) {
  HW_REQUIRE_SM90();
  constexpr int kTokens = 1000;
  FlexProblem problem(kTokens, 4, 2, 64);
  const Profile clean = ProfileOf(problem, 128, 1);
  const uint16_t nan = 0x7FC0;
  ASSERT_EQ(cudaMemcpy(problem.dk.data() + 300 * 128, &nan, 2, cudaMemcpyHostToDevice), cudaSuccess);

  const Profile spoilt = ProfileOf(problem, 128, 1);

  EXPECT_TRUE(std::isnan(spoilt.vertical[300]));
  for (size_t i = 2 * kTokens; i < clean.vertical.size(); ++i) {
    ASSERT_EQ(spoilt.vertical[i], clean.vertical[i]);
    ASSERT_EQ(spoilt.slash[i], clean.slash[i]);
  }
}

}  // namespace
}  // namespace headwater::kernels
