// The reference of vertical-slash, stage by stage against computations of another shape, and on prompts with
// a column or a diagonal that must be found.
#include "kernels/reference/policies/vertical_slash.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/kernels/policies/random_problem.h"

namespace headwater::kernels::reference {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kLengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 200, 333};

struct Selected {
  VerticalSlashTrace trace;
  BlockIndex index;
};

Selected Select(const PolicyProblem& problem, const VerticalSlashParameters& parameters) {
  Selected selected;
  const Status status = SelectVerticalSlash(problem, parameters, &selected.trace, &selected.index);
  EXPECT_TRUE(status.ok()) << status.message();
  return selected;
}

// Few columns and diagonals and hardly any forced, so that short prompts have gaps.
VerticalSlashParameters Sparse() {
  VerticalSlashParameters parameters;
  parameters.budgets = {{5, 4}};
  parameters.forced_verticals = 1;
  parameters.forced_locals = 1;
  parameters.least_verticals = 1;
  parameters.least_slashes = 1;
  return parameters;
}

std::vector<int64_t> Upto(int64_t count) {
  std::vector<int64_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

std::vector<int64_t> UptoAnd(int64_t count, int64_t last) {
  std::vector<int64_t> numbers = Upto(count);
  numbers.push_back(last);
  return numbers;
}

// Keys that ranges cover for the 64 rows from first_row, by painting keys one interval at a time: an interval
// whose last key is unpainted is painted, or, where paint reaches to it, the 64 keys after the paint are.
std::vector<bool> Paint(std::vector<int64_t> distances, int64_t first_row) {
  std::vector<bool> painted(first_row + 256, false);
  std::sort(distances.rbegin(), distances.rend());
  for (const int64_t distance : distances) {
    if (distance > first_row + 63) continue;
    const int64_t last = std::max<int64_t>(first_row + 63 - distance, 63);
    if (painted[last]) continue;
    int64_t first = last - 63;
    for (int64_t key = std::max<int64_t>(first - 1, 0); key < last; ++key) {
      if (painted[key]) first = key + 1;
    }
    for (int64_t key = first; key < first + 64; ++key) painted[key] = true;
  }
  return painted;
}

// The exact pattern from what a head chose, without the stage that makes ranges.
std::vector<int64_t> ExpectedKeys(const VerticalSlashHead& head, int64_t query) {
  const std::vector<bool> painted = Paint(head.distances, query / 64 * 64);
  std::vector<int64_t> keys;
  for (int64_t key = 0; key <= query; ++key) {
    const bool column = std::count(head.columns.begin(), head.columns.end(), key) > 0;
    if (painted[key] || (column && key < query / 64 * 64)) keys.push_back(key);
  }
  return keys;
}

TEST(VerticalSlashTest, SumsAreThoseOfTheLastRowsOfADenseSoftmax) {
  for (const int64_t tokens : kLengths) {
    RandomProblem problem(tokens, 4, 2, 16);
    const Selected selected = Select(problem.get, {});
    for (int32_t head = 0; head < 4; ++head) {
      std::vector<std::vector<double>> weights = problem.Scores(head);
      for (int64_t i = 0; i < tokens; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < tokens; ++j) {
          weights[i][j] = j <= i && i + 64 >= tokens ? std::exp(weights[i][j]) : 0;
          sum += weights[i][j];
        }
        for (double& weight : weights[i]) weight /= sum > 0 ? sum : 1;
      }
      for (int64_t n = 0; n < tokens; ++n) {
        double column = 0, diagonal = 0;
        for (int64_t i = 0; i < tokens; ++i) column += weights[i][n];
        for (int64_t j = 0; j + n < tokens; ++j) diagonal += weights[j + n][j];
        ASSERT_NEAR(selected.trace.heads[head].vertical[n], column, 1e-12)
            << tokens << " " << head << " " << n;
        ASSERT_NEAR(selected.trace.heads[head].slash[n], diagonal, 1e-12)
            << tokens << " " << head << " " << n;
      }
    }
  }
}

