// SharePrefill's reference: pivots over layers, the gates of sharing, and the average attention of a pivot
// against the whole attention matrix.
#include "kernels/reference/policies/share.h"

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
using ::testing::Not;
using ::testing::Pointwise;

constexpr int64_t kBlock = 16;

// Heads of one layer; K is one head of noise, and all query heads read it.
struct LayerInput {
  LayerInput(int64_t num_tokens, int32_t heads, uint32_t seed)
      : tokens(num_tokens), q(num_tokens * heads * kDim), k(num_tokens * kDim) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& x : k) x = normal(random);
    for (float& x : q) x = 0.1f * normal(random);
    problem = {q.data(), k.data(), nullptr, num_tokens, heads, 1, kDim, 1 / std::sqrt(double{kDim})};
  }
  LayerInput(const LayerInput&) = delete;

  // Queries from `first` on look for the key `distance` before them.
  void LookBack(int32_t head, int64_t distance, int64_t first = 0, float strength = 2) {
    for (int64_t i = std::max(first, distance); i < tokens; ++i) Look(i, head, i - distance, strength);
  }
  // All queries look for one key.
  void LookAt(int32_t head, int64_t key, float strength = 2) {
    for (int64_t i = 0; i < tokens; ++i) Look(i, head, key, strength);
  }
  void Look(int64_t i, int32_t head, int64_t key, float strength) {
    for (int32_t x = 0; x < kDim; ++x) {
      q[(i * problem.num_q_heads + head) * kDim + x] += strength * k[key * kDim + x];
    }
  }

  static constexpr int32_t kDim = 32;
  int64_t tokens;
  std::vector<float> q, k;
  PolicyProblem problem;
};

ShareParameters Small() {
  ShareParameters parameters;
  parameters.block_tokens = static_cast<int32_t>(kBlock);
  parameters.min_budget_tokens = 1;
  parameters.query_aware = 0;  // no head is
  return parameters;
}

// All heads of layers 0 to 2 in cluster 7, which shares.
ShareClusters OneCluster(int32_t heads) {
  ShareClusters clusters;
  for (int32_t layer = 0; layer < 3; ++layer) {
    for (int32_t head = 0; head < heads; ++head) clusters.cluster_of[{layer, head}] = 7;
  }
  clusters.shareable = {7};
  return clusters;
}

ShareLayer Select(const LayerInput& input, const ShareParameters& parameters, const ShareClusters& clusters,
                  int32_t layer, ShareState* state) {
  ShareLayer s;
  const Status status = ShareSelect(input.problem, parameters, clusters, layer, state, &s);
  EXPECT_TRUE(status.ok()) << status.message();
  const Status valid = ValidateBlockIndex(s.index);
  EXPECT_TRUE(valid.ok()) << valid.message();
  EXPECT_EQ(s.index.num_lists, input.problem.num_q_heads);
  EXPECT_EQ(s.index.q_tile_tokens, parameters.block_tokens);
  EXPECT_EQ(s.index.k_block_tokens, parameters.block_tokens);
  return s;
}

using Blocks = std::set<FlexBlock>;

Blocks Listed(const BlockIndex& index, int32_t list) {
  Blocks blocks;
  for (int64_t tile = 0; tile < index.num_q_tiles; ++tile) {
    const int64_t row = index.Row(list, tile);
    EXPECT_EQ(index.dense[row], 0);
    for (int64_t i = index.offsets[row]; i < index.offsets[row + 1]; ++i) {
      blocks.insert({static_cast<int32_t>(tile), index.blocks[i]});
    }
  }
  return blocks;
}

bool IsDense(const BlockIndex& index, int32_t list) {
  bool dense = true;
  for (int64_t tile = 0; tile < index.num_q_tiles; ++tile) {
    dense = dense && index.dense[index.Row(list, tile)] != 0;
  }
  return dense;
}

