// FlexPrefill's stages on the GPU, each against the reference's of what the GPU's stage before gave.
#include "kernels/cuda/policies/flex_stages.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <set>

#include "gtest/gtest.h"

#include "kernels/cuda/block_stats.h"
#include "kernels/reference/policies/flex.h"
#include "tests/kernels/cuda/flex_problem.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {
namespace {

using reference::FlexBlock;
using reference::FlexHead;
using reference::FlexParameters;
using reference::flex::BlockSet;

struct KeyMeans {
  explicit KeyMeans(const FlexProblem& problem)
      : values(
            static_cast<size_t>(problem.Blocks() * problem.problem.num_kv_heads * problem.problem.head_dim)) {
    CudaBlockStats stats;
    stats.k_mean = values.data();
    const reference::PolicyProblem& p = problem.problem;
    EXPECT_TRUE(CudaBlockStatistics(
                    {problem.dk.data(), nullptr, p.num_tokens, p.num_kv_heads, p.head_dim, 0, stats}, nullptr)
                    .ok());
  }
  DeviceArray<float> values;
};

// --- budgets ---

struct BudgetCase {
  const char* name;
  int tokens, q_heads, kv_heads, head_dim;
  double tau = 0.1;
  bool nan_rule = true;
  int64_t min_blocks = 2, max_blocks = INT32_MAX;
  float strength = 1;
};

std::ostream& operator<<(std::ostream& out, const BudgetCase& c) { return out << c.name; }

struct Budgets {
  std::vector<float> pooled, js_distance;
  std::vector<uint8_t> query_aware;
  std::vector<int32_t> budgets;
};

Budgets BudgetsOf(const BudgetCase& c, const FlexProblem& problem, const std::vector<float>& columns,
                  const std::vector<int64_t>& covers) {
  const auto heads = static_cast<size_t>(c.q_heads);
  const KeyMeans k_mean(problem);
  DeviceArray<float> dcolumns(columns), pooled(columns.size()), js(heads);
  DeviceArray<int64_t> dcovers(covers);
  DeviceArray<uint8_t> aware(heads);
  DeviceArray<int32_t> budgets(2 * heads);
  auto args = problem.Of<CudaFlexBudgetsArgs>();
  args.k_mean = k_mean.values.data();
  args.column_scores = dcolumns.data();
  args.covers = dcovers.data();
  args.tau = c.tau;
  args.nan_rule = c.nan_rule;
  args.min_blocks = c.min_blocks;
  args.max_blocks = c.max_blocks;
  args.pooled = pooled.data();
  args.js_distance = js.data();
  args.query_aware = aware.data();
  args.budgets = budgets.data();
  const Status status = CudaFlexBudgets(args, nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(pooled.Intact() && js.Intact() && aware.Intact() && budgets.Intact());
  return {pooled.Host(), js.Host(), aware.Host(), budgets.Host()};
}

class FlexBudgetsGpuTest : public ::testing::TestWithParam<BudgetCase> {};

TEST_P(FlexBudgetsGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const BudgetCase& c = GetParam();
  const FlexProblem problem(c.tokens, c.q_heads, c.kv_heads, c.head_dim, c.strength);
  const auto blocks = static_cast<size_t>(problem.Blocks());
  FlexParameters parameters;
  parameters.compat.nan_rule = c.nan_rule;
  std::vector<FlexHead> want;
  std::vector<float> columns;
  std::vector<int64_t> covers(2 * c.q_heads);
  for (int h = 0; h < c.q_heads; ++h) {
    want.push_back(reference::flex::ScoreHead(problem.problem, parameters, h));
    columns.insert(columns.end(), want[h].column_scores.begin(), want[h].column_scores.end());
    covers[h] = want[h].vertical_cover;
    covers[c.q_heads + h] = want[h].slash_cover + 128 * h;
  }

  const Budgets got = BudgetsOf(c, problem, columns, covers), again = BudgetsOf(c, problem, columns, covers);

  EXPECT_TRUE(SameBits(got.pooled, again.pooled) && SameBits(got.js_distance, again.js_distance));
  const int64_t most = std::min<int64_t>(c.max_blocks, problem.Blocks());
  const double error = problem.ScoreError();
  for (int h = 0; h < c.q_heads; ++h) {
    const std::vector<float> pooled(got.pooled.begin() + h * blocks, got.pooled.begin() + (h + 1) * blocks);
    EXPECT_LE(WorstError(pooled, want[h].pooled, 1e-7), error) << "head " << h;
    const double js =
        reference::flex::JsDistance(Doubles(pooled, 0, blocks), Doubles(columns, h, blocks), c.nan_rule);
    if (std::isnan(js)) {
      EXPECT_TRUE(std::isnan(got.js_distance[h])) << "head " << h;
    } else {
      EXPECT_NEAR(got.js_distance[h], js, 1e-6) << "head " << h;
      EXPECT_NEAR(got.js_distance[h], want[h].js_distance, 1e-4) << "head " << h;
    }
    ASSERT_EQ(got.query_aware[h], js < c.tau ? 1 : 0) << js;
    for (int kind = 0; kind < 2; ++kind) {
      const int64_t own = std::min(std::max(covers[kind * c.q_heads + h] / 128 + 1, c.min_blocks), most);
      const int64_t budget = js < c.tau ? std::min(c.min_blocks, problem.Blocks()) : own;
      EXPECT_EQ(got.budgets[kind * c.q_heads + h], budget);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, FlexBudgetsGpuTest,
    ::testing::Values(BudgetCase{"one_token", 1, 1, 1, 128}, BudgetCase{"block_less_1", 127, 2, 2, 64},
                      BudgetCase{"block", 128, 2, 1, 128}, BudgetCase{"block_plus_1", 129, 3, 1, 64},
                      BudgetCase{"ragged", 5003, 8, 2, 128}, BudgetCase{"gqa8_d64", 2000, 8, 1, 64},
                      BudgetCase{"all_query_aware", 3000, 4, 2, 128, 1, false},
                      BudgetCase{"none_query_aware", 3000, 4, 2, 128, 0},
                      BudgetCase{"capped", 5003, 4, 2, 128, 0.1, true, 8, 3},
                      BudgetCase{"min_over_all", 3000, 4, 2, 128, 0.1, true, 100},
                      BudgetCase{"noise", 4000, 4, 2, 64, 0.1, true, 2, INT32_MAX, 0},
                      BudgetCase{"zeros_in_f32", 3000, 4, 2, 128, 1, true, 2, INT32_MAX, 12},
                      BudgetCase{"zeros_allowed", 3000, 4, 2, 128, 1, false, 2, INT32_MAX, 12}),
    [](const auto& test) { return test.param.name; });

// --- columns, offsets and masks ---

struct Chosen {
  std::vector<uint32_t> bits, masks;
};

Chosen Choose(const std::vector<float>& scores, const std::vector<int32_t>& budgets, int heads,
              int64_t tokens) {
  const int64_t blocks = (tokens + 127) / 128, words = (blocks + 31) / 32;
  DeviceArray<float> dscores(scores);
  DeviceArray<int32_t> dbudgets(budgets);
  DeviceArray<uint32_t> bits(static_cast<size_t>(2 * heads * words)), masks(heads * blocks * words);
  Status status = CudaFlexTop({dscores.data(), dbudgets.data(), blocks, heads, bits.data()}, nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  status = CudaFlexMasks(bits.data(), {masks.data(), tokens, heads, 128}, nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(bits.Intact() && masks.Intact());
  return {bits.Host(), masks.Host()};
}

std::vector<uint32_t> Words(const BlockSet& set) {
  const int64_t blocks = set.num_blocks(), words = (blocks + 31) / 32;
  std::vector<uint32_t> bits(blocks * words);
  for (int64_t i = 0; i < blocks; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      if (set.Has(i, j)) bits[i * words + j / 32] |= 1u << (j % 32);
    }
  }
  return bits;
}

TEST(FlexTopGpuTest, MatchesReferenceWithTies) {
  HW_REQUIRE_SM90();
  constexpr int kHeads = 9;
  std::mt19937 random(3);
  for (const int64_t blocks : {1, 2, 31, 32, 33, 100, 1024, 1500, 2049}) {
    std::vector<float> scores(2 * kHeads * blocks);
    std::vector<int32_t> budgets(2 * kHeads);
    for (int row = 0; row < 2 * kHeads; ++row) {
      for (int64_t i = 0; i < blocks; ++i) {
        const auto value = static_cast<float>(random() % 1000) / 1000.0f;
        const float few[] = {value * value / 50, std::floor(value * 4) / 8, 0.0f};
        scores[row * blocks + i] = few[row % 3];
      }
      const int64_t some[] = {1, 2, blocks / 2, blocks - 1, blocks, 3 * blocks};
      budgets[row] = static_cast<int32_t>(std::max<int64_t>(1, some[random() % 6]));
    }

    const Chosen got = Choose(scores, budgets, kHeads, blocks * 128 - 5);

    const size_t size = got.masks.size() / kHeads;
    for (int h = 0; h < kHeads; ++h) {
      FlexHead head;
      head.column_scores = Doubles(scores, h, blocks);
      head.slash_scores = Doubles(scores, kHeads + h, blocks);
      head.n_v = budgets[h];
      head.n_s = budgets[kHeads + h];
      reference::flex::ChooseColumnsAndOffsets(&head);
      BlockSet set(blocks);
      set.Add(head.columns, head.offsets);
      const std::vector<uint32_t> masks(got.masks.begin() + h * size, got.masks.begin() + (h + 1) * size);
      ASSERT_EQ(masks, Words(set)) << blocks << " blocks, head " << h << ", budgets " << head.n_v << " "
                                   << head.n_s;
      const int64_t words = (blocks + 31) / 32;
      for (int64_t i = 0; i < blocks; ++i) {
        const auto has = [&](int64_t row) { return (got.bits[row * words + i / 32] >> (i % 32) & 1) != 0; };
        const auto among = [](const std::vector<int32_t>& list, int64_t x) {
          return std::find(list.begin(), list.end(), x) != list.end();
        };
        ASSERT_EQ(has(h), among(head.columns, i));
        ASSERT_EQ(has(kHeads + h), among(head.offsets, blocks - 1 - i));
      }
    }
  }
}

TEST(FlexTopGpuTest, NanAndInfinity) {
  HW_REQUIRE_SM90();
  constexpr int64_t kBlocks = 300;
  std::vector<float> scores(2 * kBlocks, std::nanf(""));
  scores[kBlocks + 7] = INFINITY;

  const Chosen got = Choose(scores, {20, 2}, 1, kBlocks * 128);

  EXPECT_EQ(got.bits[0], (1u << 20) - 1);  // all count as equal
  EXPECT_EQ(got.bits[10], 1u << 7);
  EXPECT_EQ(got.bits[10 + 299 / 32], 1u << (299 % 32));
}

// --- the pooled map ---

struct PooledCase {
  const char* name;
  int tokens, q_heads, kv_heads, head_dim;
  double gamma = 0.9;
  float strength = 1;
  int64_t map_bytes = int64_t{256} << 20;
};

std::ostream& operator<<(std::ostream& out, const PooledCase& c) { return out << c.name; }

// Adds to masks of which every head has `before` in each word.
std::vector<uint32_t> AddPooled(const PooledCase& c, const FlexProblem& problem,
                                const std::vector<uint8_t>& aware, uint32_t before) {
  const int64_t blocks = problem.Blocks(), words = (blocks + 31) / 32;
  const KeyMeans k_mean(problem);
  DeviceArray<uint32_t> masks(std::vector<uint32_t>(c.q_heads * blocks * words, before));
  DeviceArray<uint8_t> daware(aware);
  auto args = problem.Of<CudaFlexPooledArgs>();
  args.k_mean = k_mean.values.data();
  args.query_aware = daware.data();
  args.gamma = c.gamma;
  args.masks = {masks.data(), c.tokens, c.q_heads, 128};
  args.map_bytes = c.map_bytes;
  DeviceArray<unsigned char> workspace(CudaFlexPooledWorkspaceBytes(args));
  const Status status = CudaFlexPooled(args, workspace.data(), workspace.size(), nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(masks.Intact() && workspace.Intact());
  return masks.Host();
}

// Of the running sum, as a share of the number of blocks: what lies this close to gamma may go either way.
constexpr double kNear = 1e-5;

std::set<FlexBlock> Best(const FlexProblem& problem, double gamma, int head) {
  FlexParameters parameters;
  parameters.gamma = gamma;
  const std::vector<FlexBlock> blocks = reference::flex::ChoosePooled(problem.problem, parameters, head);
  return {blocks.begin(), blocks.end()};
}

class FlexPooledGpuTest : public ::testing::TestWithParam<PooledCase> {};

TEST_P(FlexPooledGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const PooledCase& c = GetParam();
  const FlexProblem problem(c.tokens, c.q_heads, c.kv_heads, c.head_dim, c.strength);
  std::vector<uint8_t> aware(c.q_heads);
  for (int h = 0; h < c.q_heads; ++h) aware[h] = c.q_heads == 1 || h % 3 != 1 ? 1 : 0;

  const std::vector<uint32_t> got = AddPooled(c, problem, aware, 0), again = AddPooled(c, problem, aware, 0);

  EXPECT_EQ(got, again);
  const int64_t blocks = problem.Blocks(), words = (blocks + 31) / 32;
  for (int h = 0; h < c.q_heads; ++h) {
    const std::set<FlexBlock> must = Best(problem, c.gamma - kNear, h),
                              may = Best(problem, c.gamma + kNear, h);
    for (int64_t i = 0; i < blocks; ++i) {
      for (int64_t j = 0; j < 32 * words; ++j) {
        const bool has = (got[(h * blocks + i) * words + j / 32] >> (j % 32) & 1) != 0;
        const FlexBlock block(static_cast<int32_t>(i), static_cast<int32_t>(j));
        if (aware[h] == 0 || has) {
          ASSERT_EQ(has, aware[h] != 0 && may.count(block) != 0) << "head " << h << " " << i << " " << j;
        } else {
          ASSERT_EQ(must.count(block), 0u) << "head " << h << " " << i << " " << j;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, FlexPooledGpuTest,
    ::testing::Values(PooledCase{"one_token", 1, 1, 1, 128}, PooledCase{"block_less_1", 127, 2, 2, 64},
                      PooledCase{"block_plus_1", 129, 3, 1, 128}, PooledCase{"ragged", 5003, 6, 2, 128},
                      PooledCase{"gqa8_d64", 9001, 8, 1, 64}, PooledCase{"gqa4", 8192, 4, 1, 128, 0.5},
                      PooledCase{"most", 5003, 3, 1, 64, 0.999}, PooledCase{"noise", 8200, 2, 1, 128, 0.9, 0},
                      PooledCase{"groups_of_heads", 5003, 9, 3, 64, 0.9, 1, 10'000},
                      PooledCase{"heads_one_by_one", 3001, 7, 1, 64, 0.9, 1, 1},
                      PooledCase{"large", 40'001, 2, 1, 64}),
    [](const auto& test) { return test.param.name; });

// Queries of zeros: row I has I + 1 shares of 1 / (I + 1). Rows 0 to 21 fit, and 11 of the 23 shares of row
// 22.
TEST(FlexPooledGpuTest, OfEqualSharesTheFirstAreTaken) {
  HW_REQUIRE_SM90();
  const PooledCase c{"", 25 * 128, 2, 1, 64};
  FlexProblem problem(c.tokens, c.q_heads, c.kv_heads, c.head_dim);
  ASSERT_EQ(cudaMemset(problem.dq.data(), 0, problem.dq.Bytes()), cudaSuccess);

  const std::vector<uint32_t> got = AddPooled(c, problem, {0, 1}, 1u << 31);

  for (uint32_t i = 0; i < 25; ++i) {
    EXPECT_EQ(got[i], 1u << 31);
    const uint32_t row = i < 22 ? (1u << (i + 1)) - 1 : i == 22 ? (1u << 11) - 1 : 0;
    EXPECT_EQ(got[25 + i], 1u << 31 | row) << "row " << i;
  }
}

TEST(FlexPooledGpuTest, NanLeavesOtherHeadsAsTheyAre) {
  HW_REQUIRE_SM90();
  const PooledCase c{"", 3001, 2, 2, 64};
  FlexProblem problem(c.tokens, c.q_heads, c.kv_heads, c.head_dim);
  const std::vector<uint32_t> clean = AddPooled(c, problem, {1, 1}, 0);
  const uint16_t nan = 0x7FC0;
  ASSERT_EQ(cudaMemcpy(problem.dk.data() + 300 * 128, &nan, 2, cudaMemcpyHostToDevice), cudaSuccess);

  const std::vector<uint32_t> spoilt = AddPooled(c, problem, {1, 1}, 0);

  EXPECT_TRUE(std::equal(clean.begin() + 24, clean.end(), spoilt.begin() + 24));
}

}  // namespace
}  // namespace headwater::kernels
