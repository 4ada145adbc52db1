// The reference of XAttention's selection: scores against brute-force anti-diagonals, kept sets against all
// subsets, planted blocks, and the official code's quirks.
#include "kernels/reference/policies/xattention.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/kernels/policies/random_problem.h"

namespace headwater::kernels::reference {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Selected {
  const std::vector<int32_t>& Kept(int64_t row, int32_t head = 0) const {
    return trace.heads[head].kept[row];
  }
  double Score(int64_t row, int64_t column, int32_t head = 0) const {
    return trace.heads[head].scores[row * trace.num_blocks + column];
  }

  XAttentionTrace trace;
  BlockIndex index;
};

Selected Select(const PolicyProblem& problem, const XAttentionParameters& parameters) {
  Selected selected;
  const Status status = SelectXAttention(problem, parameters, &selected.trace, &selected.index);
  EXPECT_TRUE(status.ok()) << status.message();
  return selected;
}

XAttentionParameters With(double threshold, int32_t stride = 16) {
  XAttentionParameters parameters;
  parameters.stride = stride;
  parameters.thresholds = {threshold};
  return parameters;
}

// Eight blocks whose keys differ in length along the queries' common direction, so that rows differ in how
// many blocks hold their mass.
RandomProblem Uneven(int64_t tokens, int32_t q_heads = 1, int32_t kv_heads = 1) {
  RandomProblem problem(tokens, q_heads, kv_heads, 16);
  const float strength[] = {0.1f, 0.5f, 0.2f, 0.7f, 0.3f, 0.6f, 0.4f, 0.0f};
  for (float& value : problem.q) value += 1;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int32_t i = 0; i < kv_heads * 16; ++i) problem.Key(token)[i] += strength[token / 128 % 8];
  }
  return problem;
}

// E of one head by adding up token pairs: pair (i, j) lies on the one anti-diagonal that counts where
// i % S + j % S = S - 1.
std::vector<double> BruteForce(RandomProblem* problem, int32_t head, int32_t stride, double norm) {
  const std::vector<std::vector<double>> pairs = problem->Scores(head);
  const int64_t tokens = problem->get.num_tokens, cells = (tokens + stride - 1) / stride;
  std::vector<std::vector<double>> logits(cells, std::vector<double>(cells, 0));
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < tokens; ++j) {
      if (i % stride + j % stride == stride - 1) logits[i / stride][j / stride] += pairs[i][j];
    }
  }
  const int64_t blocks = (tokens + 127) / 128;
  std::vector<double> scores(blocks * blocks, 0);
  for (int64_t w = 0; w < cells; ++w) {
    double sum = 0;
    for (int64_t u = 0; u <= w; ++u) sum += std::exp(logits[w][u] / stride / norm);
    for (int64_t u = 0; u <= w; ++u) {
      scores[w * stride / 128 * blocks + u * stride / 128] += std::exp(logits[w][u] / stride / norm) / sum;
    }
  }
  return scores;
}

TEST(XAttentionTest, ScoresAreAntiDiagonalSumsOfTokenPairs) {
  for (const int64_t tokens : {1, 5, 100, 127, 128, 129, 300}) {
    for (const int32_t stride : {1, 8, 16, 128}) {
      RandomProblem problem(tokens, 4, 2, 8, static_cast<uint32_t>(tokens + stride));
      XAttentionParameters parameters = With(0.9, stride);
      parameters.norm = 0.5;
      const Selected selected = Select(problem.get, parameters);
      ASSERT_EQ(selected.trace.num_blocks, (tokens + 127) / 128);
      for (int32_t head = 0; head < 4; ++head) {
        const std::vector<double> expected = BruteForce(&problem, head, stride, 0.5);
        ASSERT_EQ(selected.trace.heads[head].scores.size(), expected.size());
        for (size_t i = 0; i < expected.size(); ++i) {
          ASSERT_NEAR(selected.trace.heads[head].scores[i], expected[i], 1e-10)
              << tokens << " " << stride << " " << head << " " << i;
        }
      }
    }
  }
}

