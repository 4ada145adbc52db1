// Configuration of a Hugging Face checkpoint directory, checked and brought into one form.
#ifndef HW_MODEL_CONFIG_H_
#define HW_MODEL_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

#include "kernels/dtype.h"
#include "kernels/ops/layer_ops.h"

namespace headwater {

enum class Architecture { kLlama, kMistral, kQwen2, kQwen3 };

struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  int32_t num_layers = 0;
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t vocab_size = 0;
  int64_t max_position = 0;
  float rms_norm_epsilon = 0;
  bool tied_embeddings = false;
  bool qkv_bias = false;
  bool output_bias = false;  // attention's output projection (Llama's attention_bias)
  bool mlp_bias = false;
  bool qk_norm = false;
  kernels::RopeFrequencies rope;  // with yarn's attention factor
  std::string rope_text;          // what `rope` was made from; equal for equal parameters only
  // Tokens that end a generation; may be empty. generation_config.json's, where it names any, else
  // config.json's.
  std::vector<int32_t> eos_token_ids;
};

// Parses config.json. Takes both spellings that transformers 4 and 5 write (torch_dtype/dtype; rope_theta +
// rope_scaling / rope_parameters). Refuses by name what would silently change the result: unknown
// architectures, an active sliding window, rope types other than default, linear, llama3 and yarn, unknown
// keys of a rope's block, partial_rotary_factor other than 1, quantization_config, dual-chunk attention,
// activations other than SiLU, sizes out of range. max_position_embeddings is the limit as it stands,
// whatever the rope's factor: who adds yarn to a checkpoint raises it, as with transformers. Fields that are
// absent take transformers' defaults for the architecture.
//
// UNIMPLEMENTED: well-formed, but not supported; INVALID_ARGUMENT: malformed, contradictory or out of range.
// The message names the field, its value and what is taken.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json);

// Reads and parses `directory`/config.json and, where it exists, generation_config.json. NOT_FOUND: no
// config.json.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& directory);

}  // namespace headwater

#endif  // HW_MODEL_CONFIG_H_
