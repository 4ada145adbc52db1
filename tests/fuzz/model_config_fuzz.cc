// config.json of a checkpoint, and JSON under limits in general.
#include <cmath>
#include <string>

#include "model/config.h"
#include "model/json.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

void Run(absl::string_view input) {
  const absl::StatusOr<nlohmann::json> parsed = ParseJsonObject(input, {4096, 6, 200}, "input");
  FUZZ_EXPECT(parsed.ok() || absl::IsInvalidArgument(parsed.status()), parsed.status().ToString().c_str());
  const absl::StatusOr<ModelConfig> config = ParseModelConfig(input);
  if (!config.ok()) {
    FUZZ_EXPECT(absl::IsInvalidArgument(config.status()) || absl::IsUnimplemented(config.status()),
                config.status().ToString().c_str());
    FUZZ_EXPECT(config.status().message().size() < 2048, "a message that grows with its input");
    return;
  }
  FUZZ_EXPECT(config->num_layers >= 1 && config->hidden_size >= 1 && config->vocab_size >= 1, "sizes");
  FUZZ_EXPECT(config->num_kv_heads >= 1 && config->num_q_heads % config->num_kv_heads == 0, "heads");
  FUZZ_EXPECT(config->head_dim >= 1 && config->head_dim <= 256, "head_dim");
  FUZZ_EXPECT(config->max_position >= 1, "positions");
  FUZZ_EXPECT(std::isfinite(config->rms_norm_epsilon), "a finite epsilon");
  FUZZ_EXPECT(config->eos_token_ids.size() <= 64, "bounded ends");
}

std::vector<std::string> Seeds() {
  const std::string sizes =
      R"("hidden_size":64,"intermediate_size":128,"num_hidden_layers":2,"num_attention_heads":4,)"
      R"("num_key_value_heads":2,"vocab_size":256,"max_position_embeddings":512,"rms_norm_eps":1e-5,)"
      R"("hidden_act":"silu","torch_dtype":"bfloat16","eos_token_id":[2,3],"head_dim":16)";
  return {
      R"({"architectures":["LlamaForCausalLM"],"rope_theta":10000.0,)" + sizes + "}",
      R"({"architectures":["Qwen3ForCausalLM"],"use_sliding_window":false,"rope_scaling":{"rope_type":"yarn",)"
      R"("factor":4.0,"original_max_position_embeddings":128},)" +
          sizes + "}",
      R"({"architectures":["LlamaForCausalLM"],"rope_parameters":{"rope_type":"llama3","factor":8.0,)"
      R"("low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":128,)"
      R"("rope_theta":500000.0},)" +
          sizes + "}",
      R"({"architectures":["MistralForCausalLM"],"sliding_window":null,"tie_word_embeddings":true,)" + sizes +
          "}",
      R"({"architectures":["Qwen2ForCausalLM"],"layer_types":["full_attention"],"rope_scaling":)"
      R"({"type":"linear","factor":2},)" +
          sizes + "}"};
}

const Registration kTarget({"model_config", Run, Seeds, nullptr});

}  // namespace
}  // namespace headwater::fuzz