TEST(XAttentionTest, ARowHoldsAMassOfOneForEachStrideWithAToken) {
  RandomProblem problem(300, 1, 1, 8);
  const Selected selected = Select(problem.get, With(0.9, 8));

  EXPECT_NEAR(selected.Score(0, 0), 16, 1e-12);
  EXPECT_NEAR(selected.Score(1, 0) + selected.Score(1, 1), 16, 1e-12);
  EXPECT_NEAR(selected.Score(2, 0) + selected.Score(2, 1) + selected.Score(2, 2), 6, 1e-12);
}

// Of all sets with block 0 and the row's own that reach the threshold: the fewest blocks, and of those the
// most mass.
TEST(XAttentionTest, KeptIsTheSmallestSetThatReachesTheThreshold) {
  RandomProblem problem = Uneven(1024);
  size_t fewest_of_all = 8, most_of_all = 0;
  for (const double threshold : {0.2, 0.4, 0.6, 0.8, 0.9, 0.95}) {
    const Selected selected = Select(problem.get, With(threshold));
    for (int row = 0; row < 8; ++row) {
      double total = 0, best_mass = 0;
      for (int block = 0; block <= row; ++block) total += selected.Score(row, block);
      std::vector<int32_t> best(9);
      for (int set = 0; set < 2 << row; ++set) {
        if ((set & 1) == 0 || (set >> row & 1) == 0) continue;
        std::vector<int32_t> blocks;
        double mass = 0;
        for (int block = 0; block <= row; ++block) {
          if ((set >> block & 1) == 0) continue;
          blocks.push_back(block);
          mass += selected.Score(row, block);
        }
        if (mass < threshold * total || blocks.size() > best.size()) continue;
        if (blocks.size() == best.size() && mass < best_mass) continue;
        best = blocks;
        best_mass = mass;
      }
      EXPECT_EQ(selected.Kept(row), best) << threshold << " " << row;
      if (row == 7) fewest_of_all = std::min(fewest_of_all, best.size());
      if (row == 7) most_of_all = std::max(most_of_all, best.size());
    }
  }
  EXPECT_LE(fewest_of_all, 3u);  // else the thresholds do not show the range of sizes
  EXPECT_GE(most_of_all, 6u);
}

TEST(XAttentionTest, FindsAPlantedBlock) {
  RandomProblem problem(1024, 1, 1, 16);
  for (float& value : problem.q) value += 1;
  for (int64_t token = 3 * 128; token < 4 * 128; ++token) {
    for (int i = 0; i < 16; ++i) problem.Key(token)[i] += 3;
  }

  const Selected selected = Select(problem.get, With(0.9));

  EXPECT_THAT(selected.Kept(7), ElementsAre(0, 3, 7));
  EXPECT_THAT(selected.Kept(3), ElementsAre(0, 3));
  EXPECT_GT(selected.Kept(2).size(), 2u);
}

// A block whose tokens match along the anti-diagonals alone: q[i] is the key at the mirrored place of its
// stride, in block 2.
TEST(XAttentionTest, FindsABlockThatOnlyAntiDiagonalsShow) {
  RandomProblem problem(1024, 1, 1, 32);
  for (int64_t i = 0; i < 128; ++i) {
    const int64_t mirrored = i / 16 * 16 + 15 - i % 16;
    for (int c = 0; c < 32; ++c) problem.Query(5 * 128 + i)[c] = 4 * problem.Key(2 * 128 + mirrored)[c];
  }

  EXPECT_THAT(Select(problem.get, With(0.9)).Kept(5), ElementsAre(0, 2, 5));
}

TEST(XAttentionTest, ThresholdZeroKeepsTheForcedAndOneKeepsEverything) {
  RandomProblem problem(600, 2, 1, 8);
  XAttentionParameters parameters;
  parameters.thresholds = {0, 1};
  const Selected selected = Select(problem.get, parameters);

  EXPECT_THAT(selected.Kept(0), ElementsAre(0));
  EXPECT_THAT(selected.Kept(4), ElementsAre(0, 4));
  EXPECT_THAT(selected.Kept(4, 1), ElementsAre(0, 1, 2, 3, 4));
  parameters.compat = true;
  EXPECT_THAT(Select(problem.get, parameters).Kept(4), ElementsAre(0, 4));
}

