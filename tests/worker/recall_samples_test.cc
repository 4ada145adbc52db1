#include "worker/recall_samples.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

namespace headwater {
namespace {

TEST(RecallSamplesTest, RowsComeOneFromEachStretch) {
  for (const int64_t tokens : {1, 5, 32, 33, 1000, 131'072}) {
    const auto rows = SampleRows("r", 3, tokens, 32);
    const auto count = std::min<int64_t>(32, tokens);
    ASSERT_EQ(rows.size(), static_cast<size_t>(count)) << tokens;
    for (int64_t i = 0; i < count; ++i) {
      EXPECT_GE(rows[static_cast<size_t>(i)], i * tokens / count);
      EXPECT_LT(rows[static_cast<size_t>(i)], (i + 1) * tokens / count);
    }
  }
}

TEST(RecallSamplesTest, RowsAreARequestsAndALayersOwn) {
  EXPECT_EQ(SampleRows("r", 3, 50'000, 32), SampleRows("r", 3, 50'000, 32));
  EXPECT_NE(SampleRows("r", 3, 50'000, 32), SampleRows("r", 4, 50'000, 32));
  EXPECT_NE(SampleRows("r", 3, 50'000, 32), SampleRows("s", 3, 50'000, 32));
}

// Each of 16 places of a stretch is drawn about as often: 6250 times, standard deviation 77.
TEST(RecallSamplesTest, RowsCoverTheirStretch) {
  std::vector<int> drawn(16);
  for (int32_t layer = 0; layer < 12'500; ++layer) {
    for (const int64_t row : SampleRows("r", layer, 128, 8)) ++drawn[static_cast<size_t>(row % 16)];
  }
  for (const int count : drawn) EXPECT_NEAR(count, 6250, 400);
}

TEST(RecallSamplesTest, EstimatesOfAGroupAreOfItsHeads) {
  // Two rows of three heads; the group is the last two.
  const std::vector<float> recalls = {0, 0.5f, 1, 0, 0.75f, 0.25f};
  const RecallEstimate got = EstimateRecall(recalls, 3, 1, 2);
  EXPECT_DOUBLE_EQ(got.mean, 0.625);
  EXPECT_DOUBLE_EQ(got.p1, 0.25);
  EXPECT_DOUBLE_EQ(got.error, 0.125) << "rows' means are 0.75 and 0.5";
  EXPECT_EQ(EstimateRecall({}, 3, 1, 2).mean, 1);
  EXPECT_EQ(EstimateRecall({recalls.data(), 3}, 3, 1, 2).error, 0);
}

TEST(RecallSamplesTest, FirstPercentileIsByNearestRank) {
  std::vector<float> values(250);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(250 - i);
  EXPECT_EQ(FirstPercentile(values), 3);
  EXPECT_EQ(FirstPercentile({0.5f, 0.25f}), 0.25);
  EXPECT_EQ(FirstPercentile({}), 1);
}

TEST(RecallSamplesTest, SamplesNoMoreThanTheyMayCost) {
  EXPECT_EQ(AffordableRows(131'072, 0.05, 0.02, 4, 32), 32);
  EXPECT_EQ(AffordableRows(32'768, 0.15, 0.02, 4, 32), 32);
  EXPECT_EQ(AffordableRows(32'768, 0.05, 0.02, 4, 32), 0) << "a tile of 128 costs 4 % there";
  EXPECT_EQ(AffordableRows(32'768, 0.15, 0.02, 8, 32), 32);
  EXPECT_EQ(AffordableRows(32'768, 0.1, 0.02, 8, 64), 32) << "two tiles of 16";
  EXPECT_EQ(AffordableRows(1'048'576, 0, 0.02, 4, 32), 0);
}

}  // namespace
}  // namespace headwater