// What FlexPrefill would list for a head with these counts.
Blocks OwnBlocks(const FlexHead& scored, int64_t n_v, int64_t n_s) {
  FlexHead head = scored;
  head.n_v = n_v;
  head.n_s = n_s;
  flex::ChooseColumnsAndOffsets(&head);
  Blocks blocks;
  for (int32_t row = 0; row < static_cast<int32_t>(head.column_scores.size()); ++row) {
    for (const int32_t column : head.columns) {
      if (column <= row) blocks.insert({row, column});
    }
    for (const int32_t offset : head.offsets) {
      if (offset <= row) blocks.insert({row, row - offset});
    }
  }
  return blocks;
}

// The mean attention of block I on block J, from the whole matrix.
std::vector<double> AverageByMatrix(const PolicyProblem& p, int32_t head, int64_t b) {
  const int64_t n = p.num_tokens, nb = (n + b - 1) / b;
  std::vector<double> average(nb * nb);
  for (int64_t row = 0; row < nb; ++row) {
    const int64_t end = std::min(n, (row + 1) * b);
    for (int64_t i = row * b; i < end; ++i) {
      std::vector<long double> e(i + 1);
      long double all = 0;
      for (int64_t j = 0; j <= i; ++j) {
        long double dot = 0;
        for (int32_t x = 0; x < p.head_dim; ++x)
          dot += p.Q(i, head)[x] * static_cast<double>(p.K(j, head)[x]);
        all += e[j] = std::exp(dot * p.softmax_scale);
      }
      for (int64_t column = 0; column <= row; ++column) {
        long double mass = 0;
        for (int64_t j = column * b; j < std::min(i + 1, (column + 1) * b); ++j) mass += e[j] / all;
        average[row * nb + column] += static_cast<double>(mass / static_cast<long double>(end - row * b));
      }
    }
  }
  return average;
}

// Head 0 in two layers: queries of blocks 4 and 5 look back 45 tokens, the last ones do not, so that nothing
// of it is in the last row and only a pivot's attention shows it.
struct HiddenPattern {
  HiddenPattern() : first(203, 1, 1), second(203, 1, 2) {
    for (LayerInput* input : {&first, &second}) {
      for (int64_t i = 4 * kBlock; i < 6 * kBlock; ++i) input->Look(i, 0, i - 45, 3);
      input->LookBack(0, 0, 6 * kBlock, 0.7f);
    }
  }
  LayerInput first, second;
  ShareParameters parameters = [] {
    ShareParameters p = Small();
    p.max_budget_tokens = 2 * kBlock;  // or the noise of the first rows would take all blocks
    p.fallback = 1;
    return p;
  }();
};

TEST(ShareTest, APivotIsDenseAndAHeadLikeItInALaterLayerTakesItsPattern) {
  const HiddenPattern pattern;
  ShareState state;
  const ShareLayer pivot = Select(pattern.first, pattern.parameters, OneCluster(1), 0, &state);
  EXPECT_EQ(pivot.heads[0].role, ShareRole::kPivot) << pivot.heads[0].why;
  EXPECT_TRUE(IsDense(pivot.index, 0));

  const ShareLayer sharer = Select(pattern.second, pattern.parameters, OneCluster(1), 1, &state);
  const ShareHead& head = sharer.heads[0];
  ASSERT_EQ(head.role, ShareRole::kShared) << head.why;
  EXPECT_EQ(head.pivot_layer, 0);
  EXPECT_EQ(head.pivot_head, 0);
  EXPECT_EQ(head.flex.n_v, 1);
  EXPECT_EQ(head.flex.n_s, 1);
  const Blocks listed = Listed(sharer.index, 0);
  EXPECT_THAT(listed, Contains(FlexBlock(5, 2)));
  // Its own columns and offsets would not have had that block.
  ShareState none;
  ShareParameters alone = pattern.parameters;
  alone.similarity = 0;
  Select(pattern.first, alone, OneCluster(1), 0, &none);
  const ShareLayer own = Select(pattern.second, alone, OneCluster(1), 1, &none);
  EXPECT_EQ(own.heads[0].role, ShareRole::kOwn);
  EXPECT_THAT(Listed(own.index, 0), Not(Contains(FlexBlock(5, 2))));

  // The pattern: of each row of the pivot's average the fewest blocks that reach gamma.
  const int64_t nb = (203 + kBlock - 1) / kBlock;
  const auto average = AverageByMatrix(pattern.first.problem, 0, kBlock);
  EXPECT_THAT(state.pivots.at(7).average, Pointwise(DoubleNear(1e-12), average));
  Blocks expected = OwnBlocks(head.flex, 1, 1);
  for (int32_t row = 0; row < nb; ++row) {
    for (int32_t column = 0; column <= row; ++column) {
      double above = 0;  // what is taken before it
      for (int32_t other = 0; other <= row; ++other) {
        if (average[row * nb + other] > average[row * nb + column]) above += average[row * nb + other];
      }
      if (above < 0.9) expected.insert({row, column});
    }
  }
  EXPECT_EQ(listed, expected);
  EXPECT_LT(listed.size(), static_cast<size_t>(nb * (nb + 1) / 2));
}

