#include "model/presets.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace headwater {
namespace {

// From the models' published config.json.
struct Preset {
  const char* name;
  const char* type;
  int layers, hidden, inner, q_heads, kv_heads, head_dim, vocab;
  double theta;
  const char* epsilon;
  bool tied;
  const char* rope_scaling;
};

constexpr char kLlama31Scaling[] =
    "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, "
    "\"high_freq_factor\": 4.0, "
    "\"original_max_position_embeddings\": 8192},";

constexpr Preset kPresets[] = {
    {"llama-3-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 500000, "1e-05", false, ""},
    {"llama-3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 500000, "1e-05", false, kLlama31Scaling},
    {"qwen2.5-7b", "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 1000000, "1e-06", false, ""},
    {"qwen3-4b", "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 1000000, "1e-06", true, ""},
    {"qwen3-8b", "qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 1000000, "1e-06", false, ""},
    {"smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, 100000, "1e-05", true, ""},
};

}  // namespace

std::vector<std::string> PresetNames() {
  std::vector<std::string> names;
  for (const Preset& preset : kPresets) names.push_back(preset.name);
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<ModelConfig> PresetConfig(absl::string_view name, int64_t max_position) {
  for (const Preset& p : kPresets) {
    if (name != p.name) continue;
    const std::string type = p.type;
    const char* const architecture = type == "qwen2"   ? "Qwen2ForCausalLM"
                                     : type == "qwen3" ? "Qwen3ForCausalLM"
                                                       : "LlamaForCausalLM";
    return ParseModelConfig(absl::StrFormat(
        "{\"architectures\": [\"%s\"], \"model_type\": \"%s\", \"num_hidden_layers\": %d, \"hidden_size\": "
        "%d, "
        "\"intermediate_size\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"head_dim\": "
        "%d, "
        "\"vocab_size\": %d, \"rope_theta\": %.1f, %s \"rms_norm_eps\": %s, \"tie_word_embeddings\": %s, "
        "\"hidden_act\": \"silu\", \"max_position_embeddings\": %d, \"torch_dtype\": \"bfloat16\"}",
        architecture, p.type, p.layers, p.hidden, p.inner, p.q_heads, p.kv_heads, p.head_dim, p.vocab,
        p.theta, p.rope_scaling, p.epsilon, p.tied ? "true" : "false",
        std::max<int64_t>(8192, max_position)));
  }
  return absl::NotFoundError(
      absl::StrCat("no preset '", name, "'; there are ", absl::StrJoin(PresetNames(), ", ")));
}

}  // namespace headwater
