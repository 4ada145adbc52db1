#include "model/config.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace headwater {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// As transformers 4 writes it.
json LlamaJson() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false, "eos_token_id": [128001, 128009],
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"}})");
}

// As transformers 5 writes the same.
json LlamaJson5() {
  json config = LlamaJson();
  config.erase("torch_dtype");
  config["dtype"] = "bfloat16";
  json rope = config["rope_scaling"];
  rope["rope_theta"] = config["rope_theta"];
  config["rope_parameters"] = rope;
  config.erase("rope_scaling");
  config.erase("rope_theta");
  return config;
}

json MistralJson() {
  return json::parse(R"({
    "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
    "max_position_embeddings": 32768, "sliding_window": null, "rope_theta": 1000000.0, "eos_token_id": 2})");
}

json Qwen2Json() {
  return json::parse(R"({
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "sliding_window": 32768, "max_window_layers": 21,
    "use_sliding_window": false, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": true, "eos_token_id": 151645})");
}

json Qwen3Json() {
  return json::parse(R"({
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "sliding_window": null,
    "use_sliding_window": false, "attention_bias": false, "rope_theta": 1000000, "rope_scaling": null,
    "tie_word_embeddings": true, "eos_token_id": 151645})");
}

TEST(ParseModelConfig, ReadsLlamaInTheSpellingOfTransformers4) {
  const auto config = ParseModelConfig(LlamaJson().dump());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, Architecture::kLlama);
  EXPECT_EQ(config->num_layers, 16);
  EXPECT_EQ(config->hidden_size, 2048);
  EXPECT_EQ(config->intermediate_size, 8192);
  EXPECT_EQ(config->num_q_heads, 32);
  EXPECT_EQ(config->num_kv_heads, 8);
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->vocab_size, 128256);
  EXPECT_EQ(config->max_position, 131072);
  EXPECT_FLOAT_EQ(config->rms_norm_epsilon, 1e-5f);
  EXPECT_TRUE(config->tied_embeddings);
  EXPECT_FALSE(config->qkv_bias || config->output_bias || config->mlp_bias || config->qk_norm);
  EXPECT_EQ(config->rope.inverse.size(), 32u);
  EXPECT_EQ(config->rope.attention_factor, 1);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(128001, 128009));
}

TEST(ParseModelConfig, ReadsBothSpellingsAlike) {
  const auto old_config = ParseModelConfig(LlamaJson().dump());
  const auto new_config = ParseModelConfig(LlamaJson5().dump());
  ASSERT_TRUE(old_config.ok()) << old_config.status();
  ASSERT_TRUE(new_config.ok()) << new_config.status();
  EXPECT_EQ(old_config->rope.inverse, new_config->rope.inverse);
  EXPECT_EQ(old_config->rope_text, new_config->rope_text);
}

TEST(ParseModelConfig, TakesYarnToTheFrequenciesAndLeavesTheLimit) {
  json config = Qwen2Json();
  const auto plain = ParseModelConfig(config.dump());
  config["rope_scaling"] = {{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 16384}};
  const auto yarn = ParseModelConfig(config.dump());
  ASSERT_TRUE(plain.ok()) << plain.status();
  ASSERT_TRUE(yarn.ok()) << yarn.status();
  EXPECT_DOUBLE_EQ(yarn->rope.attention_factor, 1 + 0.1 * std::log(4.0));
  EXPECT_EQ(yarn->rope.inverse.front(), plain->rope.inverse.front());
  EXPECT_DOUBLE_EQ(yarn->rope.inverse.back(), plain->rope.inverse.back() / 4);
  EXPECT_NE(yarn->rope_text, plain->rope_text);
  EXPECT_EQ(yarn->max_position, plain->max_position);
}

TEST(ParseModelConfig, ReadsQwenAndMistral) {
  const auto mistral = ParseModelConfig(MistralJson().dump());
  ASSERT_TRUE(mistral.ok()) << mistral.status();
  EXPECT_EQ(mistral->architecture, Architecture::kMistral);
  EXPECT_EQ(mistral->head_dim, 128);
  EXPECT_FALSE(mistral->tied_embeddings);
  EXPECT_FLOAT_EQ(mistral->rms_norm_epsilon, 1e-6f);

  const auto qwen2 = ParseModelConfig(Qwen2Json().dump());
  ASSERT_TRUE(qwen2.ok()) << qwen2.status();
  EXPECT_EQ(qwen2->architecture, Architecture::kQwen2);
  EXPECT_TRUE(qwen2->qkv_bias);
  EXPECT_FALSE(qwen2->output_bias);
  EXPECT_FALSE(qwen2->qk_norm);

  const auto qwen3 = ParseModelConfig(Qwen3Json().dump());
  ASSERT_TRUE(qwen3.ok()) << qwen3.status();
  EXPECT_EQ(qwen3->architecture, Architecture::kQwen3);
  EXPECT_EQ(qwen3->head_dim, 128);
  EXPECT_TRUE(qwen3->qk_norm);
  EXPECT_FALSE(qwen3->qkv_bias);
}

