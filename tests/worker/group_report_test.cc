#include "worker/group_report.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace headwater {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

v1::AttentionGroup Report(const GroupOutcome& outcome, const GroupTiles& tiles = {}) {
  v1::AttentionGroup group;
  ReportLists(&outcome, tiles, &group);
  return group;
}

GroupOutcome Outcome(float threshold) {
  GroupOutcome outcome;
  outcome.setting = {threshold, 8};
  outcome.rounds = 2;
  return outcome;
}

TEST(GroupReportTest, SaysWhatTheListsWereMadeWith) {
  const v1::AttentionGroup group = Report(Outcome(0.25f), {3, 3, 0});
  EXPECT_EQ(group.threshold(), 0.25);
  EXPECT_FALSE(group.has_forced_density());
  EXPECT_EQ(group.window_blocks(), 8u);
  EXPECT_EQ(group.rounds(), 2u);
  EXPECT_EQ(group.fallback(), v1::ATTENTION_FALLBACK_UNSPECIFIED);
  EXPECT_EQ(group.note(), "");
  EXPECT_EQ(group.no_room_tiles(), 0u);
}

TEST(GroupReportTest, AForcedDensityStandsInPlaceOfTheThreshold) {
  GroupOutcome outcome = Outcome(0.25f);
  outcome.forced_density = 0.125;
  outcome.fallback = v1::ATTENTION_FALLBACK_DENSITY_BOUND;
  const v1::AttentionGroup group = Report(outcome);
  EXPECT_FALSE(group.has_threshold());
  EXPECT_EQ(group.forced_density(), 0.125);
  EXPECT_EQ(group.window_blocks(), 8u);
  EXPECT_EQ(group.note(), "the policy asked for more than the bound");
  outcome.over_bound = true;
  EXPECT_THAT(Report(outcome).note(), HasSubstr("after 3 more selections the layer is still over it"));
}

TEST(GroupReportTest, ADenseHeadIsSoByThePolicyUnlessItWasForced) {
  EXPECT_EQ(Report(Outcome(0)).fallback(), v1::ATTENTION_FALLBACK_DENSE_BY_POLICY);
  EXPECT_EQ(Report(Outcome(0), {50, 2, 9}).no_room_tiles(), 0u) << "it would be dense with any room";
  GroupOutcome short_of_recall = Outcome(0);
  short_of_recall.fallback = v1::ATTENTION_FALLBACK_DENSE_RECALL;
  EXPECT_EQ(Report(short_of_recall).note(), "recall stayed under min_recall");
  GroupOutcome forced = Outcome(0);
  forced.forced_density = 0.5;
  EXPECT_EQ(Report(forced).fallback(), v1::ATTENTION_FALLBACK_UNSPECIFIED);
  EXPECT_EQ(Report(forced, {5, 2, 9}).no_room_tiles(), 3u);
}

TEST(GroupReportTest, TilesWithoutRoomShowBesideAnyFallback) {
  const GroupTiles tiles{7, 2, 9};
  const v1::AttentionGroup free = Report(Outcome(0.25f), tiles);
  EXPECT_EQ(free.fallback(), v1::ATTENTION_FALLBACK_DENSE_NO_ROOM);
  EXPECT_EQ(free.no_room_tiles(), 5u);
  EXPECT_EQ(free.note(), "7 dense tiles; lists of 9 tiles of the layer found no room");
  GroupOutcome bound = Outcome(0.25f);
  bound.forced_density = 0.5;
  bound.fallback = v1::ATTENTION_FALLBACK_DENSITY_BOUND;
  const v1::AttentionGroup both = Report(bound, tiles);
  EXPECT_EQ(both.fallback(), v1::ATTENTION_FALLBACK_DENSITY_BOUND);
  EXPECT_EQ(both.no_room_tiles(), 5u);
  EXPECT_THAT(both.note(), AllOf(HasSubstr("more than the bound; 7 dense"), HasSubstr("no room")));
  EXPECT_EQ(Report(bound, {2, 2, 9}).no_room_tiles(), 0u) << "other groups' tiles";
}

TEST(GroupReportTest, PoliciesWithoutSettingsSayTheMostThatCanBe) {
  v1::AttentionGroup group;
  ReportLists(nullptr, {7, GroupTiles::kUnknown, 4}, &group);
  EXPECT_FALSE(group.has_threshold());
  EXPECT_FALSE(group.has_window_blocks());
  EXPECT_EQ(group.no_room_tiles(), 4u);
  EXPECT_EQ(group.fallback(), v1::ATTENTION_FALLBACK_DENSE_NO_ROOM);
  v1::AttentionGroup none;
  ReportLists(nullptr, {7, GroupTiles::kUnknown, 0}, &none);
  EXPECT_EQ(none.fallback(), v1::ATTENTION_FALLBACK_UNSPECIFIED);
}

TEST(GroupReportTest, WholeLayers) {
  v1::AttentionGroup dense, ranges, crowded;
  ReportDense(&dense);
  EXPECT_EQ(dense.fallback(), v1::ATTENTION_FALLBACK_DENSE_BY_POLICY);
  ReportRanges(0, &ranges);
  EXPECT_EQ(ranges.fallback(), v1::ATTENTION_FALLBACK_UNSPECIFIED);
  ReportRanges(3, &crowded);
  EXPECT_EQ(crowded.no_room_tiles(), 3u);
  EXPECT_EQ(crowded.note(), "the ranges of 3 tiles found no room");
}

}  // namespace
}  // namespace headwater
