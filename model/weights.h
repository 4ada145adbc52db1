// From a checkpoint's tensors to packed layers.
#ifndef HW_MODEL_WEIGHTS_H_
#define HW_MODEL_WEIGHTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "kernels/dtype.h"
#include "kernels/ops/linear.h"
#include "model/config.h"
#include "model/fingerprint.h"
#include "model/safetensors.h"

namespace headwater {

struct LayerWeights {
  std::vector<float> input_norm;         // [hidden_size]
  std::unique_ptr<kernels::Linear> qkv;  // [(num_q_heads + 2 * num_kv_heads) * head_dim, hidden_size]
  std::vector<float> q_norm;             // [head_dim], or empty
  std::vector<float> k_norm;
  std::unique_ptr<kernels::Linear> output;   // [hidden_size, num_q_heads * head_dim]
  std::vector<float> post_attention_norm;    // [hidden_size]
  std::unique_ptr<kernels::Linear> gate_up;  // [2 * intermediate_size, hidden_size]
  std::unique_ptr<kernels::Linear> down;     // [hidden_size, intermediate_size]
};

struct ModelWeights {
  std::unique_ptr<Checkpoint> checkpoint;  // keeps the map that `embedding` may point into
  const void* embedding = nullptr;         // [vocab_size, hidden_size]
  kernels::DType embedding_dtype = kernels::DType::kF32;
  std::vector<uint8_t> embedding_copy;  // where the map is not aligned for its type
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;             // [hidden_size]
  std::unique_ptr<kernels::Linear> lm_head;  // [vocab_size, hidden_size]
  uint64_t bytes = 0;                        // all of the above but the map
  std::string fingerprint;
};

// Bytes that the weights take in memory at least, from the config alone: linear layers in `compute`, norms
// and biases in f32. Packing may pad them; LoadWeights() counts what it really takes.
uint64_t PlannedWeightBytes(const ModelConfig& config, kernels::DType compute);

// Reads and packs all weights. `budget_bytes` 0: no limit. INVALID_ARGUMENT names a tensor that is missing or
// has another dtype or shape than the config demands; RESOURCE_EXHAUSTED: over the budget (checked on the
// plan before the first byte is read, and again after each layer), or no memory.
absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config, std::unique_ptr<Checkpoint> checkpoint,
                                         kernels::DType compute, uint64_t budget_bytes);

}  // namespace headwater

#endif  // HW_MODEL_WEIGHTS_H_
