// From a checkpoint's tensors to weights in device memory.
#ifndef HW_MODEL_CUDA_CUDA_WEIGHTS_H_
#define HW_MODEL_CUDA_CUDA_WEIGHTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "model/config.h"
#include "model/cuda/device_buffer.h"
#include "model/cuda/linear_type.h"
#include "model/safetensors.h"

namespace headwater {

// Device memory; null: the model has none.
struct CudaLinearWeights {
  const void* weight = nullptr;  // [out_features, in_features], bf16, or e4m3 with `scale`
  const float* scale = nullptr;  // [out_features] of fp8 linear layers
  const void* bias = nullptr;    // [out_features], as CudaLinearArgs::bias
};

struct CudaLayerWeights {
  const float* input_norm = nullptr;  // [hidden_size]
  CudaLinearWeights qkv;              // rows of Q, K and V, one after the other; to bf16
  const float* q_norm = nullptr;      // [head_dim]
  const float* k_norm = nullptr;
  CudaLinearWeights output;  // to f32
  const float* post_attention_norm = nullptr;
  CudaLinearWeights gate_up;  // rows of gate, then of up; to bf16
  CudaLinearWeights down;     // to f32
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
uint64_t CudaWeightBytes(const ModelConfig& config, LinearType linear);

// Reads all weights, with `num_threads` threads, each through a pinned buffer of its own, and leaves them on
// the current device. budget_bytes 0: no limit. With fp8 linear layers a matrix's rows are quantized as they
// arrive, from 8 MiB of device memory for each thread, given back before the call returns; the fingerprint is
// of the files either way. Errors as LoadWeights() of model/weights.h, and FromCuda()'s.
absl::StatusOr<CudaWeights> LoadCudaWeights(const ModelConfig& config, const Checkpoint& checkpoint,
                                            LinearType linear, int num_threads, uint64_t budget_bytes);

// Random weights of a shape on the current device, for benchmarks: normal, of variance 1 / in_features,
// norms 1. Equal seeds give equal weights, quantized or not. The fingerprint is of the config alone.
absl::StatusOr<CudaWeights> RandomCudaWeights(const ModelConfig& config, LinearType linear, uint32_t seed);

}  // namespace headwater

#endif  // HW_MODEL_CUDA_CUDA_WEIGHTS_H_
