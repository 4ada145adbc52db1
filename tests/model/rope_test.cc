#include "model/rope.h"

#include <cmath>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace headwater {
namespace {

using nlohmann::json;

RopeParameters Llama31() {
  RopeParameters rope;
  rope.theta = 500'000;
  rope.llama3 = true;
  rope.factor = 8;
  rope.low_freq_factor = 1;
  rope.high_freq_factor = 4;
  rope.original_max_position = 8192;
  return rope;
}

TEST(MakeRopeFrequencies, IsThePowerLawByDefault) {
  RopeParameters rope;
  rope.theta = 10'000;
  const auto frequencies = MakeRopeFrequencies(rope, 128);
  ASSERT_EQ(frequencies.inverse.size(), 64u);
  EXPECT_EQ(frequencies.inverse[0], 1);
  EXPECT_DOUBLE_EQ(frequencies.inverse[32], 0.01);
  EXPECT_NEAR(frequencies.inverse[16], 0.1, 1e-16);
}

// What transformers 5.23 computes in f32 (_compute_llama3_parameters) for Llama 3.1 8B: one value of each
// branch and the two beside each border.
TEST(MakeRopeFrequencies, AgreesWithTransformersUnderLlama3) {
  const auto frequencies = MakeRopeFrequencies(Llama31(), 128);
  ASSERT_EQ(frequencies.inverse.size(), 64u);
  const std::pair<size_t, double> expected[] = {
      {0, 1.000000000e+00},  {10, 1.286873817e-01}, {28, 3.211446106e-03}, {29, 2.166570630e-03},
      {30, 1.371893683e-03}, {31, 8.567514597e-04}, {32, 5.248460220e-04}, {33, 3.126936499e-04},
      {34, 1.785077911e-04}, {35, 9.556212171e-05}, {63, 3.068925878e-07},
  };
  for (const auto& [i, value] : expected) {
    EXPECT_NEAR(frequencies.inverse[i] / value, 1, 2e-6) << i;
  }
}

TEST(ParseRope, ReadsParametersNestedUnderFullAttention) {
  const json config = json::parse(R"({"rope_parameters": {"full_attention":
      {"rope_type": "default", "rope_theta": 1000000.0}}})");
  const auto rope = ParseRope(config, 4096);
  ASSERT_TRUE(rope.ok()) << rope.status();
  EXPECT_EQ(rope->theta, 1e6);
  EXPECT_FALSE(rope->llama3);
}

TEST(ParseRope, LetsTheOuterOriginalLengthWinAndDefaultsToTheLimit) {
  json config = json::parse(R"({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0,
      "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}})");
  EXPECT_EQ(ParseRope(config, 4096)->original_max_position, 4096);
  config["rope_parameters"]["original_max_position_embeddings"] = 8192;
  EXPECT_EQ(ParseRope(config, 4096)->original_max_position, 8192);
  config["original_max_position_embeddings"] = 2048;
  EXPECT_EQ(ParseRope(config, 4096)->original_max_position, 2048);
}

TEST(ParseRope, TakesEmptyAndNullBlocksAsAbsent) {
  for (const char* text : {R"({"rope_theta": 5e5})", R"({"rope_theta": 5e5, "rope_scaling": null})",
                           R"({"rope_theta": 5e5, "rope_scaling": {}})",
                           R"({"rope_theta": 5e5, "rope_parameters": {"type": "default"}})"}) {
    const auto rope = ParseRope(json::parse(text), 4096);
    ASSERT_TRUE(rope.ok()) << text << rope.status();
    EXPECT_EQ(rope->theta, 5e5) << text;
  }
}

}  // namespace
}  // namespace headwater