TEST(ShareTest, AHeadUnlikeThePivotKeepsItsOwn) {
  LayerInput first(160, 1, 1), column(160, 1, 2), diagonal(160, 1, 3), alike(160, 1, 4);
  first.LookBack(0, 0, 0, 1);
  column.LookAt(0, 60, 3);
  diagonal.LookBack(0, 70, 0, 3);
  alike.LookBack(0, 0, 0, 1);
  ShareState state;
  ShareParameters parameters = Small();
  parameters.fallback = 1;
  parameters.compat.nan_rule = false;
  Select(first, parameters, OneCluster(1), 0, &state);
  ShareState copy = state;
  ShareLayer s = Select(alike, parameters, OneCluster(1), 1, &copy);
  EXPECT_EQ(s.heads[0].role, ShareRole::kShared) << s.heads[0].why;
  for (const LayerInput* unlike : {&column, &diagonal}) {
    copy = state;
    s = Select(*unlike, parameters, OneCluster(1), 1, &copy);
    const ShareHead& head = s.heads[0];
    EXPECT_EQ(head.role, ShareRole::kOwn);
    EXPECT_THAT(head.why, HasSubstr("distance"));
    EXPECT_EQ(head.pivot_head, 0);
    EXPECT_GE(std::max(head.vertical_distance, head.slash_distance), 0.5);
    EXPECT_EQ(Listed(s.index, 0), OwnBlocks(head.flex, head.flex.n_v, head.flex.n_s));
  }
}

// Both distances must be below, each for itself.
TEST(ShareTest, TheSlashDistanceIsAGateOfItsOwn) {
  LayerInput first(160, 1, 1), second(160, 1, 2);
  // The last queries all look into block 5, at equal keys or at equal distances.
  first.LookAt(0, 88, 3);
  second.LookBack(0, 63, 0, 3);
  ShareState state;
  ShareParameters parameters = Small();
  parameters.fallback = 1;
  parameters.similarity = 0.35;
  parameters.compat.nan_rule = false;
  Select(first, parameters, OneCluster(1), 0, &state);
  const ShareLayer s = Select(second, parameters, OneCluster(1), 1, &state);
  EXPECT_LT(s.heads[0].vertical_distance, 0.35);
  EXPECT_GE(s.heads[0].slash_distance, 0.35);
  EXPECT_EQ(s.heads[0].role, ShareRole::kOwn);
  EXPECT_THAT(s.heads[0].why, HasSubstr("slash distance"));
}

TEST(ShareTest, TheNanRuleHoldsForPivotsToo) {
  LayerInput first(160, 1, 1), second(160, 1, 1);
  for (LayerInput* input : {&first, &second}) input->LookBack(0, 0, 0, 60);  // all else is zero in f32
  for (const bool nan_rule : {true, false}) {
    ShareParameters parameters = Small();
    parameters.fallback = 1;
    parameters.compat.nan_rule = nan_rule;
    ShareState state;
    Select(first, parameters, OneCluster(1), 0, &state);
    const ShareLayer s = Select(second, parameters, OneCluster(1), 1, &state);
    EXPECT_EQ(std::isnan(s.heads[0].vertical_distance), nan_rule);
    // Its own diagonal holds all of the pivot, so that without the rule the next gate is shut.
    EXPECT_THAT(s.heads[0].why, HasSubstr(nan_rule ? "vertical distance nan is not below 0.5" : "ratio 1.0"));
  }
}

