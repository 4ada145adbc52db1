#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

#include "model/model.h"

namespace headwater {
namespace {

TEST(TopTokens, OrdersByLogitAndGivesTiesToTheLowerId) {
  const std::vector<float> logits = {1, 3, 2, 3, 0};
  const auto best = TopTokens(logits, 4);
  ASSERT_EQ(best.size(), 4u);
  EXPECT_EQ(best[0].token, 1);
  EXPECT_EQ(best[1].token, 3);
  EXPECT_EQ(best[2].token, 2);
  EXPECT_EQ(best[3].token, 0);
  EXPECT_EQ(best[0].logit, 3);
  EXPECT_EQ(best[0].logprob, best[1].logprob);
}

TEST(TopTokens, GivesNaturalLogProbabilities) {
  const std::vector<float> logits = {std::log(1.f), std::log(2.f), std::log(5.f)};
  const auto best = TopTokens(logits, 3);
  EXPECT_NEAR(best[0].logprob, std::log(5.0 / 8), 1e-6);
  EXPECT_NEAR(best[1].logprob, std::log(2.0 / 8), 1e-6);
  EXPECT_NEAR(best[2].logprob, std::log(1.0 / 8), 1e-6);
}

TEST(TopTokens, KeepsLargeLogitsFinite) {
  const std::vector<float> logits(1000, 3e38f);
  const auto best = TopTokens(logits, 1);
  EXPECT_EQ(best[0].token, 0);
  EXPECT_NEAR(best[0].logprob, -std::log(1000.0), 1e-5);
}

TEST(TopTokens, GivesNoMoreThanThereAre) {
  const std::vector<float> logits = {1, 2};
  EXPECT_EQ(TopTokens(logits, 10).size(), 2u);
  EXPECT_TRUE(TopTokens(logits, 0).empty());
  EXPECT_TRUE(TopTokens(logits, -1).empty());
  EXPECT_TRUE(TopTokens({}, 3).empty());
}

TEST(TopTokens, RanksNanLast) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> logits = {nan, 1, nan, 2};
  const auto best = TopTokens(logits, 4);
  EXPECT_EQ(best[0].token, 3);
  EXPECT_EQ(best[1].token, 1);
}

}  // namespace
}  // namespace headwater
