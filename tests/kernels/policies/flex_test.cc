// FlexPrefill's reference: its stages against other ways to compute them, patterns that are planted, and
// cases small enough to be worked out by hand.
#include "kernels/reference/policies/flex.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace headwater::kernels::reference {
namespace {

using ::testing::Contains;
using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::Pointwise;

struct Prompt {
  Prompt(int64_t tokens, int32_t q_heads, int32_t kv_heads, int32_t dim)
      : q(tokens * q_heads * dim), k(tokens * kv_heads * dim) {
    problem = {q.data(), k.data(), nullptr, tokens, q_heads, kv_heads, dim, 1 / std::sqrt(double(dim))};
  }
  Prompt(const Prompt&) = delete;

  void Randomize(uint32_t seed, float size) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& x : q) x = size * normal(random);
    for (float& x : k) x = size * normal(random);
  }
  float* Q(int64_t token, int32_t head) {
    return &q[(token * problem.num_q_heads + head) * problem.head_dim];
  }
  float* K(int64_t token, int32_t kv_head) {
    return &k[(token * problem.num_kv_heads + kv_head) * problem.head_dim];
  }

  std::vector<float> q, k;
  PolicyProblem problem;
};

FlexParameters Small(int32_t block = 16) {
  FlexParameters parameters;
  parameters.block_tokens = block;
  parameters.min_budget_tokens = 1;
  return parameters;
}

struct Selected {
  FlexTrace trace;
  BlockIndex index;
};

Selected Select(const Prompt& prompt, const FlexParameters& parameters) {
  Selected s;
  const Status status = FlexSelect(prompt.problem, parameters, &s.trace, &s.index);
  EXPECT_TRUE(status.ok()) << status.message();
  const Status valid = ValidateBlockIndex(s.index);
  EXPECT_TRUE(valid.ok()) << valid.message();
  return s;
}

using Blocks = std::set<FlexBlock>;

Blocks Listed(const BlockIndex& index, int32_t list) {
  Blocks blocks;
  for (int64_t tile = 0; tile < index.num_q_tiles; ++tile) {
    const int64_t row = index.Row(list, tile);
    for (int64_t i = index.offsets[row]; i < index.offsets[row + 1]; ++i) {
      blocks.insert({static_cast<int32_t>(tile), index.blocks[i]});
    }
  }
  return blocks;
}

// The whole causal attention matrix of a head, one dot product an entry, in long double.
std::vector<std::vector<double>> FullAttention(const Prompt& prompt, int32_t head, double scale) {
  const PolicyProblem& p = prompt.problem;
  const int32_t kv_head = head * p.num_kv_heads / p.num_q_heads;
  std::vector<std::vector<double>> a(p.num_tokens, std::vector<double>(p.num_tokens));
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    long double sum = 0;
    std::vector<long double> e(i + 1);
    for (int64_t j = 0; j <= i; ++j) {
      long double dot = 0;
      for (int32_t x = 0; x < p.head_dim; ++x) {
        dot += static_cast<long double>(prompt.q[(i * p.num_q_heads + head) * p.head_dim + x]) *
               prompt.k[(j * p.num_kv_heads + kv_head) * p.head_dim + x];
      }
      e[j] = std::exp(dot * scale);
      sum += e[j];
    }
    for (int64_t j = 0; j <= i; ++j) a[i][j] = static_cast<double>(e[j] / sum);
  }
  return a;
}

// The smallest m such that the m largest entries come over `share`.
int64_t CoverByTaking(std::vector<double> x, double share) {
  int64_t taken = 0;
  double sum = 0;
  while (true) {
    const auto top = std::max_element(x.begin(), x.end());
    if (top == x.end()) return taken + 1;
    sum += *top;
    x.erase(top);
    ++taken;
    if (sum > share) return taken;
  }
}

// Of n: the forced one, then those with fewer than n - 1 others above them.
bool AmongBest(const std::vector<double>& scores, int64_t index, int64_t n, int64_t forced) {
  int64_t above = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
    above += i != forced && scores[i] > scores[index] ? 1 : 0;
  }
  return index == forced || above < n - 1;
}

