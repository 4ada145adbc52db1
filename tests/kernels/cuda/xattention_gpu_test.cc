// XAttention's masks on the GPU against the double-precision reference, stage by stage.
#include "kernels/cuda/xattention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "gtest/gtest.h"

#include "kernels/reference/policies/xattention.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"
#include "tests/kernels/cuda/timing.h"
#include "tests/kernels/cuda/top_share.h"
#include "tests/kernels/policies/random_problem.h"

namespace headwater::kernels {
namespace {

constexpr double kScoreError = 1e-4, kScoreScale = 1e-6;
constexpr double kNear = 1e-5;  // of a row's mass: what lies closer may be decided either way
constexpr CudaTopShareRule kRule = CudaTopShareRule::kWithFirstAndOwn;

struct Case {
  const char* name;
  int tokens, q_heads, kv_heads, head_dim, stride;
  std::vector<double> thresholds = {0.9};
  double norm = 1;

  int Blocks() const { return (tokens + 127) / 128; }
  int Words() const { return (Blocks() + 31) / 32; }
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

struct Result {
  std::vector<uint32_t> words;
  std::vector<float> scores;
};

Result MasksOf(const Case& c, const DeviceArray<uint16_t>& q, const DeviceArray<uint16_t>& k,
               bool with_scores) {
  DeviceArray<uint32_t> words(size_t{1} * c.q_heads * c.Blocks() * c.Words());
  DeviceArray<float> scores(with_scores ? size_t{1} * c.q_heads * c.Blocks() * c.Blocks() : 0);
  CudaXAttentionArgs args{q.data(),
                          k.data(),
                          c.tokens,
                          c.q_heads,
                          c.kv_heads,
                          c.head_dim,
                          static_cast<float>(1 / std::sqrt(c.head_dim)),
                          c.stride,
                          c.norm,
                          c.thresholds.data(),
                          static_cast<int32_t>(c.thresholds.size()),
                          {words.data(), c.tokens, c.q_heads, 128},
                          with_scores ? scores.data() : nullptr};
  DeviceArray<unsigned char> workspace(CudaXAttentionWorkspaceBytes(args));
  const Status status = CudaXAttentionMasks(args, workspace.data(), workspace.size(), nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(words.Intact() && scores.Intact() && workspace.Intact());
  return {words.Host(), with_scores ? scores.Host() : std::vector<float>()};
}

// Blocks whose keys differ in length along the queries' common direction.
reference::RandomProblem Uneven(const Case& c) {
  reference::RandomProblem problem(c.tokens, c.q_heads, c.kv_heads, c.head_dim);
  for (float& value : problem.q) value += 0.7f;
  for (int token = 0; token < c.tokens; ++token) {
    for (int i = 0; i < c.kv_heads * c.head_dim; ++i) {
      problem.Key(token)[i] += static_cast<float>(token / 128 * 5 % 11) / 12;
    }
  }
  problem.q = ToFloat(ToBf16(problem.q));
  problem.k = ToFloat(ToBf16(problem.k));
  problem.Point();
  return problem;
}

// A row's bits: those of the rule on `scores`, but for what is undecided, and none past its own block.
void ExpectRow(const Case& c, const std::vector<uint32_t>& words, int head, int row,
               const std::vector<double>& scores, double near) {
  const TopShare wanted = TopShareOf(scores, c.thresholds[c.thresholds.size() == 1 ? 0 : head], kRule, near);
  const size_t first = (size_t{1} * head * c.Blocks() + row) * c.Words();
  for (int block = 0; block < c.Words() * 32; ++block) {
    if (block <= row && wanted.undecided[block]) continue;
    ASSERT_EQ(BitOf(words, first, block), block <= row && wanted.kept[block])
        << "head " << head << ", row " << row << ", block " << block;
  }
}

class XAttentionGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(XAttentionGpuTest, MatchesReferenceAndRepeats) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const reference::RandomProblem problem = Uneven(c);
  const DeviceArray<uint16_t> q(ToBf16(problem.q)), k(ToBf16(problem.k));
  reference::XAttentionParameters parameters;
  parameters.stride = c.stride;
  parameters.thresholds = c.thresholds;
  parameters.norm = c.norm;
  reference::XAttentionTrace trace;
  BlockIndex index;
  ASSERT_TRUE(reference::SelectXAttention(problem.get, parameters, &trace, &index).ok());

  const Result got = MasksOf(c, q, k, true), again = MasksOf(c, q, k, true), alone = MasksOf(c, q, k, false);

  double worst = 0;
  for (int head = 0; head < c.q_heads; ++head) {
    const std::vector<double>& wanted = trace.heads[head].scores;
    const auto first = got.scores.begin() + head * static_cast<int64_t>(wanted.size());
    worst = std::max(worst,
                     WorstError({first, first + static_cast<int64_t>(wanted.size())}, wanted, kScoreScale));
    for (int row = 0; row < c.Blocks(); ++row) {
      const std::vector<double> scores(&wanted[size_t{1} * row * c.Blocks()],
                                       &wanted[size_t{1} * row * c.Blocks()] + row + 1);
      ExpectRow(c, got.words, head, row, scores, kNear);
      const TopShare kept =
          TopShareOf(scores, c.thresholds[c.thresholds.size() == 1 ? 0 : head], kRule, kNear);
      for (int block = 0; block <= row; ++block) {  // the rule of this test is the reference's
        const auto& list = trace.heads[head].kept[row];
        ASSERT_EQ(kept.kept[block], std::binary_search(list.begin(), list.end(), block));
      }
    }
  }
  EXPECT_LE(worst, kScoreError);
  std::printf("worst error of E: %.2g\n", worst);
  EXPECT_TRUE(SameBits(got.words, again.words) && SameBits(got.words, alone.words));
  EXPECT_TRUE(SameBits(got.scores, again.scores));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, XAttentionGpuTest,
    ::testing::Values(Case{"one_token", 1, 2, 1, 128, 16}, Case{"block_less_1", 127, 3, 1, 64, 8},
                      Case{"one_block", 128, 2, 2, 128, 4}, Case{"block_plus_1", 129, 4, 1, 128, 16},
                      Case{"block_plus_1_of_4", 129, 2, 1, 64, 4}, Case{"gqa3", 1003, 6, 2, 64, 8},
                      Case{"gqa4_by_4", 1501, 4, 1, 128, 4, {0.5}},
                      Case{"gqa4_by_8", 1999, 4, 1, 128, 8, {0.95}, 0.5},
                      Case{"gqa8_by_16", 2600, 8, 1, 128, 16, {0.9, 0.1, 0, 1, 0.5, 0.7, 0.8, 0.99}},
                      Case{"mha_by_16", 4099, 2, 2, 64, 16, {0.8}, 0.3},
                      Case{"several_tiles", 9001, 1, 1, 64, 16, {0.9}, 0.3},
                      Case{"several_groups_of_tiles", 9001, 1, 1, 64, 4}),
    [](const auto& test) { return test.param.name; });

// E of one query block, by sums of anti-diagonals.
std::vector<double> ScoresOf(const Case& c, const std::vector<float>& q, const std::vector<float>& k,
                             int block) {
  std::vector<double> scores(block + 1);
  const int per_block = 128 / c.stride, strides = (c.tokens + c.stride - 1) / c.stride;
  for (int w = block * per_block; w < std::min(strides, (block + 1) * per_block); ++w) {
    std::vector<double> row;
    for (int u = 0; u <= w; ++u) {
      float sum = 0;
      for (int a = 0; a < c.stride; ++a) {
        const int query = w * c.stride + c.stride - 1 - a, key = u * c.stride + a;
        if (query >= c.tokens || key >= c.tokens) continue;
        for (int i = 0; i < c.head_dim; ++i) {
          sum += q[size_t{1} * query * c.head_dim + i] * k[size_t{1} * key * c.head_dim + i];
        }
      }
      row.push_back(std::exp(sum / (std::sqrt(c.head_dim) * c.stride * c.norm)));
    }
    double total = 0;
    for (const double x : row) total += x;
    for (int u = 0; u <= w; ++u) scores[u / per_block] += row[u] / total;
  }
  return scores;
}

// More than the workspace holds at once: rows come in strips.
TEST(XAttentionGpuTest, StripsOfALongPrompt) {
  HW_REQUIRE_SM90();
  const Case c{"", 200'000, 1, 1, 64, 4, {0.7}};
  const std::vector<float> q = RandomBf16(size_t{200'000} * 64, 1), k = RandomBf16(size_t{200'000} * 64, 2);

  const Result got = MasksOf(c, DeviceArray<uint16_t>(ToBf16(q)), DeviceArray<uint16_t>(ToBf16(k)), true);

  for (int row = 0; row < c.Blocks(); ++row) {
    const auto first = got.scores.begin() + int64_t{row} * c.Blocks();
    ASSERT_NO_FATAL_FAILURE(ExpectRow(c, got.words, 0, row, {first, first + row + 1}, 1e-12));
  }
  for (const int row : {0, 700, 790, 800, 1562}) {
    const auto first = got.scores.begin() + int64_t{row} * c.Blocks();
    EXPECT_LE(WorstError({first, first + row + 1}, ScoresOf(c, q, k, row), kScoreScale), kScoreError) << row;
  }
}

TEST(XAttentionGpuTest, NanSpoilsOnlyRowsThatSeeIt) {
  HW_REQUIRE_SM90();
  const Case c{"", 1000, 2, 1, 64, 8};
  reference::RandomProblem problem = Uneven(c);
  const DeviceArray<uint16_t> q(ToBf16(problem.q)), k(ToBf16(problem.k));
  const Result clean = MasksOf(c, q, k, true);
  problem.Key(400)[3] = std::nanf("");
  problem.Query(700, 1)[3] = INFINITY;

  const Result got =
      MasksOf(c, DeviceArray<uint16_t>(ToBf16(problem.q)), DeviceArray<uint16_t>(ToBf16(problem.k)), true);

  for (int head = 0; head < 2; ++head) {
    for (int row = 0; row < 3; ++row) {
      for (int block = 0; block < 8; ++block) {
        const int at = (head * 8 + row) * 8 + block;
        EXPECT_EQ(got.scores[at], clean.scores[at]);
      }
      EXPECT_EQ(got.words[head * 8 + row], clean.words[head * 8 + row]);
    }
    for (int row = 3; row < 8; ++row) {
      const uint32_t word = got.words[head * 8 + row];
      EXPECT_EQ(word & (1u | 1u << row), 1u | 1u << row);
      EXPECT_EQ(word >> (row + 1), 0u);
    }
  }
}

// HW_TIMING=1: 128K tokens.
TEST(XAttentionGpuTest, Timing) {
  HW_REQUIRE_SM90();
  if (std::getenv("HW_TIMING") == nullptr) GTEST_SKIP() << "HW_TIMING is not set";
  constexpr int64_t kTokens = 131072;
  const DeviceArray<uint16_t> q(size_t{kTokens} * 32 * 128), k(size_t{kTokens} * 8 * 128);
  FillRandom(q);
  FillRandom(k);
  DeviceArray<uint32_t> words(size_t{32} * 1024 * 32);
  const double threshold = 0.9;
  for (const int heads : {8, 32}) {
    for (const int stride : {4, 8, 16}) {
      const CudaXAttentionArgs args{q.data(),  k.data(),   kTokens, heads,
                                    heads / 4, 128,        0.088f,  stride,
                                    1,         &threshold, 1,       {words.data(), kTokens, heads, 128}};
      DeviceArray<unsigned char> workspace(CudaXAttentionWorkspaceBytes(args));
      PrintTime("xattention, heads " + std::to_string(heads) + ", stride " + std::to_string(stride),
                [&] { return CudaXAttentionMasks(args, workspace.data(), workspace.size(), nullptr); });
    }
  }
}

}  // namespace
}  // namespace headwater::kernels