TEST(ShareTest, APivotOfThisLayerIsNotReady) {
  LayerInput first(160, 3, 1), second(160, 3, 2);
  ShareParameters parameters = Small();
  parameters.fallback = 1;
  parameters.max_budget_tokens = 2 * kBlock;  // or noise would take all blocks
  ShareClusters clusters = OneCluster(3);
  clusters.cluster_of[{0, 1}] = 8;  // does not share
  clusters.cluster_of.erase({1, 1});
  ShareState state;
  ShareLayer s = Select(first, parameters, clusters, 0, &state);
  EXPECT_EQ(s.heads[0].role, ShareRole::kPivot);
  EXPECT_EQ(s.heads[1].why, "cluster 8 does not share");
  EXPECT_EQ(s.heads[2].why, "pivot of cluster 7 lies in this layer");
  for (int32_t head = 1; head < 3; ++head) {
    EXPECT_EQ(s.heads[head].role, ShareRole::kOwn);
    EXPECT_EQ(Listed(s.index, head),
              OwnBlocks(s.heads[head].flex, s.heads[head].flex.n_v, s.heads[head].flex.n_s));
  }
  s = Select(second, parameters, clusters, 2, &state);
  for (int32_t head = 0; head < 3; ++head) {
    EXPECT_EQ(s.heads[head].role, ShareRole::kShared) << s.heads[head].why;
    EXPECT_EQ(s.heads[head].pivot_head, 0);
  }
  state = {};  // another prompt
  s = Select(second, parameters, clusters, 1, &state);
  EXPECT_EQ(s.heads[0].role, ShareRole::kPivot);
  EXPECT_EQ(s.heads[1].why, "in no cluster");
}

TEST(ShareTest, QueryAwareHeadsAreNoPivots) {
  LayerInput input(160, 2, 1);  // noise of size 0.1: pooled rows predict it
  input.LookAt(1, 60, 3);
  ShareParameters parameters = Small();
  parameters.query_aware = 0.1;
  ShareState state;
  const ShareLayer s = Select(input, parameters, OneCluster(2), 0, &state);
  EXPECT_EQ(s.heads[0].role, ShareRole::kQueryAware);
  EXPECT_FALSE(s.heads[0].flex.pooled_blocks.empty());
  EXPECT_EQ(s.heads[1].role, ShareRole::kPivot) << s.heads[1].why;
  EXPECT_EQ(state.pivots.at(7).head, 1);
  // As FlexPrefill has it.
  BlockIndex index;
  ASSERT_TRUE(FlexSelect(input.problem, parameters.Flex(), nullptr, &index).ok());
  EXPECT_EQ(Listed(s.index, 0), Listed(index, 0));
}

// Four blocks of equal attention to all keys: Abar's row I is about 1 / (I + 1) in each block before its own.
TEST(ShareTest, RatioCountsABlockOnceOrAsUpstream) {
  LayerInput input(64, 1, 1);
  std::fill(input.q.begin(), input.q.end(), 0.0f);
  const auto average = AverageByMatrix(input.problem, 0, kBlock);
  for (const bool compat : {false, true}) {
    ShareParameters parameters = Small();
    parameters.min_budget_tokens = 2 * kBlock;
    parameters.max_budget_tokens = 2 * kBlock;
    parameters.compat_ratio = compat;
    ShareState state;
    Select(input, parameters, OneCluster(1), 0, &state);
    const SharePivot& pivot = state.pivots.at(7);
    ASSERT_THAT(pivot.columns, ElementsAre(0, 1));  // of equal ones the lower
    ASSERT_EQ(pivot.offsets.size(), 2u);
    ASSERT_EQ(pivot.offsets[0], 0);
    const int32_t offset = pivot.offsets[1];
    double expected = 0;
    for (int32_t row = 0; row < 4; ++row) {
      for (int32_t column = 0; column <= row; ++column) {
        const int times = (column <= 1 ? 1 : 0) + (column == row || column == row - offset ? 1 : 0);
        expected += average[row * 4 + column] * (compat ? times : std::min(times, 1));
      }
    }
    if (compat) expected += 1 + offset;  // column 1 of row 0, and the offset in rows before it
    EXPECT_NEAR(pivot.ratio, expected / 4, 1e-12);
    EXPECT_EQ(pivot.ratio > 1, compat);
  }
}