TEST(VerticalSlashTest, ForcedOnesComeFirstAndThenTheLargestSums) {
  RandomProblem problem(400, 2, 1, 16);
  VerticalSlashParameters parameters;
  parameters.budgets = {{35, 105}, {30, 100}};

  const Selected selected = Select(problem.get, parameters);

  const VerticalSlashHead& head = selected.trace.heads[0];
  std::vector<int64_t> columns = Upto(400), distances = Upto(400);
  std::sort(columns.begin() + 30, columns.end(),
            [&](int64_t x, int64_t y) { return head.vertical[x] > head.vertical[y]; });
  std::sort(distances.begin() + 100, distances.end(),
            [&](int64_t x, int64_t y) { return head.slash[x] > head.slash[y]; });
  std::sort(columns.begin(), columns.begin() + 35);
  std::sort(distances.begin(), distances.begin() + 105, std::greater<>());
  EXPECT_THAT(head.columns, ElementsAreArray(columns.begin(), columns.begin() + 35));
  EXPECT_THAT(head.distances, ElementsAreArray(distances.begin(), distances.begin() + 105));
  EXPECT_EQ(selected.trace.heads[1].columns, Upto(30));
  EXPECT_EQ(selected.trace.heads[1].distances.size(), 100u);
}

TEST(VerticalSlashTest, SmallBudgetsCountAsTheLeastAndLargeOnesAsThePrompt) {
  RandomProblem problem(200, 1, 1, 16);
  VerticalSlashParameters parameters;
  parameters.budgets = {{1, 1}};

  const Selected small = Select(problem.get, parameters);
  const Selected published = Select(problem.get, {});

  EXPECT_EQ(small.trace.heads[0].columns, Upto(30));
  std::vector<int64_t> nearest = Upto(50);
  std::reverse(nearest.begin(), nearest.end());
  EXPECT_EQ(small.trace.heads[0].distances, nearest);
  EXPECT_EQ(published.trace.heads[0].columns, Upto(200));
  EXPECT_EQ(published.trace.heads[0].distances.size(), 200u);
}

// Queries of zero attend evenly: all columns before the last rows tie, and all distances that each of them
// has.
TEST(VerticalSlashTest, OfEqualSumsTheLowerColumnAndTheSmallerDistanceWin) {
  RandomProblem problem(400, 1, 1, 16);
  std::fill(problem.q.begin(), problem.q.end(), 0.0f);
  VerticalSlashParameters parameters;
  parameters.budgets = {{40, 120}};

  const Selected selected = Select(problem.get, parameters);

  EXPECT_EQ(selected.trace.heads[0].columns, Upto(40));
  EXPECT_EQ(selected.trace.heads[0].distances.front(), 119);
}

TEST(VerticalSlashTest, FindsAPlantedColumnInTheHeadThatHasIt) {
  RandomProblem problem(500, 2, 2, 16);
  for (int i = 0; i < 16; ++i) problem.Key(150, 1)[i] = 4;
  for (int64_t token = 0; token < 500; ++token) {
    for (int i = 0; i < 16; ++i) problem.Query(token, 1)[i] += 2;
  }
  VerticalSlashParameters parameters;
  parameters.budgets = {{31, 50}};

  const Selected selected = Select(problem.get, parameters);

  EXPECT_EQ(selected.trace.heads[1].columns, UptoAnd(30, 150));
  EXPECT_NE(selected.trace.heads[0].columns, UptoAnd(30, 150));
  EXPECT_THAT(selected.trace.heads[1].rows[7].columns, ElementsAreArray(UptoAnd(30, 150)));
  EXPECT_THAT(BlocksOf(selected.index, 1, 3), ElementsAre(0, 1, 2, 3));
}

TEST(VerticalSlashTest, FindsAPlantedDiagonal) {
  RandomProblem problem(1000, 1, 1, 64);
  for (int64_t token = 617; token < 1000; ++token) {
    for (int i = 0; i < 64; ++i) problem.Query(token)[i] = 2 * problem.Key(token - 617)[i];
  }
  VerticalSlashParameters parameters;
  parameters.budgets = {{30, 101}};

  const Selected selected = Select(problem.get, parameters);

  EXPECT_EQ(selected.trace.heads[0].distances.front(), 617);
  EXPECT_EQ(selected.trace.heads[0].distances[1], 99);
  // Rows 960 to 1023: the diagonal's keys are [960 - 617, 1024 - 617), the nearest 100 start at 1024 - 99
  // - 64.
  EXPECT_THAT(selected.trace.heads[0].rows[15].ranges, ElementsAre(KeyRange{343, 407}, KeyRange{861, 1053}));
  EXPECT_THAT(BlocksOf(selected.index, 0, 7), ElementsAre(0, 2, 3, 6, 7));
}

