// A checkpoint's layers as functions on host memory. No loop over layers, no attention, no network: the
// prefill worker and the decode node each drive it in their own way.
#ifndef HW_MODEL_MODEL_H_
#define HW_MODEL_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

#include "kernels/attention/attention.h"
#include "kernels/dtype.h"
#include "kernels/ops/linear.h"
#include "model/config.h"

namespace headwater {

struct ModelOptions {
  std::string directory;
  // f32 or bf16: type of linear layers' inputs and weights and of Q, K, V. Hidden states stay f32.
  kernels::DType compute = kernels::DType::kF32;
  // Most bytes that the packed weights may take; 0: no limit. Exceeding it is RESOURCE_EXHAUSTED, with both
  // numbers, before any weight is read. The mapped embedding table does not count: its pages are the
  // system's.
  uint64_t weight_budget_bytes = 0;
};

// Immutable after Load(), thread-safe; every call uses the calling thread's OpenMP team.
class Model {
 public:
  // NOT_FOUND: no such directory or file; INVALID_ARGUMENT: a checkpoint that is malformed or whose tensors
  // do not fit its config; UNIMPLEMENTED: a well-formed one that needs what is not supported;
  // RESOURCE_EXHAUSTED: over the budget. The files may be deleted or replaced after Load() returns, but not
  // truncated: the embedding table stays mapped. Cost: every weight is read twice (checksum, packing), the
  // second time from the page cache.
  static absl::StatusOr<std::unique_ptr<Model>> Load(const ModelOptions& options);
  virtual ~Model() = default;

  virtual const ModelConfig& config() const = 0;
  // 16 hex digits over config and weights: equal on every process that serves this checkpoint, whatever its
  // compute type.
  virtual const std::string& fingerprint() const = 0;
  virtual kernels::DType compute() const = 0;
  virtual uint64_t weight_bytes() const = 0;
  virtual kernels::AttentionShape attention_shape() const = 0;

  // Tokens that the functions below process at once, and the scratch bytes that one call takes for it at most
  // (whatever num_tokens is). One call's scratch stays allocated between calls; N calls at once take N times
  // as much.
  virtual int64_t chunk_tokens() const = 0;
  virtual uint64_t scratch_bytes() const = 0;

  // hidden: [tokens.size(), hidden_size]. OUT_OF_RANGE: a token id >= vocab_size.
  virtual absl::Status Embed(absl::Span<const int32_t> tokens, float* hidden) const = 0;

  // Norm, QKV projection, QK norm, rotation. Row i has position begin + i. q: [n, num_q_heads, head_dim], k
  // and v: [n, num_kv_heads, head_dim], in the compute type.
  virtual absl::Status BeforeAttention(int32_t layer, const float* hidden, int64_t num_tokens, int64_t begin,
                                       void* q, void* k, void* v) const = 0;

  // Output projection, residual, norm, MLP, residual. attention: [n, num_q_heads, head_dim] f32; hidden is
  // updated in place. INTERNAL, its message starting with "non-finite", names the layer and row where a value
  // is not finite.
  virtual absl::Status AfterAttention(int32_t layer, const float* attention, int64_t num_tokens,
                                      float* hidden) const = 0;

  // Final norm and LM head of one row. logits: [vocab_size]. INTERNAL, its message starting with
  // "non-finite".
  virtual absl::Status Logits(const float* hidden_row, float* logits) const = 0;
};

// The `count` best tokens (at most logits.size()) with natural log-probabilities, best first; ties go to the
// lower id, as argmax does. NaN ranks last.
struct TokenScore {
  int32_t token = 0;
  float logit = 0;
  float logprob = 0;
};
std::vector<TokenScore> TopTokens(absl::Span<const float> logits, int count);

}  // namespace headwater

#endif  // HW_MODEL_MODEL_H_