// Queries of zero: row 7 of 8 strides holds 0.584 in its own block and 1.059 in each other.
TEST(XAttentionTest, OfEqualScoresTheLowerBlockIsTakenFirst) {
  RandomProblem problem(1024, 1, 1, 8);
  std::fill(problem.q.begin(), problem.q.end(), 0.0f);

  EXPECT_THAT(Select(problem.get, With(0.5)).Kept(7), ElementsAre(0, 1, 2, 3, 7));
}

TEST(XAttentionTest, ChunkIsThePublishedFunctionOfTheLength) {
  const std::pair<int64_t, int64_t> cases[] = {{1, 2048},     {2048, 2048},   {2049, 4096},   {16384, 16384},
                                               {16385, 8192}, {131072, 2048}, {1 << 20, 2048}};
  for (const auto& [tokens, chunk] : cases) EXPECT_EQ(XAttentionChunk(tokens), chunk) << tokens;
}

TEST(XAttentionTest, BlocksDoNotDependOnTheChunkButUnderCompat) {
  RandomProblem problem = Uneven(1000);
  XAttentionParameters parameters = With(0.7);
  const Selected published = Select(problem.get, parameters);
  parameters.chunk_tokens = 256;
  const Selected small = Select(problem.get, parameters);
  parameters.compat = true;

  EXPECT_EQ(published.trace.chunk_tokens, 2048);
  EXPECT_EQ(small.trace.chunk_tokens, 256);
  EXPECT_EQ(small.index.blocks, published.index.blocks);
  EXPECT_NE(Select(problem.get, XAttentionParameters{16, {0.7}, 1, 0, false, true}).index.blocks,
            Select(problem.get, parameters).index.blocks);
}

// In the first chunk: own block first, then one more of the others, 0 among them, than reach the threshold.
TEST(XAttentionTest, CompatKeepsOneMoreInTheFirstChunkAndTheSameAfterIt) {
  RandomProblem problem = Uneven(1024);
  int64_t more = 0;
  for (const double threshold : {0.3, 0.5, 0.7, 0.9}) {
    XAttentionParameters parameters = With(threshold);
    parameters.chunk_tokens = 768;
    const Selected plain = Select(problem.get, parameters);
    parameters.compat = true;
    const Selected compat = Select(problem.get, parameters);
    for (int32_t row = 0; row < 6; ++row) {
      std::vector<std::pair<double, int32_t>> others;
      double wanted = threshold * compat.Score(row, row);
      for (int32_t block = 0; block < row; ++block) {
        others.push_back({-compat.Score(row, block), block});
        wanted += threshold * compat.Score(row, block);
      }
      std::sort(others.begin(), others.end());
      double mass = compat.Score(row, row);
      size_t needed = 0;
      while (mass < wanted) mass -= others[needed++].first;
      std::vector<int32_t> expected = {row};
      if (row > 0) expected.push_back(0);
      for (size_t i = 0; i < std::min(needed + 1, others.size()); ++i) {
        if (others[i].second != 0) expected.push_back(others[i].second);
      }
      std::sort(expected.begin(), expected.end());
      EXPECT_EQ(compat.Kept(row), expected) << threshold << " " << row;
      more += compat.Kept(row) != plain.Kept(row);
    }
    EXPECT_EQ(compat.Kept(6), plain.Kept(6));
    EXPECT_EQ(compat.Kept(7), plain.Kept(7));
  }
  EXPECT_GT(more, 0);
}