TEST(ParseModelConfig, TakesTransformersDefaultsForAbsentFields) {
  json llama = LlamaJson();
  for (const char* name : {"num_key_value_heads", "rope_scaling", "rope_theta", "eos_token_id",
                           "rms_norm_eps", "hidden_act", "tie_word_embeddings", "torch_dtype"}) {
    llama.erase(name);
  }
  const auto config = ParseModelConfig(llama.dump());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->num_kv_heads, 32);
  EXPECT_EQ(config->rope_text, "theta=10000");
  EXPECT_THAT(config->eos_token_ids, IsEmpty());
  EXPECT_FLOAT_EQ(config->rms_norm_epsilon, 1e-6f);
  EXPECT_FALSE(config->tied_embeddings);

  json mistral = MistralJson();
  mistral.erase("num_key_value_heads");
  EXPECT_EQ(ParseModelConfig(mistral.dump())->num_kv_heads, 8);
  mistral["num_key_value_heads"] = nullptr;
  EXPECT_EQ(ParseModelConfig(mistral.dump())->num_kv_heads, 32);

  json qwen3 = Qwen3Json();
  qwen3.erase("head_dim");
  EXPECT_EQ(ParseModelConfig(qwen3.dump())->head_dim, 128);
  qwen3["head_dim"] = nullptr;
  EXPECT_EQ(ParseModelConfig(qwen3.dump())->head_dim, 64);
}

TEST(ParseModelConfig, ReadsAttentionAndMlpBiasWhereTheArchitectureHasThem) {
  json llama = LlamaJson();
  llama["attention_bias"] = true;
  llama["mlp_bias"] = true;
  const auto config = ParseModelConfig(llama.dump());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->qkv_bias && config->output_bias && config->mlp_bias);
}

struct Change {
  std::string label;
  json base;
  json patch;  // RFC 7396, but null sets null and "<erase>" erases
  absl::StatusCode code;
  std::vector<std::string> message;
};

void PrintTo(const Change& change, std::ostream* out) { *out << change.label; }

class RefusedConfig : public ::testing::TestWithParam<Change> {};

TEST_P(RefusedConfig, NamesFieldAndValue) {
  json config = GetParam().base;
  for (const auto& [name, value] : GetParam().patch.items()) {
    if (value == "<erase>") {
      config.erase(name);
    } else {
      config[name] = value;
    }
  }
  const auto parsed = ParseModelConfig(config.dump());
  ASSERT_FALSE(parsed.ok());
  EXPECT_EQ(parsed.status().code(), GetParam().code) << parsed.status();
  for (const std::string& part : GetParam().message) {
    EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(part));
  }
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

json Llama3(const json& changes) {
  json rope = LlamaJson()["rope_scaling"];
  rope.update(changes);
  return {{"rope_scaling", rope}};
}

