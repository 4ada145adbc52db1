#include "tests/support/tiny_model.h"

#include <cmath>
#include <fstream>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "kernels/dtype.h"

namespace headwater::testing {
namespace {

class SafetensorsWriter {
 public:
  // Normally distributed with the given mean and deviation.
  void Add(const std::string& name, int rows, int columns, float mean, float deviation) {
    const size_t begin = data_.size() * sizeof(uint16_t);
    // Not std::normal_distribution: its values differ between standard libraries.
    for (int64_t i = 0; i < int64_t{rows} * columns; ++i) {
      const double u = (static_cast<double>(generator_()) + 1) / 4294967297.0;
      const double v = static_cast<double>(generator_()) / 4294967296.0;
      const double normal = std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * v);
      data_.push_back(kernels::F32ToBF16(mean + deviation * static_cast<float>(normal)));
    }
    const std::string shape = rows == 1 ? absl::StrCat(columns) : absl::StrCat(rows, ",", columns);
    absl::StrAppend(&header_, header_.empty() ? "{" : ",", "\"", name, "\":{\"dtype\":\"BF16\",\"shape\":[",
                    shape, "],\"data_offsets\":[", begin, ",", data_.size() * sizeof(uint16_t), "]}");
  }

  void Write(const std::string& path) const {
    std::string header = header_ + "}";
    while (header.size() % 8 != 0) header.push_back(' ');
    const uint64_t length = header.size();
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), sizeof(length));
    out.write(header.data(), static_cast<std::streamsize>(header.size()));
    out.write(reinterpret_cast<const char*>(data_.data()),
              static_cast<std::streamsize>(data_.size() * sizeof(uint16_t)));
    HW_CHECK(out.good());
  }

  explicit SafetensorsWriter(uint64_t seed) : generator_(static_cast<uint32_t>(seed)) {}

 private:
  std::mt19937 generator_;
  std::string header_;
  std::vector<uint16_t> data_;
};

}  // namespace

void WriteTinyModel(const TinyModel& model, const std::string& directory) {
  SafetensorsWriter writer(model.seed);
  const float scale = 1.0f / std::sqrt(static_cast<float>(model.hidden));
  writer.Add("model.embed_tokens.weight", model.vocab, model.hidden, 0, 1);
  for (int layer = 0; layer < model.layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const int q_width = model.q_heads * model.head_dim;
    const int kv_width = model.kv_heads * model.head_dim;
    writer.Add(prefix + "input_layernorm.weight", 1, model.hidden, 1, 0.1f);
    writer.Add(prefix + "self_attn.q_proj.weight", q_width, model.hidden, 0, scale);
    writer.Add(prefix + "self_attn.k_proj.weight", kv_width, model.hidden, 0, scale);
    writer.Add(prefix + "self_attn.v_proj.weight", kv_width, model.hidden, 0, scale);
    writer.Add(prefix + "self_attn.o_proj.weight", model.hidden, q_width, 0, scale);
    writer.Add(prefix + "post_attention_layernorm.weight", 1, model.hidden, 1, 0.1f);
    writer.Add(prefix + "mlp.gate_proj.weight", model.intermediate, model.hidden, 0, scale);
    writer.Add(prefix + "mlp.up_proj.weight", model.intermediate, model.hidden, 0, scale);
    writer.Add(prefix + "mlp.down_proj.weight", model.hidden, model.intermediate, 0, scale);
  }
  writer.Add("model.norm.weight", 1, model.hidden, 1, 0.1f);
  writer.Write(directory + "/model.safetensors");

  std::ofstream config(directory + "/config.json");
  config << absl::StrCat(
      "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_act\":\"silu\"",
      ",\"hidden_size\":", model.hidden, ",\"intermediate_size\":", model.intermediate,
      ",\"num_hidden_layers\":", model.layers, ",\"num_attention_heads\":", model.q_heads,
      ",\"num_key_value_heads\":", model.kv_heads, ",\"head_dim\":", model.head_dim,
      ",\"vocab_size\":", model.vocab, ",\"max_position_embeddings\":", model.max_position,
      ",\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"tie_word_embeddings\":true,\"torch_dtype\":"
      "\"bfloat16\"}");
  HW_CHECK(config.good());
}

}  // namespace headwater::testing