// Everything about one head, from the whole matrix.
void CheckHead(const Prompt& prompt, const FlexParameters& parameters, const Selected& s, int32_t head) {
  const PolicyProblem& p = prompt.problem;
  const int64_t n = p.num_tokens, b = parameters.block_tokens, nb = (n + b - 1) / b;
  const auto rows = static_cast<double>(b);
  const auto a = FullAttention(prompt, head, p.softmax_scale);
  std::vector<double> vertical(n), slash(n), v(nb), d(nb);
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t i = n - b; i < n; ++i) {
      vertical[c] += a[i][c] / rows;
      const int64_t j = i - (n - 1 - c);
      if (j >= 0) slash[c] += a[i][j] / rows;
    }
    v[c / b] += vertical[c];
    d[c / b] += slash[c];
  }
  const FlexHead& h = s.trace.heads[head];
  EXPECT_THAT(h.vertical, Pointwise(DoubleNear(1e-12), vertical));
  EXPECT_THAT(h.slash, Pointwise(DoubleNear(1e-12), slash));
  EXPECT_THAT(h.column_scores, Pointwise(DoubleNear(1e-12), v));
  EXPECT_THAT(h.slash_scores, Pointwise(DoubleNear(1e-12), d));
  EXPECT_EQ(h.vertical_cover, CoverByTaking(vertical, parameters.gamma));
  EXPECT_EQ(h.slash_cover, CoverByTaking(slash, parameters.gamma));
  EXPECT_EQ(h.n_v, std::min(nb, h.vertical_cover / b + 1));
  EXPECT_EQ(h.n_s, std::min(nb, h.slash_cover / b + 1));

  std::vector<double> pooled(nb);  // the mean of scores is the score of means
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = n - b; i < n; ++i) {
      for (int32_t x = 0; x < p.head_dim; ++x) {
        pooled[j / b] += static_cast<double>(p.Q(i, head)[x]) * p.K(j, head)[x] * p.softmax_scale / rows /
                         static_cast<double>(std::min(b, n - j / b * b));
      }
    }
  }
  double sum = 0;
  for (const double x : pooled) sum += std::exp(x);
  for (double& x : pooled) x = std::exp(x) / sum;
  EXPECT_THAT(h.pooled, Pointwise(DoubleNear(1e-12), pooled));

  Blocks expected;
  for (int32_t i = 0; i < nb; ++i) {
    for (int32_t j = 0; j <= i; ++j) {
      if (AmongBest(v, j, h.n_v, 0) || AmongBest(d, nb - 1 - (i - j), h.n_s, nb - 1)) expected.insert({i, j});
    }
  }
  EXPECT_EQ(Listed(s.index, head), expected);
}

TEST(FlexTest, StagesAgreeWithTheWholeAttentionMatrix) {
  for (const int64_t tokens : {33, 47, 48, 160, 203}) {
    Prompt prompt(tokens, 4, 2, 8);
    prompt.Randomize(static_cast<uint32_t>(tokens), 1.6f);
    FlexParameters parameters = Small();
    parameters.gamma = 0.7;
    parameters.tau = 0;
    parameters.compat.count_by_128 = false;
    const Selected s = Select(prompt, parameters);
    ASSERT_EQ(s.trace.heads.size(), 4u);
    EXPECT_EQ(s.index.num_lists, 4);
    for (int32_t head = 0; head < 4; ++head) {
      SCOPED_TRACE(std::to_string(tokens) + " tokens, head " + std::to_string(head));
      CheckHead(prompt, parameters, s, head);
    }
  }
}

TEST(FlexTest, StagesAgreeAt128TokensABlock) {
  Prompt prompt(7 * 128 + 41, 2, 1, 4);
  prompt.Randomize(1, 2.0f);
  FlexParameters parameters = Small(128);
  parameters.gamma = 0.6;
  parameters.tau = 0;
  const Selected s = Select(prompt, parameters);
  for (int32_t head = 0; head < 2; ++head) CheckHead(prompt, parameters, s, head);
  EXPECT_LT(CountBlocks(s.index).selected, CountBlocks(s.index).possible);
}

TEST(FlexTest, CoverByHand) {
  EXPECT_EQ(flex::Cover({0.5, 0.25, 0.125, 0.125}, 0.4), 1);
  EXPECT_EQ(flex::Cover({0.125, 0.5, 0.125, 0.25}, 0.5), 2);  // a sum of exactly the share counts
  EXPECT_EQ(flex::Cover({0.125, 0.5, 0.125, 0.25}, 0.8), 3);
  EXPECT_EQ(flex::Cover({0.125, 0.5, 0.125, 0.25}, 0.875), 4);
  EXPECT_EQ(flex::Cover({1}, 0.9), 1);
}