TEST(ShareTest, APivotWhoseOwnPatternWouldDoIsNotShared) {
  LayerInput first(160, 1, 1), second(160, 1, 2);
  for (LayerInput* input : {&first, &second}) input->LookBack(0, 0, 0, 1);
  ShareParameters parameters = Small();
  parameters.fallback = 1;
  ShareState state;
  Select(first, parameters, OneCluster(1), 0, &state);
  const double ratio = state.pivots.at(7).ratio;
  EXPECT_GT(ratio, 0.5);
  for (const double limit : {ratio - 1e-6, ratio + 1e-6}) {
    ShareState copy = state;
    parameters.fallback = limit;
    const ShareLayer s = Select(second, parameters, OneCluster(1), 1, &copy);
    EXPECT_EQ(s.heads[0].role, limit < ratio ? ShareRole::kOwn : ShareRole::kShared) << s.heads[0].why;
    EXPECT_EQ(s.heads[0].ratio, ratio);
  }
}

// Scores are scaled by the head's size, a pivot's attention by the softmax_scale of the model.
TEST(ShareTest, APivotsAttentionHasTheModelsScale) {
  LayerInput input(70, 1, 1);
  input.problem.softmax_scale = 0.9;
  ShareState state;
  Select(input, Small(), OneCluster(1), 0, &state);
  EXPECT_THAT(state.pivots.at(7).average,
              Pointwise(DoubleNear(1e-12), AverageByMatrix(input.problem, 0, kBlock)));
}

bool Holds(const Blocks& blocks, const flex::BlockSet& pattern) {
  for (int32_t row = 0; row < pattern.num_blocks(); ++row) {
    for (int32_t column = 0; column <= row; ++column) {
      if (pattern.Has(row, column) && blocks.count({row, column}) == 0) return false;
    }
  }
  return true;
}

TEST(ShareTest, PivotsPerLayerServeTheirOwnLayer) {
  LayerInput input(160, 4, 1);
  for (const int32_t head : {0, 2}) input.LookBack(head, 0, 0, 1);
  for (const int32_t head : {1, 3}) input.LookAt(head, 60, 1);
  ShareParameters parameters = Small();
  parameters.fallback = 1;
  parameters.pivots_per_layer = 2;
  ShareState state;
  for (int32_t layer = 0; layer < 2; ++layer) {
    const ShareLayer s = Select(input, parameters, {}, layer, &state);
    for (int32_t head = 0; head < 2; ++head) {
      EXPECT_TRUE(IsDense(s.index, head));
      ASSERT_EQ(s.heads[head + 2].role, ShareRole::kShared) << s.heads[head + 2].why;
      EXPECT_EQ(s.heads[head + 2].pivot_head, head);
      EXPECT_EQ(s.heads[head + 2].pivot_layer, layer);
      EXPECT_TRUE(Holds(Listed(s.index, head + 2), state.pivots.at(head).pattern));
    }
  }
  parameters.pivots_per_layer = 9;
  const ShareLayer all = Select(input, parameters, {}, 2, &state);
  for (int32_t head = 0; head < 4; ++head) EXPECT_TRUE(IsDense(all.index, head));
}

