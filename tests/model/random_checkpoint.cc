#include "tests/model/random_checkpoint.h"

#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "tests/model/checkpoint_files.h"

namespace headwater::testing {
namespace {

class Writer {
 public:
  Writer(const CheckpointShape& shape, uint32_t seed) : shape_(shape), random_(seed) {}

  OwnedTensors All() {
    const int hidden = shape_.hidden_size, inner = shape_.intermediate_size;
    const int q = shape_.num_q_heads * shape_.head_dim, kv = shape_.num_kv_heads * shape_.head_dim;
    const bool qkv_bias = shape_.biases || shape_.model_type == "qwen2";
    Add("model.embed_tokens", {shape_.vocab_size, hidden}, 1);
    for (int layer = 0; layer < shape_.num_layers; ++layer) {
      const std::string prefix = absl::StrCat("model.layers.", layer, ".");
      const std::string attention = absl::StrCat(prefix, "self_attn."), mlp = absl::StrCat(prefix, "mlp.");
      Norm(absl::StrCat(prefix, "input_layernorm"), hidden);
      Norm(absl::StrCat(prefix, "post_attention_layernorm"), hidden);
      Linear(absl::StrCat(attention, "q_proj"), q, hidden, qkv_bias);
      Linear(absl::StrCat(attention, "k_proj"), kv, hidden, qkv_bias);
      Linear(absl::StrCat(attention, "v_proj"), kv, hidden, qkv_bias);
      if (shape_.model_type == "qwen3") {
        Norm(absl::StrCat(attention, "q_norm"), shape_.head_dim);
        Norm(absl::StrCat(attention, "k_norm"), shape_.head_dim);
      }
      Linear(absl::StrCat(attention, "o_proj"), hidden, q, shape_.biases);
      Linear(absl::StrCat(mlp, "gate_proj"), inner, hidden, shape_.biases);
      Linear(absl::StrCat(mlp, "up_proj"), inner, hidden, shape_.biases);
      Linear(absl::StrCat(mlp, "down_proj"), hidden, inner, shape_.biases);
    }
    Norm("model.norm", hidden);
    if (!shape_.tied_embeddings) Linear("lm_head", shape_.vocab_size, hidden, false);
    return shape_.dtype == kernels::DType::kF32 ? tensors_ : ConvertTensors(tensors_, shape_.dtype);
  }

 private:
  void Add(const std::string& stem, std::vector<int64_t> shape, float size, const char* kind = ".weight",
           float mean = 0) {
    size_t count = 1;
    for (const int64_t extent : shape) count *= static_cast<size_t>(extent);
    std::normal_distribution<float> normal(mean, size);
    std::string bytes(count * sizeof(float), 0);
    for (size_t i = 0; i < count; ++i) {
      const float value = normal(random_);
      bytes.replace(i * sizeof(float), sizeof(float), reinterpret_cast<const char*>(&value), sizeof(float));
    }
    tensors_[stem + kind] = {"F32", std::move(shape), std::move(bytes)};
  }
  void Norm(const std::string& stem, int size) { Add(stem, {size}, 0.1f, ".weight", 1); }
  void Linear(const std::string& stem, int rows, int columns, bool bias) {
    Add(stem, {rows, columns}, 1 / std::sqrt(static_cast<float>(columns)));
    if (bias) Add(stem, {rows}, 0.5f, ".bias");
  }

  const CheckpointShape& shape_;
  std::mt19937 random_;
  OwnedTensors tensors_;
};

std::string Config(const CheckpointShape& shape) {
  const char* const architecture = shape.model_type == "qwen2"   ? "Qwen2ForCausalLM"
                                   : shape.model_type == "qwen3" ? "Qwen3ForCausalLM"
                                                                 : "LlamaForCausalLM";
  const std::string biases =
      shape.model_type == "llama"
          ? absl::StrFormat("\"attention_bias\": %s, \"mlp_bias\": %s,", shape.biases ? "true" : "false",
                            shape.biases ? "true" : "false")
          : "";
  return absl::StrFormat(
      "{\"architectures\": [\"%s\"], \"model_type\": \"%s\", \"hidden_size\": %d, \"intermediate_size\": %d, "
      "\"num_hidden_layers\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"head_dim\": "
      "%d, "
      "\"vocab_size\": %d, \"tie_word_embeddings\": %s, %s \"hidden_act\": \"silu\", \"rms_norm_eps\": "
      "1e-05, "
      "\"rope_theta\": 10000.0, \"max_position_embeddings\": 65536, \"torch_dtype\": \"bfloat16\"}\n",
      architecture, shape.model_type, shape.hidden_size, shape.intermediate_size, shape.num_layers,
      shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.vocab_size,
      shape.tied_embeddings ? "true" : "false", biases);
}

}  // namespace

void WriteRandomCheckpoint(const std::string& directory, const CheckpointShape& shape, uint32_t seed) {
  WriteFile(absl::StrCat(directory, "/config.json"), Config(shape));
  WriteFile(absl::StrCat(directory, "/model.safetensors"), Serialize(Writer(shape, seed).All()));
}

std::vector<int32_t> RandomTokens(int count, int vocab) {
  std::mt19937 random(7);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % static_cast<unsigned>(vocab));
  return tokens;
}

}  // namespace headwater::testing
