// Greedy generation over a committed KV cache, one token a call.
#ifndef HW_DECODE_GENERATOR_H_
#define HW_DECODE_GENERATOR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "decode/generated_kv.h"
#include "kvtransfer/store.h"
#include "model/model.h"

namespace headwater {

struct GeneratedToken {
  int32_t token = 0;
  int64_t position = 0;
  // Logit difference of the two best candidates; of the prefill's token, as CommittedKv::first_top2_gap().
  float top2_logit_gap = 0;
  // No further token fits the model's positions.
  bool is_last_position = false;
};

// Where a session's generation stands between calls: its generated tokens' KV and the token to go on from.
// The prompt's KV is not part of it. Not thread-safe.
class Sequence {
 public:
  int64_t prompt_tokens() const { return prompt_tokens_; }
  // Tokens given out so far, the prefill's included.
  int64_t tokens_given() const { return tokens_given_; }
  uint64_t generated_bytes() const { return generated_.bytes(); }
  // False: `kv` holds another prompt or first token than the cache that the sequence began with.
  bool Continues(const CommittedKv& kv) const;

 private:
  friend class Generator;
  Sequence(const CommittedKv& kv, const GeneratedKv::Shape& shape, GeneratedKvBudget* budget);

  const int64_t prompt_tokens_;
  const uint32_t prompt_crc_;
  const int32_t first_token_;
  int64_t tokens_given_ = 0;
  int32_t last_token_;
  GeneratedKv generated_;
};

// The model's forward pass for one token. The prompt's K and V are read in place, in the type they were sent
// in; generated tokens' K and V are kept in the model's compute type. Per layer the attention over both is
// merged by log-sum-exp. Holds scratch for one token: one thread at a time; sequences may take turns.
class Generator {
 public:
  // `model` must outlive the generator.
  static absl::StatusOr<std::unique_ptr<Generator>> Create(const Model* model);

  // Starts after the prompt of `kv`. FAILED_PRECONDITION, MODEL_MISMATCH names the field in which the cache
  // is not this model's; `budget` must outlive the sequence.
  absl::StatusOr<std::unique_ptr<Sequence>> Begin(const CommittedKv& kv, GeneratedKvBudget* budget) const;

  // Gives the next token; the first is the prefill's and costs nothing. `kv` must be the cache that
  // `sequence` began with. FAILED_PRECONDITION, CONTEXT_FULL: all of the model's positions are used;
  // RESOURCE_EXHAUSTED, KV_MEMORY_FULL: the budget. After an error the sequence stands where it stood.
  absl::StatusOr<GeneratedToken> Next(const CommittedKv& kv, Sequence* sequence);

 private:
  explicit Generator(const Model* model);
  absl::Status Forward(const CommittedKv& kv, int64_t position, Sequence* sequence);
  absl::Status Attend(const CommittedKv& kv, int32_t layer, int64_t position, Sequence* sequence);

  const Model* const model_;
  const kernels::AttentionShape shape_;
  std::vector<float> hidden_;     // [hidden_size]
  std::vector<char> q_;           // [num_q_heads, head_dim], compute type
  std::vector<float> attention_;  // [num_q_heads, head_dim]
  std::vector<float> lse_ln_;     // [num_q_heads]
  std::vector<float> logits_;     // [vocab_size]
};

}  // namespace headwater

#endif  // HW_DECODE_GENERATOR_H_