// Fewer tokens than a block stand for themselves; no prompt is dense for being short.
TEST(ShareTest, ShortPrompts) {
  for (const int64_t tokens : {1, 5, 16, 17, 32}) {
    const LayerInput input(tokens, 2, 1);
    ShareState state;
    const ShareLayer s = Select(input, Small(), {}, 0, &state);
    const auto nb = static_cast<int32_t>((tokens + kBlock - 1) / kBlock);
    double sum = 0;
    for (const double x : s.heads[1].flex.vertical) sum += x;
    EXPECT_NEAR(sum, 1, 1e-12);
    EXPECT_EQ(s.index.num_q_tiles, nb);
    EXPECT_EQ(Listed(s.index, 1), nb == 1 ? (Blocks{{0, 0}}) : (Blocks{{0, 0}, {1, 0}, {1, 1}})) << tokens;
  }
}

// Query heads 0 and 1 read KV head 0, whose needle lies in block 3; 2 and 3 the other, with block 6.
TEST(ShareTest, PivotsReadTheKvHeadOfTheirGroup) {
  std::vector<float> q(1280, 4), k(640);
  k[200] = 9;  // token 50, head 0
  k[402] = 9;  // token 100, head 1
  const PolicyProblem problem = {q.data(), k.data(), nullptr, 160, 4, 2, 2, 1 / std::sqrt(2.0)};
  ShareParameters parameters = Small();
  parameters.pivots_per_layer = 4;
  ShareState state;
  ShareLayer selected;
  ASSERT_TRUE(ShareSelect(problem, parameters, {}, 0, &state, &selected).ok());
  for (int32_t head = 0; head < 4; ++head) {
    EXPECT_GT(state.pivots.at(head).average[9 * 10 + (head < 2 ? 3 : 6)], 0.9) << head;
  }
}

TEST(ShareTest, RefusesWhatIsOutOfRange) {
  struct Call {
    ShareParameters parameters = Small();
    ShareState state;
    int32_t layer = 0;
  };
  const LayerInput input(48, 2, 1);
  const auto refused = [&](const std::function<void(Call*)>& change) {
    Call call;
    change(&call);
    const ShareState before = call.state;
    ShareLayer selected;
    selected.index.num_lists = 77;
    selected.heads.resize(5);
    const Status status = ShareSelect(input.problem, call.parameters, {}, call.layer, &call.state, &selected);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(selected.index.num_lists, 77);
    EXPECT_EQ(selected.heads.size(), 5u);
    EXPECT_EQ(call.state.next_layer, before.next_layer);
    return status.message();
  };
  EXPECT_EQ(refused([](Call* c) { c->parameters.gamma = 1; }), "gamma 1 is not over 0 and below 1");
  EXPECT_EQ(refused([](Call* c) { c->parameters.similarity = 1.1; }), "similarity 1.1 is not from 0 to 1");
  EXPECT_EQ(refused([](Call* c) { c->parameters.fallback = -0.5; }), "fallback -0.5 is not from 0 to 1");
  EXPECT_THAT(refused([](Call* c) { c->parameters.query_aware = NAN; }), HasSubstr("query_aware nan"));
  EXPECT_EQ(refused([](Call* c) { c->parameters.pivots_per_layer = -1; }),
            "pivots_per_layer -1 is not from 0 to 65536");
  EXPECT_THAT(refused([](Call* c) { c->parameters.block_tokens = 8; }), HasSubstr("block_tokens 8"));
  EXPECT_THAT(refused([](Call* c) { c->parameters.min_budget_tokens = 0; }),
              HasSubstr("min_budget_tokens 0"));
  EXPECT_EQ(refused([](Call* c) { c->layer = -1; }), "layer -1 is below the next, 0");
  EXPECT_EQ(refused([](Call* c) { c->state.next_layer = 3, c->layer = 2; }), "layer 2 is below the next, 3");
  EXPECT_EQ(refused([](Call* c) { c->state.num_tokens = 47, c->layer = c->state.next_layer = 1; }),
            "num_tokens 48 is not that of the layers before, 47");
}

}  // namespace
}  // namespace headwater::kernels::reference