INSTANTIATE_TEST_SUITE_P(
    NotSupported, RefusedConfig,
    ::testing::Values(
        Change{"architecture",
               LlamaJson(),
               {{"architectures", {"GemmaForCausalLM"}}},
               kUnimplemented,
               {"GemmaForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"}},
        Change{"mistral_window",
               MistralJson(),
               {{"sliding_window", 4096}},
               kUnimplemented,
               {"sliding_window is 4096", "null"}},
        Change{"mistral_window_absent",
               MistralJson(),
               {{"sliding_window", "<erase>"}},
               kUnimplemented,
               {"sliding_window is absent"}},
        Change{"llama_window",
               LlamaJson(),
               {{"sliding_window", 512}},
               kUnimplemented,
               {"sliding_window is 512"}},
        Change{"qwen2_window",
               Qwen2Json(),
               {{"use_sliding_window", true}},
               kUnimplemented,
               {"use_sliding_window is true"}},
        Change{"qwen3_window",
               Qwen3Json(),
               {{"use_sliding_window", true}},
               kUnimplemented,
               {"use_sliding_window is true"}},
        Change{"layer_types",
               Qwen3Json(),
               {{"layer_types", {"full_attention", "sliding_attention"}}},
               kUnimplemented,
               {"layer_types", "sliding_attention"}},
        Change{"rope_dynamic",
               LlamaJson(),
               {{"rope_scaling", {{"rope_type", "dynamic"}, {"factor", 2.0}}}},
               kUnimplemented,
               {"rope_scaling.rope_type is \"dynamic\"", "default, linear, llama3, yarn"}},
        Change{"rope_longrope",
               LlamaJson(),
               {{"rope_scaling", {{"rope_type", "longrope"}}}},
               kUnimplemented,
               {"longrope"}},
        Change{"rope_longrope_nested",
               Qwen3Json(),
               {{"rope_parameters", {{"full_attention", {{"type", "longrope"}}}}}},
               kUnimplemented,
               {"rope_parameters.full_attention.type is \"longrope\""}},
        Change{"partial",
               LlamaJson(),
               {{"partial_rotary_factor", 0.5}},
               kUnimplemented,
               {"partial_rotary_factor is 0.5"}},
        Change{"partial_inside",
               LlamaJson(),
               Llama3({{"partial_rotary_factor", 0.25}}),
               kUnimplemented,
               {"rope_scaling.partial_rotary_factor is 0.25"}},
        Change{"quantization",
               LlamaJson(),
               {{"quantization_config", {{"quant_method", "awq"}}}},
               kUnimplemented,
               {"quantization_config", "awq"}},
        Change{"dual_chunk",
               Qwen2Json(),
               {{"dual_chunk_attention_config", {{"chunk_size", 262144}}}},
               kUnimplemented,
               {"dual_chunk_attention_config", "262144"}},
        Change{
            "activation", LlamaJson(), {{"hidden_act", "gelu"}}, kUnimplemented, {"hidden_act is \"gelu\""}},
        Change{"dtype", LlamaJson(), {{"torch_dtype", "float8_e4m3fn"}}, kUnimplemented, {"float8_e4m3fn"}},
        Change{
            "interleaved", LlamaJson(), {{"rope_interleaved", true}}, kUnimplemented, {"rope_interleaved"}},
        Change{"not_causal", LlamaJson(), {{"is_causal", false}}, kUnimplemented, {"is_causal"}},
        Change{"mlp_bias", Qwen3Json(), {{"mlp_bias", true}}, kUnimplemented, {"mlp_bias"}},
        Change{"mistral_bias", MistralJson(), {{"attention_bias", true}}, kUnimplemented, {"attention_bias"}},
        Change{"head_dim_24", LlamaJson(), {{"head_dim", 24}}, kUnimplemented, {"head_dim is 24"}},
        Change{"head_dim_odd", LlamaJson(), {{"head_dim", 63}}, kUnimplemented, {"head_dim is 63"}}),
    [](const auto& row) { return row.param.label; });