TEST(XAttentionTest, CompatSinkSetsTheFirstRowWhichTheIndexLeavesOut) {
  RandomProblem problem(600, 1, 1, 8);
  XAttentionParameters parameters = With(0.5);
  const Selected without = Select(problem.get, parameters);
  parameters.keep_sink = true;
  const Selected with = Select(problem.get, parameters);
  parameters.compat = true;
  const Selected compat = Select(problem.get, parameters);

  EXPECT_EQ(with.trace.heads[0].kept, without.trace.heads[0].kept);
  EXPECT_THAT(compat.Kept(0), ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(BlocksOf(compat.index, 0, 0), ElementsAre(0));
  EXPECT_TRUE(ValidateBlockIndex(compat.index).ok());
}

TEST(XAttentionTest, TheIndexHoldsTheKeptSetsOfEachHead) {
  for (const int64_t tokens : {1, 100, 128, 129, 1000}) {
    RandomProblem problem = Uneven(tokens, 4, 2);
    const Selected selected = Select(problem.get, With(0.6));
    const Status status = ValidateBlockIndex(selected.index);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(selected.index.num_lists, 4);
    ASSERT_EQ(selected.index.num_q_tiles, (tokens + 127) / 128);
    for (int32_t head = 0; head < 4; ++head) {
      for (int64_t tile = 0; tile < selected.index.num_q_tiles; ++tile) {
        EXPECT_EQ(BlocksOf(selected.index, head, tile), selected.Kept(tile, head));
      }
    }
  }
}

TEST(XAttentionTest, AHeadReadsTheKeysOfItsGroup) {
  const RandomProblem grouped = Uneven(700, 6, 2);
  const Selected one = Select(grouped.get, With(0.6));
  const Selected other = Select(grouped.WithoutGroups().get, With(0.6));

  for (int32_t head = 0; head < 6; ++head) {
    EXPECT_EQ(one.trace.heads[head].scores, other.trace.heads[head].scores);
  }
  EXPECT_NE(one.trace.heads[2].scores, one.trace.heads[3].scores);
  EXPECT_EQ(one.index.blocks, other.index.blocks);
}

TEST(XAttentionTest, RefusesWhatIsOutOfRangeAndNamesIt) {
  struct Case {
    std::function<void(PolicyProblem*, XAttentionParameters*)> change;
    std::string message;
  };
  const Case cases[] = {
      {[](auto*, auto* p) { p->stride = 0; }, "stride 0 is not a divisor of 128"},
      {[](auto*, auto* p) { p->stride = 12; }, "stride 12 is not a divisor of 128"},
      {[](auto*, auto* p) { p->stride = 256; }, "stride 256 is not a divisor of 128"},
      {[](auto*, auto* p) { p->thresholds = {1.5}; }, "threshold 1.5 is outside 0 to 1"},
      {[](auto*, auto* p) { p->thresholds = {NAN}; }, "threshold nan is outside 0 to 1"},
      {[](auto*, auto* p) {
         p->thresholds = {0, 1};
       },
       "thresholds has 2 values, not 1 or one for each of 4"},
      {[](auto*, auto* p) { p->norm = 0; }, "norm 0 is not a number over 0"},
      {[](auto*, auto* p) { p->chunk_tokens = 100; }, "chunk_tokens 100 is not 0 or a multiple of 128"},
      {[](auto*, auto* p) { p->chunk_tokens = -128; }, "chunk_tokens -128 is not 0 or a multiple of 128"},
      {[](auto* q, auto*) { q->num_tokens = 0; }, "num_tokens 0 is outside 1 to"},
      {[](auto* q, auto*) { q->q = nullptr; }, "q or k is null"},
  };
  const RandomProblem problem(10, 4, 2, 8);
  for (const Case& each : cases) {
    PolicyProblem changed = problem.get;
    XAttentionParameters parameters;
    each.change(&changed, &parameters);
    Selected selected;
    const Status status = SelectXAttention(changed, parameters, &selected.trace, &selected.index);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << each.message;
    EXPECT_THAT(status.message(), HasSubstr(each.message));
  }
}

TEST(XAttentionTest, RefusesNumbersThatAreNotFinite) {
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    RandomProblem problem(300, 4, 2, 8);
    problem.Query(70, 1)[3] = value;
    Selected selected;
    const Status status = SelectXAttention(problem.get, {}, &selected.trace, &selected.index);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr("q of token 70, head 1 is not finite"));
  }
}

}  // namespace
}  // namespace headwater::kernels::reference
