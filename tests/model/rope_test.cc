#include "model/rope.h"

#include <cmath>
#include <fstream>
#include <ostream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "tests/model/dense_forward.h"

namespace headwater {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

RopeParameters Llama31() {
  RopeParameters rope;
  rope.theta = 500'000;
  rope.type = RopeType::kLlama3;
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

struct GoldenRope {
  std::string name;
  int32_t head_dim = 0;
  json config;
  double attention_factor = 0;
  std::vector<double> inverse;
};

void PrintTo(const GoldenRope& golden, std::ostream* out) { *out << golden.name; }

std::vector<GoldenRope> ReadGoldenRopes() {
  std::ifstream file(testing::GoldenPath("rope.json"));
  std::vector<GoldenRope> cases;
  for (const json& row : json::parse(file)) {
    cases.push_back({row["name"], row["head_dim"], row["config"], row["attention_factor"], row["inverse"]});
  }
  return cases;
}

class GoldenRopeTest : public ::testing::TestWithParam<GoldenRope> {};

// transformers computes in f32, where a share near 0 or 1 of the ramp keeps fewer digits.
TEST_P(GoldenRopeTest, AgreesWithTransformers) {
  const json& config = GetParam().config;
  const auto rope = ParseRope(config, config["max_position_embeddings"]);
  ASSERT_TRUE(rope.ok()) << rope.status();
  const auto frequencies = MakeRopeFrequencies(*rope, GetParam().head_dim);
  EXPECT_DOUBLE_EQ(frequencies.attention_factor, GetParam().attention_factor);
  ASSERT_EQ(frequencies.inverse.size(), GetParam().inverse.size());
  for (size_t i = 0; i < frequencies.inverse.size(); ++i) {
    EXPECT_NEAR(frequencies.inverse[i] / GetParam().inverse[i], 1, 1e-5) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenRopeTest, ::testing::ValuesIn(ReadGoldenRopes()),
                         [](const auto& row) { return row.param.name; });

json Yarn(const json& changes = json::object()) {
  json block = {{"rope_type", "yarn"},
                {"rope_theta", 1e6},
                {"factor", 4.0},
                {"original_max_position_embeddings", 32768}};
  block.update(changes);
  return {{"rope_parameters", block}};
}

json Linear(const json& changes = json::object()) {
  json block = {{"type", "linear"}, {"factor", 2.0}};
  block.update(changes);
  return {{"rope_scaling", block}};
}

TEST(ParseRope, ReadsEverySpellingOfYarnAlike) {
  const auto flat = ParseRope(Yarn(), 131072);
  ASSERT_TRUE(flat.ok()) << flat.status();
  EXPECT_EQ(flat->type, RopeType::kYarn);
  EXPECT_EQ(flat->theta, 1e6);
  EXPECT_EQ(flat->factor, 4);
  EXPECT_EQ(flat->original_max_position, 32768);
  EXPECT_EQ(flat->beta_fast, 32);
  EXPECT_EQ(flat->beta_slow, 1);
  EXPECT_TRUE(flat->truncate);

  const json nested = {{"rope_parameters", {{"full_attention", Yarn()["rope_parameters"]}}}};
  json old = {{"rope_theta", 1e6}, {"rope_scaling", Yarn()["rope_parameters"]}};
  old["rope_scaling"].erase("rope_theta");
  json oldest = old;
  oldest["rope_scaling"].erase("rope_type");
  oldest["rope_scaling"]["type"] = "yarn";
  json both = old;
  both["rope_scaling"]["type"] = "yarn";
  both["rope_parameters"] = Yarn()["rope_parameters"];
  for (const json& config : {nested, old, oldest, both}) {
    const auto rope = ParseRope(config, 131072);
    ASSERT_TRUE(rope.ok()) << config << rope.status();
    EXPECT_EQ(*rope, *flat) << config;
  }
}

TEST(ParseRope, TakesNullForAbsent) {
  const auto plain = ParseRope(Yarn(), 131072);
  const auto nulls = ParseRope(Yarn({{"beta_fast", nullptr},
                                     {"beta_slow", nullptr},
                                     {"attention_factor", nullptr},
                                     {"mscale", nullptr},
                                     {"unheard_of", nullptr}}),
                               131072);
  ASSERT_TRUE(plain.ok() && nulls.ok()) << nulls.status();
  EXPECT_EQ(*plain, *nulls);
}

TEST(CanonicalText, DiffersWhereParametersDo) {
  std::vector<std::string> texts;
  for (const json& config :
       {Yarn(), Yarn({{"factor", 5.0}}), Yarn({{"rope_theta", 1e5}}),
        Yarn({{"original_max_position_embeddings", 16384}}), Yarn({{"beta_fast", 16}}),
        Yarn({{"beta_slow", 2}}), Yarn({{"truncate", false}}), Yarn({{"attention_factor", 1.0}}),
        Yarn({{"mscale", 1.0}, {"mscale_all_dim", 0.5}}), Linear(), Linear({{"factor", 3.0}}),
        Linear({{"type", "default"}, {"factor", nullptr}})}) {
    const auto rope = ParseRope(config, 131072);
    ASSERT_TRUE(rope.ok()) << config << rope.status();
    const std::string text = CanonicalText(*rope);
    EXPECT_THAT(texts, ::testing::Not(::testing::Contains(text)));
    texts.push_back(text);
  }
  // What is stated and what it defaults to are one.
  const json stated = Yarn({{"beta_fast", 32}, {"beta_slow", 1.0}, {"truncate", true}});
  EXPECT_EQ(CanonicalText(*ParseRope(stated, 131072)), texts[0]);
}

// Caches that were kept under these texts stay what they are.
TEST(CanonicalText, OfTheOldTypesStays) {
  EXPECT_EQ(CanonicalText(RopeParameters()), "theta=10000");
  EXPECT_EQ(CanonicalText(Llama31()), "theta=500000 llama3 factor=8 low=1 high=4 original=8192");
}

struct Refusal {
  std::string name;
  json config;
  absl::StatusCode code;
  std::vector<std::string> message;
};

void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }

class RefusedRope : public ::testing::TestWithParam<Refusal> {};

TEST_P(RefusedRope, NamesFieldValueAndLimit) {
  const auto rope = ParseRope(GetParam().config, 131072);
  ASSERT_FALSE(rope.ok());
  EXPECT_EQ(rope.status().code(), GetParam().code) << rope.status();
  for (const std::string& part : GetParam().message) {
    EXPECT_THAT(std::string(rope.status().message()), HasSubstr(part));
  }
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Values, RefusedRope,
    ::testing::Values(
        Refusal{"no_factor",
                {{"rope_parameters", {{"rope_type", "yarn"}}}},
                kInvalid,
                {"rope_parameters.factor is absent", "from 1 to 1e+06"}},
        Refusal{"factor", Yarn({{"factor", 0.5}}), kInvalid, {"rope_parameters.factor is 0.5", "from 1 to"}},
        Refusal{"factor_null",
                Yarn({{"factor", nullptr}, {"original_max_position_embeddings", 262144}}),
                kInvalid,
                {"rope_parameters.factor is null", "from 1 to 1e+06", "0.5"}},
        Refusal{"factor_text", Yarn({{"factor", "4"}}), kInvalid, {"rope_parameters.factor is \"4\""}},
        Refusal{"original",
                Yarn({{"original_max_position_embeddings", 0}}),
                kInvalid,
                {"rope_parameters.original_max_position_embeddings is 0", "from 1 to"}},
        Refusal{"betas_equal",
                Yarn({{"beta_fast", 2}, {"beta_slow", 2}}),
                kInvalid,
                {"rope_parameters.beta_fast is 2", "above beta_slow, 2"}},
        Refusal{"betas_crossed",
                Yarn({{"beta_fast", 1}, {"beta_slow", 32}}),
                kInvalid,
                {"rope_parameters.beta_fast is 1", "above beta_slow, 32"}},
        Refusal{"beta_slow_over_default",
                Yarn({{"beta_slow", 40}}),
                kInvalid,
                {"rope_parameters.beta_slow is 40", "below beta_fast, 32"}},
        Refusal{"beta_negative",
                Yarn({{"beta_slow", -1}}),
                kInvalid,
                {"rope_parameters.beta_slow is -1", "from 0 to"}},
        Refusal{"attention_factor",
                Yarn({{"attention_factor", -1.0}}),
                kInvalid,
                {"rope_parameters.attention_factor is -1.0", "from 1e-06 to"}},
        Refusal{"attention_factor_zero",
                Yarn({{"attention_factor", 0}}),
                kInvalid,
                {"rope_parameters.attention_factor is 0", "from 1e-06 to"}},
        Refusal{
            "mscale", Yarn({{"mscale", -0.5}}), kInvalid, {"rope_parameters.mscale is -0.5", "from 0 to"}},
        Refusal{"mscale_all_dim",
                Yarn({{"mscale_all_dim", true}}),
                kInvalid,
                {"rope_parameters.mscale_all_dim is true"}},
        Refusal{"truncate", Yarn({{"truncate", 0}}), kInvalid, {"rope_parameters.truncate is 0", "true or"}},
        Refusal{"truncate_null",
                Yarn({{"truncate", nullptr}}),
                kInvalid,
                {"rope_parameters.truncate is null", "true or false"}},
        Refusal{"theta_of_one",
                Yarn({{"rope_theta", 1}}),
                kInvalid,
                {"rope_parameters.rope_theta is 1", "above 1 for yarn"}},
        Refusal{"two_types",
                Yarn({{"type", "linear"}}),
                kInvalid,
                {"rope_parameters.type is \"linear\"", "equal to rope_type, \"yarn\""}},
        Refusal{
            "linear_factor", Linear({{"factor", -2}}), kInvalid, {"rope_scaling.factor is -2", "from 1 to"}},
        Refusal{"linear_no_factor",
                {{"rope_scaling", {{"type", "linear"}}}},
                kInvalid,
                {"rope_scaling.factor is absent"}}),
    [](const auto& row) { return row.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Keys, RefusedRope,
    ::testing::Values(Refusal{"yarn",
                              Yarn({{"llama_4_scaling_beta", 0.1}}),
                              kUnimplemented,
                              {"rope_parameters.llama_4_scaling_beta is 0.1", "attention_factor, mscale"}},
                      Refusal{"linear",
                              Linear({{"attention_factor", 1.2}}),
                              kUnimplemented,
                              {"rope_scaling.attention_factor is 1.2", "supported: factor"}},
                      Refusal{"default",
                              {{"rope_scaling", {{"rope_type", "default"}, {"mrope_section", {16, 24, 24}}}}},
                              kUnimplemented,
                              {"rope_scaling.mrope_section is [16,24,24]"}},
                      Refusal{"nested",
                              {{"rope_parameters",
                                {{"full_attention", {{"rope_type", "default"}}}, {"factor", 2}}}},
                              kUnimplemented,
                              {"rope_parameters.factor is 2", "full_attention"}},
                      Refusal{"dynamic",
                              Yarn({{"rope_type", "dynamic"}}),
                              kUnimplemented,
                              {"rope_parameters.rope_type is \"dynamic\"", "default, linear, llama3, yarn"}},
                      Refusal{"longrope",
                              Linear({{"type", "longrope"}}),
                              kUnimplemented,
                              {"rope_scaling.type is \"longrope\"", "default, linear, llama3, yarn"}}),
    [](const auto& row) { return row.param.name; });

TEST(ParseRope, ReadsParametersNestedUnderFullAttention) {
  const json config = json::parse(R"({"rope_parameters": {"full_attention":
      {"rope_type": "default", "rope_theta": 1000000.0}}})");
  const auto rope = ParseRope(config, 4096);
  ASSERT_TRUE(rope.ok()) << rope.status();
  EXPECT_EQ(rope->theta, 1e6);
  EXPECT_EQ(rope->type, RopeType::kDefault);
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
