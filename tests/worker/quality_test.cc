#include "worker/quality.h"

#include <string>

#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

TEST(QualityTest, ReadsTheBoundThatIsSet) {
  v1::Quality quality;
  quality.set_min_recall(0.95);
  EXPECT_EQ(ReadQuality(quality)->min_recall, 0.95);
  EXPECT_TRUE(ReadQuality(quality)->any());
  quality.set_max_density(1);
  EXPECT_EQ(ReadQuality(quality)->max_density, 1);
  EXPECT_EQ(ReadQuality(quality)->min_recall, 0);
  quality.mutable_time_budget()->set_nanos(1'000'000);
  EXPECT_EQ(ReadQuality(quality)->time_budget, absl::Milliseconds(1));
  EXPECT_FALSE(QualityBound().any());
}

TEST(QualityTest, RefusesValuesOutOfRangeNamingThem) {
  v1::Quality quality;
  EXPECT_EQ(ReasonOf(ReadQuality(quality).status()), v1::ERROR_REASON_BAD_FIELD);
  for (const double value : {0.0, 1.0, -0.5, 2.5}) {
    quality.set_min_recall(value);
    const absl::Status status = ReadQuality(quality).status();
    EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_BAD_FIELD) << value;
    EXPECT_NE(status.message().find("quality.min_recall"), std::string::npos) << status;
  }
  for (const double value : {0.0, -1.0, 1.5}) {
    quality.set_max_density(value);
    EXPECT_EQ(ReasonOf(ReadQuality(quality).status()), v1::ERROR_REASON_BAD_FIELD) << value;
  }
  quality.mutable_time_budget();
  EXPECT_EQ(ReasonOf(ReadQuality(quality).status()), v1::ERROR_REASON_BAD_FIELD);
  quality.mutable_time_budget()->set_nanos(1'000'000'000);
  EXPECT_EQ(ReasonOf(ReadQuality(quality).status()), v1::ERROR_REASON_BAD_FIELD);
}

TEST(QualityTest, ABoundOfDensityHoldsForShortPromptsToo) {
  const auto dense_below = [](const QualityBound& bound, const std::map<std::string, double>& given) {
    kernels::PolicyParameters parameters;
    EXPECT_TRUE(kernels::ParsePolicyParameters("headwater", given, &parameters).ok());
    AddBound(bound, given, &parameters);
    return std::get<kernels::HeadwaterParameters>(parameters).dense_below_tokens;
  };
  QualityBound density, recall;
  density.max_density = 0.5;
  recall.min_recall = 0.5;
  const int64_t usual = kernels::HeadwaterParameters().dense_below_tokens;
  EXPECT_EQ(dense_below({}, {}), usual);
  EXPECT_EQ(dense_below(recall, {}), usual);
  EXPECT_EQ(dense_below(density, {}), 0);
  EXPECT_EQ(dense_below(density, {{"dense_below_tokens", 100}}), 100) << "what is asked for stands";
  kernels::PolicyParameters other;
  ASSERT_TRUE(kernels::ParsePolicyParameters("flex", {}, &other).ok());
  AddBound(density, {}, &other);
  EXPECT_GT(other.dense_below_tokens, 0);
}

TEST(QualityTest, ATimeBecomesADensityAndBack) {
  ComputeSpeed speed;
  speed.linear = 100;
  speed.attention = 10;
  const LayerWork work{200, 50};  // 2 s, and 5 s when dense
  EXPECT_EQ(PredictTime(work, speed, 4, 0.5), absl::Seconds(18));
  EXPECT_DOUBLE_EQ(DensityWithin(absl::Seconds(18), work, speed, 4), 0.5);
  EXPECT_EQ(DensityWithin(absl::Seconds(100), work, speed, 4), 1);
  EXPECT_LT(DensityWithin(absl::Seconds(7), work, speed, 4), 0) << "linear layers alone take 8 s";
  EXPECT_EQ(DensityWithin(absl::ZeroDuration(), work, speed, 0), 1);
}

TEST(QualityTest, SpeedsFollowWhatLayersTake) {
  ComputeSpeed speed;
  for (int i = 0; i < 50; ++i) speed.Add(1e12, absl::Milliseconds(10), 1e12, absl::Milliseconds(20));
  EXPECT_NEAR(speed.linear, 1e14, 1e11);
  EXPECT_NEAR(speed.attention, 5e13, 1e11);
  speed.Add(1e12, absl::ZeroDuration(), 0, absl::Milliseconds(1));
  EXPECT_NEAR(speed.linear, 1e14, 1e11) << "times that tell nothing";
  EXPECT_NEAR(speed.attention, 5e13, 1e11);
}

}  // namespace
}  // namespace headwater
