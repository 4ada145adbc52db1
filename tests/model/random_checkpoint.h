// Small checkpoints with random weights, of any shape.
#ifndef HW_TESTS_MODEL_RANDOM_CHECKPOINT_H_
#define HW_TESTS_MODEL_RANDOM_CHECKPOINT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace headwater::testing {

struct CheckpointShape {
  std::string model_type = "llama";  // or qwen2 (QKV bias), qwen3 (QK norm)
  int num_layers = 2;
  int hidden_size = 256;
  int intermediate_size = 320;
  int num_q_heads = 4;
  int num_kv_heads = 2;
  int head_dim = 64;
  int vocab_size = 512;
  bool tied_embeddings = false;
  bool biases = false;  // attention_bias and mlp_bias, which Llama may have
  kernels::DType dtype = kernels::DType::kBF16;
};

// Writes config.json and model.safetensors. Weights are normal, of a size that keeps activations near 1;
// equal seeds give equal files.
void WriteRandomCheckpoint(const std::string& directory, const CheckpointShape& shape, uint32_t seed);

// Token ids below `vocab`; the same every time.
std::vector<int32_t> RandomTokens(int count, int vocab);

}  // namespace headwater::testing

#endif  // HW_TESTS_MODEL_RANDOM_CHECKPOINT_H_