TEST(FlexTest, JsDistanceByHand) {
  EXPECT_NEAR(flex::JsDistance({0.5, 0.5}, {0.9, 0.1}, true), 0.3189817, 1e-6);
  EXPECT_NEAR(flex::JsDistance({0.9, 0.1}, {0.5, 0.5}, true), 0.3189817, 1e-6);
  EXPECT_EQ(flex::JsDistance({0.3, 0.3, 0.4}, {0.3, 0.3, 0.4}, true), 0);
  EXPECT_NEAR(flex::JsDistance({1, 0}, {0, 1}, false), std::sqrt(std::log(2)), 1e-15);
  EXPECT_TRUE(std::isnan(flex::JsDistance({1, 0}, {0, 1}, true)));
  EXPECT_TRUE(std::isnan(flex::JsDistance({0.5, 0.5}, {1, 1e-46}, true)));  // zero in f32
  EXPECT_FALSE(std::isnan(flex::JsDistance({0.5, 0.5}, {1, 2e-45}, true)));
}

// Key 85, in block 5, draws all queries.
TEST(FlexTest, FindsAColumn) {
  Prompt prompt(160, 1, 1, 8);
  prompt.Randomize(2, 0.2f);
  for (int64_t i = 0; i < 160; ++i) prompt.Q(i, 0)[0] = 8;
  prompt.K(85, 0)[0] = 8;
  const Selected s = Select(prompt, Small());
  // cover() is one key, yet n_v is 1 and column 0 takes it: the budget has to leave room.
  EXPECT_EQ(s.trace.heads[0].vertical_cover, 1);
  EXPECT_THAT(s.trace.heads[0].columns, ElementsAre(0));
  FlexParameters two = Small();
  two.min_budget_tokens = 17;
  const Selected found = Select(prompt, two);
  EXPECT_THAT(found.trace.heads[0].columns, ElementsAre(0, 5));
  for (int32_t row = 5; row < 10; ++row) EXPECT_THAT(Listed(found.index, 0), Contains(FlexBlock(row, 5)));
}

// Query i looks for key i - 53: three blocks and five tokens back.
TEST(FlexTest, FindsADiagonalAndOnlyItsOwnBlockOffset) {
  Prompt prompt(160, 1, 1, 64);
  prompt.Randomize(3, 1);
  for (int64_t i = 53; i < 160; ++i) {
    for (int32_t x = 0; x < 64; ++x) prompt.Q(i, 0)[x] = 3 * prompt.K(i - 53, 0)[x];
  }
  FlexParameters two = Small();
  two.min_budget_tokens = 32;
  const Selected s = Select(prompt, two);
  EXPECT_GT(s.trace.heads[0].slash[159 - 53], 0.9);
  EXPECT_THAT(s.trace.heads[0].offsets, ElementsAre(0, 3));
  const Blocks listed = Listed(s.index, 0);
  EXPECT_THAT(listed, Contains(FlexBlock(8, 5)));
  for (int32_t row = 6; row < 9; ++row) EXPECT_THAT(listed, Not(Contains(FlexBlock(row, row - 4))));
}

// A prompt of 10 blocks and 3 tokens: the groups of distances end at token N - 1, not at a block boundary.
TEST(FlexTest, GroupsOfDistancesStartAtEntryZero) {
  Prompt prompt(163, 1, 1, 64);
  prompt.Randomize(4, 1);
  for (int64_t i = 34; i < 163; ++i) {  // distance 34 is entry 128 of slash, the first of group 8 of 11
    for (int32_t x = 0; x < 64; ++x) prompt.Q(i, 0)[x] = 3 * prompt.K(i - 34, 0)[x];
  }
  FlexParameters two = Small();
  two.min_budget_tokens = 32;
  EXPECT_THAT(Select(prompt, two).trace.heads[0].offsets, ElementsAre(0, 2));

  for (int64_t i = 35; i < 163; ++i) {  // distance 35 is the last of group 7, hence offset 3
    for (int32_t x = 0; x < 64; ++x) prompt.Q(i, 0)[x] = 3 * prompt.K(i - 35, 0)[x];
  }
  EXPECT_THAT(Select(prompt, two).trace.heads[0].offsets, ElementsAre(0, 3));
}