TEST(VerticalSlashMergeTest, ARangeGrowsBy64WhereTheNextReachesItAndIsCutWhereItDoesNot) {
  // Rows 256 to 319; intervals end at 70, 260 and 320.
  const VerticalSlashRows rows =
      MergeVerticalSlash({0, 5, 6, 69, 70, 100, 195, 196, 322, 330}, {250, 60, 0}, 256);

  EXPECT_THAT(rows.ranges, ElementsAre(KeyRange{6, 70}, KeyRange{196, 324}));
  EXPECT_THAT(rows.columns, ElementsAre(0, 5, 70, 100, 195));
}

TEST(VerticalSlashMergeTest, NeighboursAreJoinedAndAGapOfOneKeyIsNot) {
  // Rows 256 to 319; the first intervals end at 100, the second at 164 and at 165.
  EXPECT_THAT(MergeVerticalSlash({}, {220, 156, 0}, 256).ranges,
              ElementsAre(KeyRange{36, 164}, KeyRange{256, 320}));
  EXPECT_THAT(MergeVerticalSlash({100}, {220, 155, 0}, 256).ranges,
              ElementsAre(KeyRange{36, 100}, KeyRange{101, 165}, KeyRange{256, 320}));
  EXPECT_THAT(MergeVerticalSlash({100}, {220, 155, 0}, 256).columns, ElementsAre(100));
}

TEST(VerticalSlashMergeTest, IntervalsBeforeThePromptBecomeTheFirst64KeysAndLaterOnesAreLeftOut) {
  EXPECT_THAT(MergeVerticalSlash({}, {319, 0}, 256).ranges, ElementsAre(KeyRange{0, 64}, KeyRange{256, 320}));
  EXPECT_THAT(MergeVerticalSlash({}, {320, 0}, 256).ranges, ElementsAre(KeyRange{256, 320}));
  EXPECT_THAT(MergeVerticalSlash({3, 63, 64, 90}, {500, 63, 5, 0}, 0).ranges, ElementsAre(KeyRange{0, 64}));
  EXPECT_THAT(MergeVerticalSlash({3, 63, 64, 90}, {500, 63, 5, 0}, 0).columns, IsEmpty());
}

TEST(VerticalSlashTest, KeysOfEachRowAreThoseOfItsDiagonalsPaintedAndItsColumns) {
  for (const int64_t tokens : kLengths) {
    for (const int64_t n_slash : {1, 4, 12, 40}) {
      RandomProblem problem(tokens, 2, 1, 8, static_cast<uint32_t>(tokens + n_slash));
      VerticalSlashParameters parameters = Sparse();
      parameters.budgets[0].n_slash = n_slash;
      const Selected selected = Select(problem.get, parameters);
      for (const VerticalSlashHead& head : selected.trace.heads) {
        for (int64_t query = 0; query < tokens; ++query) {
          ASSERT_EQ(VerticalSlashKeys(head, query), ExpectedKeys(head, query)) << tokens << " " << query;
        }
      }
    }
  }
}

TEST(VerticalSlashTest, ATileListsExactlyTheBlocksOfTheKeysThatItsRowsRead) {
  int64_t left_out = 0;
  for (const int64_t tokens : {1, 64, 65, 129, 333, 512, 700}) {
    RandomProblem problem(tokens, 4, 2, 8);
    const Selected selected = Select(problem.get, Sparse());
    const Status status = ValidateBlockIndex(selected.index);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(selected.index.num_lists, 4);
    ASSERT_EQ(selected.index.num_q_tiles, (tokens + 127) / 128);
    for (int32_t head = 0; head < 4; ++head) {
      std::vector<std::set<int32_t>> blocks(selected.index.num_q_tiles);
      for (int64_t query = 0; query < tokens; ++query) {
        for (const int64_t key : ExpectedKeys(selected.trace.heads[head], query)) {
          blocks[query / 128].insert(static_cast<int32_t>(key / 128));
        }
      }
      for (int64_t tile = 0; tile < selected.index.num_q_tiles; ++tile) {
        EXPECT_THAT(BlocksOf(selected.index, head, tile), ElementsAreArray(blocks[tile]));
        left_out += tile + 1 - static_cast<int64_t>(blocks[tile].size());
      }
    }
  }
  EXPECT_GT(left_out, 0);  // else the patterns are dense and show nothing
}

