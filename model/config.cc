#include "model/config.h"

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"
#include "model/rope.h"

namespace headwater {
namespace {

using nlohmann::json;

constexpr JsonLimits kConfigLimits;
constexpr int64_t kMostLayers = 1024;
constexpr int64_t kMostHidden = 1 << 16;
constexpr int64_t kMostIntermediate = 1 << 20;
constexpr int64_t kMostHeads = 1024;
constexpr int64_t kMostHeadDim = 256;
constexpr int64_t kHeadDimMultiple = 16;
constexpr int64_t kMostVocab = 1 << 22;
constexpr int64_t kMostPosition = 1 << 30;
constexpr size_t kMostEosTokens = 64;

// What transformers takes where config.json is silent. Zero: from the other fields.
struct ArchitectureDefaults {
  const char* name;
  Architecture architecture;
  int64_t num_kv_heads;
  int64_t head_dim;
};
constexpr std::array<ArchitectureDefaults, 4> kArchitectures = {{
    {"LlamaForCausalLM", Architecture::kLlama, 0, 0},
    {"MistralForCausalLM", Architecture::kMistral, 8, 0},
    {"Qwen2ForCausalLM", Architecture::kQwen2, 32, 0},
    {"Qwen3ForCausalLM", Architecture::kQwen3, 32, 128},
}};

absl::StatusOr<ArchitectureDefaults> FindArchitecture(const JsonFields& fields) {
  const json* const names = fields.Find("architectures");
  if (names == nullptr || !names->is_array() || names->size() != 1 || !names->front().is_string()) {
    return fields.Wrong("architectures", "a list with one name");
  }
  std::string known;
  for (const ArchitectureDefaults& candidate : kArchitectures) {
    if (names->front().get_ref<const std::string&>() == candidate.name) return candidate;
    absl::StrAppend(&known, known.empty() ? "" : ", ", candidate.name);
  }
  return fields.NotSupported("architectures", known);
}

// What would change the result if it were ignored, whatever the architecture.
absl::Status RefuseUnsupported(const JsonFields& fields) {
  for (const char* name : {"quantization_config", "compression_config"}) {
    if (fields.Find(name) != nullptr)
      return fields.NotSupported(name, "absent (weights as f32, f16 or bf16)");
  }
  if (fields.Find("dual_chunk_attention_config") != nullptr) {
    return fields.NotSupported("dual_chunk_attention_config", "absent");
  }
  for (const char* name : {"hidden_act", "hidden_activation"}) {
    HW_ASSIGN_OR_RETURN(const std::string activation, fields.String(name, "silu"));
    if (activation != "silu") return fields.NotSupported(name, "silu");
  }
  HW_ASSIGN_OR_RETURN(const bool interleaved, fields.Boolean("rope_interleaved", false));
  if (interleaved) return fields.NotSupported("rope_interleaved", "false");
  HW_ASSIGN_OR_RETURN(const bool causal, fields.Boolean("is_causal", true));
  if (!causal) return fields.NotSupported("is_causal", "true");
  for (const char* name : {"dtype", "torch_dtype"}) {
    HW_ASSIGN_OR_RETURN(const std::string dtype, fields.String(name, "float32"));
    if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16") {
      return fields.NotSupported(name, "float32, float16, bfloat16");
    }
  }
  return absl::OkStatus();
}

absl::Status RefuseSlidingWindow(const JsonFields& fields, Architecture architecture) {
  const bool qwen = architecture == Architecture::kQwen2 || architecture == Architecture::kQwen3;
  HW_ASSIGN_OR_RETURN(const bool used, fields.Boolean("use_sliding_window", false));
  if (used) return fields.NotSupported("use_sliding_window", "false");
  // Qwen's files state a window that use_sliding_window turns off; elsewhere a window that is stated is used.
  if (!qwen && fields.Find("sliding_window") != nullptr) {
    return fields.NotSupported("sliding_window", "null");
  }
  if (architecture == Architecture::kMistral && !fields.Contains("sliding_window")) {
    return fields.NotSupported("sliding_window", "null (absent means 4096 to transformers)");
  }
  const json* const layers = fields.Find("layer_types");
  if (layers == nullptr) return absl::OkStatus();
  if (!layers->is_array()) return fields.Wrong("layer_types", "a list");
  for (const json& layer : *layers) {
    if (layer != "full_attention") return fields.NotSupported("layer_types", "full_attention in every layer");
  }
  return absl::OkStatus();
}

absl::Status ParseSizes(const JsonFields& fields, const ArchitectureDefaults& defaults, ModelConfig* config) {
  const auto read = [&fields](const char* name, int64_t most, std::optional<int64_t> fallback,
                              int32_t* out) -> absl::Status {
    HW_ASSIGN_OR_RETURN(const int64_t value, fields.Integer(name, 1, most, fallback));
    *out = static_cast<int32_t>(value);
    return absl::OkStatus();
  };
  HW_RETURN_IF_ERROR(read("num_hidden_layers", kMostLayers, {}, &config->num_layers));
  HW_RETURN_IF_ERROR(read("hidden_size", kMostHidden, {}, &config->hidden_size));
  HW_RETURN_IF_ERROR(read("intermediate_size", kMostIntermediate, {}, &config->intermediate_size));
  HW_RETURN_IF_ERROR(read("num_attention_heads", kMostHeads, {}, &config->num_q_heads));
  HW_RETURN_IF_ERROR(read("vocab_size", kMostVocab, {}, &config->vocab_size));

  // null means "from the other fields" for every architecture; only an absent key has a default of its own.
  const bool has_kv = fields.Contains("num_key_value_heads");
  const int64_t kv_fallback =
      has_kv || defaults.num_kv_heads == 0 ? config->num_q_heads : defaults.num_kv_heads;
  HW_RETURN_IF_ERROR(read("num_key_value_heads", kMostHeads, kv_fallback, &config->num_kv_heads));
  if (config->num_q_heads % config->num_kv_heads != 0) {
    return fields.Wrong("num_key_value_heads",
                        absl::StrCat("a divisor of num_attention_heads, ", config->num_q_heads, " (it is ",
                                     config->num_kv_heads, ")"));
  }

  const bool has_head_dim = fields.Find("head_dim") != nullptr;
  const bool from_hidden = !has_head_dim && (fields.Contains("head_dim") || defaults.head_dim == 0);
  if (from_hidden && config->hidden_size % config->num_q_heads != 0) {
    return fields.Wrong("hidden_size", absl::StrCat("a multiple of num_attention_heads, ",
                                                    config->num_q_heads, ", where head_dim is absent"));
  }
  const int64_t head_dim_fallback =
      from_hidden ? config->hidden_size / config->num_q_heads : defaults.head_dim;
  if (head_dim_fallback > kMostHeadDim) {
    return absl::InvalidArgumentError(absl::StrCat("hidden_size / num_attention_heads is ", head_dim_fallback,
                                                   "; must be at most ", kMostHeadDim));
  }
  HW_RETURN_IF_ERROR(read("head_dim", kMostHeadDim, head_dim_fallback, &config->head_dim));
  if (config->head_dim % kHeadDimMultiple != 0) {
    return absl::UnimplementedError(absl::StrCat("head_dim is ", config->head_dim,
                                                 ", which is not supported; supported: multiples of ",
                                                 kHeadDimMultiple, " up to ", kMostHeadDim));
  }
  return absl::OkStatus();
}

absl::Status ParseFlags(const JsonFields& fields, ModelConfig* config) {
  const Architecture architecture = config->architecture;
  HW_ASSIGN_OR_RETURN(config->tied_embeddings, fields.Boolean("tie_word_embeddings", false));
  HW_ASSIGN_OR_RETURN(const bool attention_bias, fields.Boolean("attention_bias", false));
  HW_ASSIGN_OR_RETURN(const bool mlp_bias, fields.Boolean("mlp_bias", false));
  // Mistral has no biases, Qwen2 has them on Q, K and V: their code does not look at the fields.
  const bool reads_attention_bias =
      architecture == Architecture::kLlama || architecture == Architecture::kQwen3;
  if (attention_bias && architecture == Architecture::kMistral) {
    return fields.NotSupported("attention_bias", "false");
  }
  if (mlp_bias && architecture != Architecture::kLlama) return fields.NotSupported("mlp_bias", "false");
  config->qkv_bias = architecture == Architecture::kQwen2 || (reads_attention_bias && attention_bias);
  config->output_bias = reads_attention_bias && attention_bias;
  config->mlp_bias = mlp_bias;
  config->qk_norm = architecture == Architecture::kQwen3;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> ParseEosTokens(const JsonFields& fields, int32_t vocab_size) {
  const char* const name = "eos_token_id";
  const json* const value = fields.Find(name);
  if (value == nullptr) return std::vector<int32_t>();
  const std::string wanted = absl::StrCat("a token id below vocab_size, ", vocab_size,
                                          ", or a list of at most ", kMostEosTokens, " of them");
  const json list = value->is_array() ? *value : json::array({*value});
  if (list.size() > kMostEosTokens) return fields.Wrong(name, wanted);
  std::vector<int32_t> ids;
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) {
      return fields.Wrong(name, wanted);
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

absl::StatusOr<ModelConfig> ParseFields(const json& root) {
  const JsonFields fields(root);
  HW_ASSIGN_OR_RETURN(const ArchitectureDefaults defaults, FindArchitecture(fields));
  ModelConfig config;
  config.architecture = defaults.architecture;
  HW_RETURN_IF_ERROR(RefuseUnsupported(fields));
  HW_RETURN_IF_ERROR(RefuseSlidingWindow(fields, config.architecture));
  HW_RETURN_IF_ERROR(ParseSizes(fields, defaults, &config));
  HW_ASSIGN_OR_RETURN(config.max_position, fields.Integer("max_position_embeddings", 1, kMostPosition));
  HW_ASSIGN_OR_RETURN(const double epsilon, fields.Number("rms_norm_eps", 1e-12, 0.1, 1e-6));
  config.rms_norm_epsilon = static_cast<float>(epsilon);
  HW_RETURN_IF_ERROR(ParseFlags(fields, &config));
  HW_ASSIGN_OR_RETURN(const RopeParameters rope, ParseRope(root, config.max_position));
  config.rope = MakeRopeFrequencies(rope, config.head_dim);
  config.rope_text = CanonicalText(rope);
  HW_ASSIGN_OR_RETURN(config.eos_token_ids, ParseEosTokens(fields, config.vocab_size));
  return config;
}

absl::Status WithFile(const absl::Status& status, absl::string_view file) {
  return absl::Status(status.code(), absl::StrCat(file, ": ", status.message()));
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text) {
  HW_ASSIGN_OR_RETURN(const json root, ParseJsonObject(text, kConfigLimits, "config.json"));
  absl::StatusOr<ModelConfig> config = ParseFields(root);
  if (!config.ok()) return WithFile(config.status(), "config.json");
  return config;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& directory) {
  HW_ASSIGN_OR_RETURN(const std::string text,
                      ReadFileUpTo(absl::StrCat(directory, "/config.json"), kConfigLimits.max_bytes));
  HW_ASSIGN_OR_RETURN(ModelConfig config, ParseModelConfig(text));

  const absl::StatusOr<std::string> generation =
      ReadFileUpTo(absl::StrCat(directory, "/generation_config.json"), kConfigLimits.max_bytes);
  if (absl::IsNotFound(generation.status())) return config;
  HW_RETURN_IF_ERROR(generation.status());
  HW_ASSIGN_OR_RETURN(const json root, ParseJsonObject(*generation, kConfigLimits, "generation_config.json"));
  const absl::StatusOr<std::vector<int32_t>> eos = ParseEosTokens(JsonFields(root), config.vocab_size);
  if (!eos.ok()) return WithFile(eos.status(), "generation_config.json");
  if (!eos->empty()) config.eos_token_ids = *eos;
  return config;
}

}  // namespace headwater