// The representative queries are the last 16 tokens: in 35 tokens 19 to 34, of blocks 1 and 2.
TEST(FlexTest, TheLastTokensStandForAllQueriesNotTheLastBlock) {
  Prompt prompt(35, 1, 1, 1);
  for (int64_t i = 0; i < 35; ++i) prompt.Q(i, 0)[0] = i < 19 ? 5.0f : i < 32 ? 3.0f : 0.0f;
  for (int64_t j = 0; j < 16; ++j) prompt.K(j, 0)[0] = 1;
  const Selected s = Select(prompt, Small());
  const double mean = 3 * 13 / 16.0;
  EXPECT_NEAR(s.trace.heads[0].pooled[0], std::exp(mean) / (std::exp(mean) + 2), 1e-12);
  EXPECT_NEAR(s.trace.heads[0].pooled[2], 1 / (std::exp(mean) + 2), 1e-12);
}

// Pooled rows are (1), (1, 2) / 3 and (1, 2, 4) / 7; their best come first over all rows.
struct ByHand : Prompt {
  ByHand() : Prompt(48, 1, 1, 1) {
    for (int64_t i = 0; i < 48; ++i) {
      const int64_t block = i / 16;
      Q(i, 0)[0] = 1;
      K(i, 0)[0] = std::log(2.0f) * static_cast<float>(block);
    }
    parameters = Small();
    parameters.tau = 1;
  }
  FlexParameters parameters;
};

TEST(FlexTest, QueryAwareBudgetIsSpentOverAllRows) {
  ByHand hand;
  hand.parameters.gamma = 0.9;  // 2.7 of 3
  Selected s = Select(hand, hand.parameters);
  ASSERT_TRUE(s.trace.heads[0].query_aware);
  EXPECT_THAT(s.trace.heads[0].pooled_blocks,
              ElementsAre(FlexBlock(0, 0), FlexBlock(1, 1), FlexBlock(2, 2), FlexBlock(1, 0)));
  // Row 2 gets column 0 and its own block from the forced ones, and not (2, 1).
  EXPECT_EQ(Listed(s.index, 0), (Blocks{{0, 0}, {1, 0}, {1, 1}, {2, 0}, {2, 2}}));

  hand.parameters.gamma = 0.97;  // 2.91: (2, 1) comes in at 2.857
  s = Select(hand, hand.parameters);
  EXPECT_THAT(s.trace.heads[0].pooled_blocks, Contains(FlexBlock(2, 1)));
  EXPECT_THAT(Listed(s.index, 0), Contains(FlexBlock(2, 1)));

  hand.parameters.gamma = 0.5;  // 1.5: the second would make 1.67
  EXPECT_THAT(Select(hand, hand.parameters).trace.heads[0].pooled_blocks, ElementsAre(FlexBlock(0, 0)));
}

TEST(FlexTest, QueryAwareHeadsTakeTheSmallestBudget) {
  ByHand hand;
  hand.parameters.gamma = 0.9;
  hand.parameters.compat.count_by_128 = false;
  Selected s = Select(hand, hand.parameters);
  EXPECT_EQ(s.trace.heads[0].n_v, 1);
  EXPECT_EQ(s.trace.heads[0].n_s, 1);
  hand.parameters.tau = 0;
  s = Select(hand, hand.parameters);
  EXPECT_FALSE(s.trace.heads[0].query_aware);
  EXPECT_EQ(s.trace.heads[0].n_v, 3);
  EXPECT_THAT(s.trace.heads[0].pooled_blocks, IsEmpty());
}

// Row 6 alone attends to block 3, which the last rows do not: only the pooled map shows it.
TEST(FlexTest, QueryAwareHeadsFindABlockOfOneRow) {
  Prompt prompt(160, 1, 1, 2);
  for (int64_t i = 96; i < 112; ++i) prompt.Q(i, 0)[0] = 6;
  for (int64_t j = 48; j < 64; ++j) prompt.K(j, 0)[0] = 6;
  FlexParameters parameters = Small();
  parameters.gamma = 0.3;
  const Selected s = Select(prompt, parameters);
  ASSERT_TRUE(s.trace.heads[0].query_aware) << s.trace.heads[0].js_distance;
  EXPECT_THAT(Listed(s.index, 0), Contains(FlexBlock(6, 3)));
  parameters.tau = 0;
  EXPECT_THAT(Listed(Select(prompt, parameters).index, 0), Not(Contains(FlexBlock(6, 3))));
}

