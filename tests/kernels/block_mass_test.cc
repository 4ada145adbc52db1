// The reference of attention masses: by hand, and against SharePrefill's averages.
#include "kernels/reference/block_mass.h"

#include <cmath>
#include <numeric>

#include "gtest/gtest.h"

#include "kernels/reference/policies/share.h"
#include "tests/kernels/policies/random_problem.h"

namespace headwater::kernels::reference {
namespace {

TEST(BlockMassReferenceTest, EqualScoresSpreadEvenly) {
  RandomProblem problem(300, 2, 1, 8);
  std::fill(problem.q.begin(), problem.q.end(), 0.0f);

  const std::vector<double> row = RowMass(problem.get, 199, 1, std::log(200.0));
  const std::vector<double> average = BlockMass(problem.get, 0);

  EXPECT_NEAR(row[0], 128.0 / 200, 1e-12);
  EXPECT_NEAR(row[1], 72.0 / 200, 1e-12);
  EXPECT_EQ(row[2], 0);
  EXPECT_EQ(average[1], 0);
  double last = 0;  // queries 256 to 299 see block 0 whole
  for (int position = 256; position < 300; ++position) last += 128.0 / (position + 1) / 44;
  EXPECT_NEAR(average[6], last, 1e-12);
}

TEST(BlockMassReferenceTest, RowsSumToOneAndOnePlantedKeyHoldsAll) {
  RandomProblem problem(400, 2, 2, 16);
  for (int i = 0; i < 16; ++i) problem.Key(150, 1)[i] = 100 * problem.Query(399, 1)[i];

  const std::vector<double> lse = LogSumExp(problem.get, 1);
  const std::vector<double> row = RowMass(problem.get, 399, 1, lse[399]);

  for (const int position : {0, 1, 127, 128, 399}) {
    const std::vector<double> mass = RowMass(problem.get, position, 1, lse[position]);
    EXPECT_NEAR(std::accumulate(mass.begin(), mass.end(), 0.0), 1, 1e-12);
  }
  EXPECT_NEAR(row[1], 1, 1e-9);
}

TEST(BlockMassReferenceTest, EqualsTheAverageOfAPivot) {
  const RandomProblem problem(700, 2, 1, 16);
  ShareParameters parameters;
  parameters.pivots_per_layer = 2;
  parameters.query_aware = 0;
  ShareState state;
  ShareLayer layer;

  ASSERT_TRUE(ShareSelect(problem.get, parameters, {}, 0, &state, &layer).ok());

  ASSERT_FALSE(state.pivots.empty());
  for (const auto& [key, pivot] : state.pivots) {
    const std::vector<double> average = BlockMass(problem.get, pivot.head);
    ASSERT_EQ(average.size(), pivot.average.size());
    for (size_t i = 0; i < average.size(); ++i) EXPECT_NEAR(average[i], pivot.average[i], 1e-12);
  }
}

}  // namespace
}  // namespace headwater::kernels::reference