TEST(VerticalSlashTest, AHeadReadsTheKeysOfItsGroup) {
  const RandomProblem grouped(300, 6, 2, 16);
  const RandomProblem wide = grouped.WithoutGroups();
  const Selected one = Select(grouped.get, Sparse()), other = Select(wide.get, Sparse());

  for (int32_t head = 0; head < 6; ++head) {
    EXPECT_EQ(one.trace.heads[head].vertical, other.trace.heads[head].vertical);
  }
  EXPECT_NE(one.trace.heads[2].vertical, one.trace.heads[3].vertical);
  EXPECT_EQ(one.index.blocks, other.index.blocks);
  EXPECT_EQ(VerticalSlashAttention(grouped.get, one.trace), VerticalSlashAttention(wide.get, other.trace));
}

TEST(VerticalSlashTest, AttentionIsTheSoftmaxOverTheExactPattern) {
  RandomProblem problem(333, 2, 1, 16);
  for (const VerticalSlashParameters& parameters : {Sparse(), VerticalSlashParameters{}}) {
    const Selected selected = Select(problem.get, parameters);
    const std::vector<double> out = VerticalSlashAttention(problem.get, selected.trace);
    for (int32_t head = 0; head < 2; ++head) {
      const std::vector<std::vector<double>> scores = problem.Scores(head);
      for (int64_t query = 0; query < 333; ++query) {
        const bool all = parameters.budgets[0].n_slash >= 333;
        double sum = 0, mix = 0;
        for (const int64_t key : all ? Upto(query + 1) : ExpectedKeys(selected.trace.heads[head], query)) {
          sum += std::exp(scores[query][key]);
          mix += std::exp(scores[query][key]) * problem.v[key * 16 + 7];
        }
        ASSERT_NEAR(out[(query * 2 + head) * 16 + 7], mix / sum, 1e-12) << query;
      }
    }
  }
}

TEST(VerticalSlashTest, RefusesWhatIsOutOfRangeAndNamesIt) {
  struct Case {
    std::function<void(PolicyProblem*, VerticalSlashParameters*)> change;
    std::string message;
  };
  const Case cases[] = {
      {[](auto*, auto* p) { p->budgets[0].n_vertical = 0; }, "n_vertical 0 is outside 1 to 4194304"},
      {[](auto*, auto* p) { p->budgets[0].n_slash = 4194305; }, "n_slash 4194305 is outside 1 to 4194304"},
      {[](auto*, auto* p) { p->budgets.resize(3); }, "budgets has 3 values, not 1 or one for each of 4"},
      {[](auto*, auto* p) { p->budgets.clear(); }, "budgets has 0 values"},
      {[](auto*, auto* p) { p->last_q = 0; }, "last_q 0 is outside 1 to"},
      {[](auto*, auto* p) { p->forced_verticals = -1; }, "forced_verticals -1 is outside 0 to"},
      {[](auto*, auto* p) { p->forced_locals = 0; }, "forced_locals 0 is outside 1 to"},
      {[](auto*, auto* p) { p->least_verticals = 0; }, "least_verticals 0 is outside 1 to"},
      {[](auto*, auto* p) { p->least_slashes = 0; }, "least_slashes 0 is outside 1 to"},
      {[](auto* q, auto*) { q->num_tokens = 0; }, "num_tokens 0 is outside 1 to"},
      {[](auto* q, auto*) { q->num_kv_heads = 3; },
       "num_q_heads 4 is not a positive multiple of num_kv_heads 3"},
      {[](auto* q, auto*) { q->head_dim = 0; }, "head_dim 0 is outside 1 to"},
      {[](auto* q, auto*) { q->softmax_scale = 0; }, "softmax_scale 0 is not a positive number"},
      {[](auto* q, auto*) { q->k = nullptr; }, "q or k is null"},
  };
  const RandomProblem problem(10, 4, 2, 8);
  for (const Case& each : cases) {
    PolicyProblem changed = problem.get;
    VerticalSlashParameters parameters;
    each.change(&changed, &parameters);
    Selected selected;
    const Status status = SelectVerticalSlash(changed, parameters, &selected.trace, &selected.index);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << each.message;
    EXPECT_THAT(status.message(), HasSubstr(each.message));
  }
}

TEST(VerticalSlashTest, RefusesNumbersThatAreNotFinite) {
  RandomProblem problem(100, 4, 2, 8);
  problem.Key(70, 1)[3] = std::numeric_limits<float>::quiet_NaN();
  Selected selected;
  const Status status = SelectVerticalSlash(problem.get, {}, &selected.trace, &selected.index);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("k of token 70, head 1 is not finite"));
}

}  // namespace
}  // namespace headwater::kernels::reference