// The last queries shut block 1 out by more than f32 has.
TEST(FlexTest, NanRuleMakesAHeadVerticalSlash) {
  Prompt prompt(48, 1, 1, 1);
  for (int64_t i = 0; i < 48; ++i) prompt.Q(i, 0)[0] = 1;
  for (int64_t j = 16; j < 32; ++j) prompt.K(j, 0)[0] = -120;
  Selected s = Select(prompt, Small());
  EXPECT_TRUE(std::isnan(s.trace.heads[0].js_distance));
  EXPECT_FALSE(s.trace.heads[0].query_aware);
  FlexParameters fixed = Small();
  fixed.tau = 0.2;
  fixed.compat.nan_rule = false;
  s = Select(prompt, fixed);
  EXPECT_TRUE(s.trace.heads[0].query_aware) << s.trace.heads[0].js_distance;
}

TEST(FlexTest, CompatSwitches) {
  Prompt prompt(160, 1, 1, 16);
  prompt.Randomize(5, 1.5f);
  prompt.problem.softmax_scale = 0.01;
  FlexParameters parameters = Small();
  parameters.tau = 0;
  const FlexHead by_128 = Select(prompt, parameters).trace.heads[0];
  EXPECT_EQ(by_128.n_v, by_128.vertical_cover / 128 + 1);
  parameters.compat.count_by_128 = false;
  const FlexHead by_block = Select(prompt, parameters).trace.heads[0];
  EXPECT_EQ(by_block.n_v, by_block.vertical_cover / 16 + 1);
  EXPECT_NE(by_block.n_v, by_128.n_v);
  parameters.compat.scale_of_head_dim = false;  // nearly uniform: 0.9 of the keys
  EXPECT_GT(Select(prompt, parameters).trace.heads[0].vertical_cover, 120);
  EXPECT_LT(by_block.vertical_cover, 120);
}

TEST(FlexTest, BudgetsAreRoundedUpToBlocksAndTheLargestWins) {
  Prompt prompt(160, 1, 1, 16);
  FlexParameters parameters = Small();
  parameters.tau = 0;
  parameters.min_budget_tokens = 33;
  EXPECT_EQ(Select(prompt, parameters).trace.heads[0].n_v, 3);
  parameters.max_budget_tokens = 17;
  EXPECT_EQ(Select(prompt, parameters).trace.heads[0].n_s, 2);
  parameters.tau = 1;
  EXPECT_EQ(Select(prompt, parameters).trace.heads[0].n_s, 3);
}

TEST(FlexTest, OfEqualScoresTheLowerColumnAndTheSmallerOffset) {
  FlexHead head;
  head.column_scores = {0.1, 0.2, 0.3, 0.2, 0.2};
  head.slash_scores = {0.2, 0.3, 0.2, 0.2, 0.1};
  head.n_v = head.n_s = 4;
  flex::ChooseColumnsAndOffsets(&head);
  EXPECT_THAT(head.columns, ElementsAre(0, 2, 1, 3));
  EXPECT_THAT(head.offsets, ElementsAre(0, 3, 1, 2));
  head.n_v = 9;
  head.n_s = 1;
  flex::ChooseColumnsAndOffsets(&head);
  EXPECT_THAT(head.columns, ElementsAre(0, 2, 1, 3, 4));
  EXPECT_THAT(head.offsets, ElementsAre(0));
}

TEST(FlexTest, ShortPromptsAreDense) {
  const auto dense = [](int64_t tokens, const FlexParameters& parameters) {
    Prompt prompt(tokens, 2, 1, 2);
    const Selected s = Select(prompt, parameters);
    EXPECT_EQ(s.index.num_lists, 2);
    EXPECT_EQ(s.index.num_q_tiles, (tokens + parameters.block_tokens - 1) / parameters.block_tokens);
    EXPECT_EQ(s.trace.heads.empty(), s.trace.dense);
    for (const uint8_t flag : s.index.dense) EXPECT_EQ(flag != 0, s.trace.dense);
    return s.trace.dense;
  };
  EXPECT_TRUE(dense(1, Small()));
  EXPECT_TRUE(dense(32, Small()));
  EXPECT_FALSE(dense(33, Small()));
  EXPECT_TRUE(dense(256, Small(128)));
  EXPECT_FALSE(dense(257, Small(128)));
  EXPECT_TRUE(dense(1024, FlexParameters{}));
  EXPECT_FALSE(dense(1025, FlexParameters{}));
  FlexParameters odd = Small();
  odd.min_budget_tokens = 49;  // 64
  EXPECT_TRUE(dense(64, odd));
  EXPECT_FALSE(dense(65, odd));
}

