// From a checkpoint's tensors to weights in device memory.
#ifndef HW_MODEL_CUDA_CUDA_WEIGHTS_H_
#define HW_MODEL_CUDA_CUDA_WEIGHTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "model/config.h"
#include "model/cuda/device_buffer.h"
#include "model/safetensors.h"

namespace headwater {

// Device memory. Matrices are bf16 [out_features, in_features]; a bias has the type of what it is added to;
// null: the model has none.
struct CudaLayerWeights {
  const float* input_norm = nullptr;  // [hidden_size]
  const void* qkv = nullptr;          // rows of Q, K and V, one after the other
  const void* qkv_bias = nullptr;     // bf16
  const float* q_norm = nullptr;      // [head_dim]
  const float* k_norm = nullptr;
  const void* output = nullptr;
  const float* output_bias = nullptr;
  const float* post_attention_norm = nullptr;
  const void* gate_up = nullptr;       // rows of gate, then of up
  const void* gate_up_bias = nullptr;  // bf16
  const void* down = nullptr;
  const float* down_bias = nullptr;
};

struct CudaWeights {
  DeviceBuffer memory;              // all of it
  const void* embedding = nullptr;  // bf16 [vocab_size, hidden_size]
  std::vector<CudaLayerWeights> layers;
  const float* final_norm = nullptr;
  const void* lm_head = nullptr;  // bf16 [vocab_size, hidden_size]; the embedding, where they are tied
  std::string fingerprint;        // as Model::fingerprint()
};

// Bytes of device memory that the weights take, from the config alone.
uint64_t CudaWeightBytes(const ModelConfig& config);

// Reads all weights, with `num_threads` threads, each through a pinned buffer of its own, and leaves them on
// the current device. budget_bytes 0: no limit. Errors as LoadWeights() of model/weights.h, and FromCuda()'s.
absl::StatusOr<CudaWeights> LoadCudaWeights(const ModelConfig& config, const Checkpoint& checkpoint,
                                            int num_threads, uint64_t budget_bytes);

// Random weights of a shape on the current device, for benchmarks: normal, of variance 1 / in_features,
// norms 1. Equal seeds give equal weights. The fingerprint is of the config alone.
absl::StatusOr<CudaWeights> RandomCudaWeights(const ModelConfig& config, uint32_t seed);

}  // namespace headwater

#endif  // HW_MODEL_CUDA_CUDA_WEIGHTS_H_