INSTANTIATE_TEST_SUITE_P(
    Malformed, RefusedConfig,
    ::testing::Values(
        Change{"no_architecture",
               LlamaJson(),
               {{"architectures", "<erase>"}},
               kInvalid,
               {"architectures is absent"}},
        Change{"two_architectures",
               LlamaJson(),
               {{"architectures", {"LlamaForCausalLM", "Qwen2ForCausalLM"}}},
               kInvalid,
               {"one name"}},
        Change{"architecture_string",
               LlamaJson(),
               {{"architectures", "LlamaForCausalLM"}},
               kInvalid,
               {"architectures"}},
        Change{"no_hidden", LlamaJson(), {{"hidden_size", "<erase>"}}, kInvalid, {"hidden_size is absent"}},
        Change{"hidden_zero", LlamaJson(), {{"hidden_size", 0}}, kInvalid, {"hidden_size is 0", "65536"}},
        Change{"hidden_huge", LlamaJson(), {{"hidden_size", 1 << 20}}, kInvalid, {"hidden_size is 1048576"}},
        Change{"hidden_2_64",
               LlamaJson(),
               {{"hidden_size", 18446744073709551615u}},
               kInvalid,
               {"hidden_size is 18446744073709551615"}},
        Change{
            "hidden_string", LlamaJson(), {{"hidden_size", "2048"}}, kInvalid, {"hidden_size is \"2048\""}},
        Change{"hidden_float", LlamaJson(), {{"hidden_size", 2048.5}}, kInvalid, {"hidden_size is 2048.5"}},
        Change{"layers_negative",
               LlamaJson(),
               {{"num_hidden_layers", -1}},
               kInvalid,
               {"num_hidden_layers is -1"}},
        Change{"heads_not_dividing",
               LlamaJson(),
               {{"num_attention_heads", 24}},
               kInvalid,
               {"hidden_size is 2048", "24"}},
        Change{"kv_not_dividing",
               LlamaJson(),
               {{"num_key_value_heads", 5}},
               kInvalid,
               {"num_key_value_heads is 5", "32"}},
        Change{"kv_zero", LlamaJson(), {{"num_key_value_heads", 0}}, kInvalid, {"num_key_value_heads is 0"}},
        Change{"kv_default_not_dividing",
               Qwen2Json(),
               {{"num_key_value_heads", "<erase>"}},
               kInvalid,
               {"num_key_value_heads is absent", "32"}},
        Change{"head_dim_large", LlamaJson(), {{"head_dim", 512}}, kInvalid, {"head_dim is 512"}},
        Change{"head_dim_derived_large",
               LlamaJson(),
               {{"num_attention_heads", 4}, {"num_key_value_heads", 4}},
               kInvalid,
               {"512", "256"}},
        Change{"vocab_zero", LlamaJson(), {{"vocab_size", 0}}, kInvalid, {"vocab_size is 0"}},
        Change{"no_limit",
               LlamaJson(),
               {{"max_position_embeddings", nullptr}},
               kInvalid,
               {"max_position_embeddings is null"}},
        Change{"epsilon", LlamaJson(), {{"rms_norm_eps", 0}}, kInvalid, {"rms_norm_eps is 0"}},
        Change{
            "tied_string", LlamaJson(), {{"tie_word_embeddings", "yes"}}, kInvalid, {"tie_word_embeddings"}},
        Change{"eos_over", LlamaJson(), {{"eos_token_id", 128256}}, kInvalid, {"eos_token_id is 128256"}},
        Change{"eos_negative", LlamaJson(), {{"eos_token_id", {-1}}}, kInvalid, {"eos_token_id is [-1]"}},
        Change{"eos_string", LlamaJson(), {{"eos_token_id", "</s>"}}, kInvalid, {"eos_token_id"}},
        Change{"rope_string", LlamaJson(), {{"rope_scaling", "llama3"}}, kInvalid, {"rope_scaling"}},
        Change{"rope_type_number",
               LlamaJson(),
               {{"rope_scaling", {{"rope_type", 3}}}},
               kInvalid,
               {"rope_scaling.rope_type is 3"}},
        Change{"theta_zero", LlamaJson(), {{"rope_theta", 0}}, kInvalid, {"rope_theta is 0"}},
        Change{"theta_twice",
               LlamaJson(),
               Llama3({{"rope_theta", 10000.0}}),
               kInvalid,
               {"rope_scaling.rope_theta", "500000"}},
        Change{"no_factor",
               LlamaJson(),
               {{"rope_scaling", {{"rope_type", "llama3"}}}},
               kInvalid,
               {"rope_scaling.factor is absent"}},
        Change{"factor_below_one",
               LlamaJson(),
               Llama3({{"factor", 0.5}}),
               kInvalid,
               {"rope_scaling.factor is 0.5"}},
        Change{"factors_crossed",
               LlamaJson(),
               Llama3({{"high_freq_factor", 1.0}}),
               kInvalid,
               {"high_freq_factor", "low_freq_factor"}},
        Change{"two_ropes",
               LlamaJson(),
               {{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500000.0}}}},
               kInvalid,
               {"rope_scaling", "rope_parameters", "agree"}}),
    [](const auto& row) { return row.param.label; });

TEST(ParseModelConfig, TakesBothRopeSpellingsWhereTheyAgree) {
  json config = LlamaJson();
  config["rope_parameters"] = LlamaJson5()["rope_parameters"];
  EXPECT_TRUE(ParseModelConfig(config.dump()).ok());
}

TEST(ParseModelConfig, RefusesWhatIsNotJson) {
  const std::string deep = "{\"a\":" + std::string(100'000, '[');
  const std::string duplicate = R"({"hidden_size": 64, "hidden_size": 64})";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "not JSON"},
      {"[]", "object"},
      {"{", "not JSON"},
      {"{} x", "not JSON"},
      {"{\"a\": NaN}", "not JSON"},
      {"{\"a\": 1e999}", "not JSON"},
      {deep, "nested deeper than 16"},
      {duplicate, "\"hidden_size\" appears twice"},
      {"{\"a\": \"\xff\xfe\"}", "not JSON"},
      {std::string(2 << 20, ' '), "2097152 bytes"},
  };
  for (const auto& [text, part] : cases) {
    const auto config = ParseModelConfig(text);
    ASSERT_FALSE(config.ok()) << text.substr(0, 40);
    EXPECT_EQ(config.status().code(), kInvalid);
    EXPECT_THAT(std::string(config.status().message()), HasSubstr(part));
  }
}

}  // namespace
}  // namespace headwater