// Head h has the pattern of KV head h / 2: column 3 under the first, column 6 under the second.
TEST(FlexTest, QueryHeadsReadTheKvHeadOfTheirGroup) {
  Prompt prompt(160, 4, 2, 4);
  for (float& x : prompt.q) x = 4;
  prompt.K(50, 0)[1] = 9;
  prompt.K(100, 1)[1] = 9;
  FlexParameters two = Small();
  two.min_budget_tokens = 32;
  two.tau = 0;
  const Selected s = Select(prompt, two);
  for (int32_t head = 0; head < 4; ++head) {
    EXPECT_THAT(s.trace.heads[head].columns, ElementsAre(0, head < 2 ? 3 : 6)) << head;
  }
}

TEST(FlexTest, RefusesWhatIsOutOfRange) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto refused = [](const std::function<void(Prompt*, FlexParameters*)>& change) {
    Prompt prompt(48, 2, 1, 2);
    FlexParameters parameters = Small();
    change(&prompt, &parameters);
    BlockIndex index;
    index.num_lists = 77;
    FlexTrace trace;
    trace.dense = true;
    const Status status = FlexSelect(prompt.problem, parameters, &trace, &index);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_TRUE(index.num_lists == 77 && trace.dense);
    return status.message();
  };
  using P = FlexParameters;
  EXPECT_EQ(refused([](Prompt*, P* p) { p->gamma = 0; }), "gamma 0 is not over 0 and below 1");
  EXPECT_EQ(refused([](Prompt*, P* p) { p->gamma = 1; }), "gamma 1 is not over 0 and below 1");
  EXPECT_THAT(refused([&](Prompt*, P* p) { p->gamma = nan; }), HasSubstr("gamma nan"));
  EXPECT_EQ(refused([](Prompt*, P* p) { p->tau = 1.5; }), "tau 1.5 is not from 0 to 1");
  EXPECT_THAT(refused([&](Prompt*, P* p) { p->tau = nan; }), HasSubstr("tau nan"));
  EXPECT_THAT(refused([](Prompt*, P* p) { p->min_budget_tokens = 0; }), HasSubstr("min_budget_tokens 0"));
  EXPECT_THAT(refused([](Prompt*, P* p) { p->max_budget_tokens = -1; }), HasSubstr("max_budget_tokens -1"));
  EXPECT_THAT(refused([](Prompt*, P* p) { p->max_budget_tokens = int64_t{1} << 31; }),
              HasSubstr("max_budget_tokens 2147483648 is not from 0 to 2147483647"));
  EXPECT_EQ(refused([](Prompt*, P* p) { p->block_tokens = 48; }), "block_tokens 48 is not 16, 32, 64 or 128");
  EXPECT_THAT(refused([](Prompt* a, P*) { a->problem.num_tokens = 0; }), HasSubstr("num_tokens 0"));
  EXPECT_THAT(refused([](Prompt* a, P*) { a->problem.num_kv_heads = 3; }), HasSubstr("num_kv_heads 3"));
  EXPECT_THAT(refused([](Prompt* a, P*) { a->problem.head_dim = 65537; }), HasSubstr("head_dim 65537"));
  EXPECT_THAT(refused([](Prompt* a, P*) { a->problem.softmax_scale = 0; }), HasSubstr("softmax_scale 0"));
  EXPECT_EQ(refused([](Prompt* a, P*) { a->problem.k = nullptr; }), "q or k is null");
  EXPECT_THAT(refused([](Prompt* a, P*) { a->q.back() = NAN; }), HasSubstr("q of token"));
  EXPECT_THAT(refused([](Prompt* a, P*) { a->k.back() = INFINITY; }), HasSubstr("k of token"));
}

TEST(FlexTest, TheTraceIsOptional) {
  ByHand hand;
  BlockIndex index;
  EXPECT_TRUE(FlexSelect(hand.problem, hand.parameters, nullptr, &index).ok());
  EXPECT_TRUE(ValidateBlockIndex(index).ok());
}

}  // namespace
}  // namespace headwater::kernels::reference
