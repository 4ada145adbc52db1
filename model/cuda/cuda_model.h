// A checkpoint's layers as functions on one GPU: what Model is on the host, bf16 throughout but for the
// hidden state, which stays f32, and for linear layers in fp8 where asked for. Their KV has the same layout
// and fingerprint as bf16's, so that decode nodes take it, but not the same bits (linear_type.h). No loop
// over layers, no attention, no network.
#ifndef HW_MODEL_CUDA_CUDA_MODEL_H_
#define HW_MODEL_CUDA_CUDA_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

#include "kernels/cuda/block_stats.h"
#include "model/config.h"
#include "model/cuda/linear_type.h"

namespace headwater {

struct CudaModelOptions {
  std::string directory;
  int device = 0;
  int num_threads = 4;  // that read weights
  // Most bytes that weights and scratch may take; 0: no limit but the device's.
  uint64_t budget_bytes = 0;
  // Tokens that one call below takes at most; a multiple of 128. Scratch grows with it.
  int64_t chunk_tokens = 8192;
  LinearType linear = LinearType::kBF16;
};

// Calls enqueue on `stream` and return; pointers are device memory and must live until the stream has passed.
// Calls share scratch: they come one at a time, on one stream or on streams that are ordered. num_tokens: at
// most chunk_tokens(). INVALID_ARGUMENT: a layer or num_tokens out of range; otherwise the kernels' errors
// and FromCuda()'s.
class CudaModel {
 public:
  // Errors as Model::Load(). UNIMPLEMENTED names what the GPU kernels do not take: a head_dim other than 64
  // and 128, a GQA ratio over 8, sizes that are no multiple of 8 (fp8: 16), a device that is not sm_90. The
  // files are not needed afterwards.
  static absl::StatusOr<std::unique_ptr<CudaModel>> Load(const CudaModelOptions& options);
  // A model of that shape with random weights; options.directory is not used.
  static absl::StatusOr<std::unique_ptr<CudaModel>> Random(const ModelConfig& config,
                                                           const CudaModelOptions& options, uint32_t seed);
  virtual ~CudaModel() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const std::string& fingerprint() const = 0;  // as Model's
  virtual int device() const = 0;
  virtual LinearType linear() const = 0;
  virtual uint64_t weight_bytes() const = 0;
  virtual uint64_t scratch_bytes() const = 0;
  virtual int64_t chunk_tokens() const = 0;

  // hidden: f32 [num_tokens, hidden_size]; ids: [num_tokens], each of [0, vocab_size) (else its row is NaN).
  virtual absl::Status Embed(const int32_t* ids, int64_t num_tokens, float* hidden, cudaStream_t stream) = 0;

  // Norm, QKV projection, QK norm, rotation. Row i has position begin + i, or, where positions is not null
  // (device memory, [num_tokens]), positions[i]. q: bf16 [num_tokens, num_q_heads, head_dim], k and v: bf16
  // [num_tokens, num_kv_heads, head_dim]. stats: of the whole sequence, filled for the blocks of these
  // tokens, of which the first is token `begin`, a multiple of 128 if anything is wanted.
  virtual absl::Status BeforeAttention(int32_t layer, const float* hidden, int64_t num_tokens, int64_t begin,
                                       const int32_t* positions, void* q, void* k, void* v,
                                       const kernels::CudaBlockStats& stats, cudaStream_t stream) = 0;

  // Output projection, residual, norm, MLP, residual. attention: bf16 [num_tokens, num_q_heads, head_dim];
  // hidden is updated in place. *bad_row (8-byte aligned): the first row of hidden that is not finite, -1:
  // none.
  virtual absl::Status AfterAttention(int32_t layer, const void* attention, int64_t num_tokens, float* hidden,
                                      int64_t* bad_row, cudaStream_t stream) = 0;

  // Final norm and LM head of some rows of hidden, at most chunk_tokens() / 2. logits: f32 [rows,
  // vocab_size].
  virtual absl::Status Logits(const float* hidden, absl::Span<const int64_t> rows, float* logits,
                              cudaStream_t stream) = 0;
};

}  // namespace headwater

#endif  // HW_MODEL_CUDA_CUDA_MODEL_H_
