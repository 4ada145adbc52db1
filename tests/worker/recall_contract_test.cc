#include "worker/recall_contract.h"

#include <vector>

#include <gtest/gtest.h>

namespace headwater {
namespace {

GroupMeasure Measured(double mean, double error = 0, double density = 0.1, float enough = 0) {
  return {density, {mean, mean, error}, enough};
}

RecallContract Recall(double least, std::vector<GroupSetting> settings) {
  ContractRules rules;
  rules.min_recall = least;
  return RecallContract(rules, std::move(settings));
}

RecallContract Density(double most, size_t groups, double most_forced = 1) {
  ContractRules rules;
  rules.max_density = most;
  rules.most_forced = most_forced;
  return RecallContract(rules, std::vector<GroupSetting>(groups));
}

TEST(RecallContractTest, GroupsThatReadEnoughKeepTheirLists) {
  RecallContract contract = Recall(0.9, {{0.1f, 4}, {0.2f, 8}});
  EXPECT_FALSE(contract.Judge({Measured(0.9), Measured(0.99, 0.03)}));
  EXPECT_EQ(contract.thresholds(), (std::vector<float>{0.1f, 0.2f}));
  EXPECT_EQ(contract.outcomes()[0].rounds, 0u);
}

TEST(RecallContractTest, TwoAndAHalfStandardErrorsCount) {
  RecallContract contract = Recall(0.6875, {{0.1f, 4}});
  EXPECT_FALSE(contract.Judge({Measured(1, 0.125)}));
  EXPECT_TRUE(contract.Judge({Measured(1, 0.1251)}));
}

TEST(RecallContractTest, AShortGroupTakesWhatIsEnoughAndGoesDenseAtLast) {
  RecallContract contract = Recall(0.9, {{0.5f, 4}, {0.5f, 4}});
  const std::vector<GroupMeasure> measures = {Measured(0.5, 0, 0.1, 0.25f), Measured(1, 0, 0.1, 0.25f)};

  for (const float threshold : {0.25f, 0.125f, 0.0f}) {
    ASSERT_TRUE(contract.Judge(measures));
    EXPECT_EQ(contract.outcomes()[0].setting, (GroupSetting{threshold, 4}));
    EXPECT_EQ(contract.outcomes()[1].setting, (GroupSetting{0.5f, 4})) << "it was not short";
  }
  EXPECT_FALSE(contract.Judge(measures)) << "all is read, whatever was measured";
  EXPECT_EQ(contract.outcomes()[0].rounds, 3u);
  EXPECT_EQ(contract.outcomes()[0].fallback, v1::ATTENTION_FALLBACK_DENSE_RECALL);
  EXPECT_EQ(contract.outcomes()[1].rounds, 0u);
  EXPECT_EQ(contract.outcomes()[1].fallback, v1::ATTENTION_FALLBACK_UNSPECIFIED);
}

TEST(RecallContractTest, AGroupThatRecoversStays) {
  RecallContract contract = Recall(0.9, {{0.5f, 4}});
  EXPECT_TRUE(contract.Judge({Measured(0.8, 0, 0.1, 0.25f)}));
  EXPECT_FALSE(contract.Judge({Measured(0.95, 0, 0.2, 0.25f)}));
  EXPECT_EQ(contract.outcomes()[0].rounds, 1u);
  EXPECT_EQ(contract.outcomes()[0].fallback, v1::ATTENTION_FALLBACK_UNSPECIFIED);
}

TEST(RecallContractTest, AGroupForWhichNothingIsEnoughGoesDenseAtOnce) {
  RecallContract contract = Recall(0.9, {{0.5f, 4}});
  EXPECT_TRUE(contract.Judge({Measured(0.8)}));
  EXPECT_EQ(contract.thresholds(), std::vector<float>{0});
  EXPECT_EQ(contract.outcomes()[0].fallback, v1::ATTENTION_FALLBACK_DENSE_RECALL);
}

TEST(RecallContractTest, AHeadThatWasNotSearchedIsFirstSearched) {
  RecallContract contract = Recall(0.9, {{2, 4}});
  EXPECT_TRUE(contract.Judge({Measured(0.8, 0, 0.1, 0.125f)}));
  EXPECT_EQ(contract.thresholds(), std::vector<float>{0.125f});
}

TEST(RecallContractTest, WhatShouldHaveBeenEnoughIsTightened) {
  RecallContract contract = Recall(0.9, {{0.25f, 4}});
  EXPECT_TRUE(contract.Judge({Measured(0.8, 0, 0.1, 0.5f)}));
  EXPECT_EQ(contract.thresholds(), std::vector<float>{0.125f});
}

TEST(RecallContractTest, NotANumberIsShortOfNothing) {
  // Queries that are not finite fail the prompt elsewhere.
  RecallContract contract = Recall(0.9, {{0.5f, 4}});
  EXPECT_FALSE(contract.Judge({Measured(std::numeric_limits<double>::quiet_NaN())}));
}

TEST(RecallContractTest, ADensityOverTheBoundIsForcedAndCorrected) {
  RecallContract contract = Density(0.2, 2);
  ASSERT_TRUE(contract.Judge({Measured(1, 0, 0.2), Measured(1, 0, 0.4)}));
  EXPECT_DOUBLE_EQ(contract.forced_density(), 0.2);
  ASSERT_TRUE(contract.Judge({Measured(1, 0, 0.25), Measured(1, 0, 0.25)})) << "what is always listed";
  EXPECT_DOUBLE_EQ(contract.forced_density(), 0.2 - (0.25 - 0.99 * 0.2));
  EXPECT_FALSE(contract.Judge({Measured(1, 0, 0.198), Measured(1, 0, 0.198)}));
  EXPECT_EQ(contract.outcomes()[1].fallback, v1::ATTENTION_FALLBACK_DENSITY_BOUND);
  EXPECT_EQ(contract.outcomes()[1].rounds, 2u);
  EXPECT_EQ(contract.outcomes()[1].forced_density, contract.forced_density());
  EXPECT_FALSE(contract.outcomes()[1].over_bound);
}

TEST(RecallContractTest, AfterThreeSelectionsWhatIsOverTheBoundStaysAndShows) {
  RecallContract contract = Density(0.5, 1);
  int rounds = 0;
  while (contract.Judge({Measured(1, 0, 0.51)})) ASSERT_LE(++rounds, 3);
  EXPECT_EQ(rounds, 3);
  EXPECT_EQ(contract.outcomes()[0].fallback, v1::ATTENTION_FALLBACK_DENSITY_BOUND);
  EXPECT_TRUE(contract.outcomes()[0].over_bound);
  EXPECT_EQ(contract.outcomes()[0].forced_density, contract.forced_density());
}

TEST(RecallContractTest, ABoundOnDensityAsksForNoRecall) {
  RecallContract contract = Density(0.5, 1);
  EXPECT_FALSE(contract.Judge({Measured(0.2, 0.2, 0.4)}));
  EXPECT_EQ(contract.outcomes()[0].rounds, 0u);
}

TEST(RecallContractTest, ADensityUnderTheBoundStays) {
  RecallContract contract = Density(0.375, 2);
  EXPECT_FALSE(contract.Judge({Measured(1, 0, 0.25), Measured(1, 0, 0.5)}));
  EXPECT_EQ(contract.forced_density(), 0);
  EXPECT_EQ(contract.outcomes()[0].forced_density, 0);
  EXPECT_EQ(contract.outcomes()[0].fallback, v1::ATTENTION_FALLBACK_UNSPECIFIED);
}

TEST(RecallContractTest, ForcedListsFindRoom) {
  RecallContract contract = Density(0.5, 1, 0.125);
  ASSERT_TRUE(contract.Judge({Measured(1, 0, 0.9)}));
  EXPECT_EQ(contract.forced_density(), 0.125);
}

TEST(RecallContractTest, WhatIsAlwaysReadIsTheFloor) {
  RecallContract contract = Density(0.01, 1);
  const std::vector<GroupMeasure> floor = {Measured(1, 0, 0.3)};
  int rounds = 0;
  while (contract.Judge(floor)) ASSERT_LE(++rounds, 3);
  EXPECT_EQ(contract.outcomes()[0].fallback, v1::ATTENTION_FALLBACK_DENSITY_FLOOR);
  EXPECT_GT(contract.forced_density(), 0);
}

TEST(RecallContractTest, NoDensityLeftIsTheFloorToo) {
  RecallContract contract = Density(0, 1);
  EXPECT_TRUE(contract.Judge({Measured(1, 0, 0.3)}));
  EXPECT_GT(contract.forced_density(), 0);
  EXPECT_FALSE(contract.Judge({Measured(1, 0, 0.05)}));
  EXPECT_EQ(contract.outcomes()[0].fallback, v1::ATTENTION_FALLBACK_DENSITY_FLOOR);
}

}  // namespace
}  // namespace headwater
