// MemoryPlan: what one rank allocates for a prompt, known before it starts. Pure.
#ifndef HW_WORKER_MEMORY_PLAN_H_
#define HW_WORKER_MEMORY_PLAN_H_

#include <cstdint>

#include "absl/status/status.h"

#include "headwater/v1/worker.pb.h"
#include "kernels/dtype.h"
#include "model/model.h"

namespace headwater {

// What the plan depends on besides the prompt. Fixed for the life of a worker.
struct MemoryShape {
  int64_t hidden_size = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_position = 0;
  kernels::DType compute = kernels::DType::kF32;
  int egress_buffers = 3;
  bool checkpoints = false;  // groups take them
  // Whatever the prompt: the model's and the attention's scratch, the KV sender's own buffers.
  uint64_t scratch_bytes = 0;
};

// Scratch: the model's, attention's for `num_threads`, and the KV sender's for `kv_channels`.
MemoryShape MakeMemoryShape(const Model& model, int num_threads, int egress_buffers, int kv_channels);

// Buffers of one rank, in bytes. K and V of one buffer lie behind each other.
struct MemoryPlan {
  uint64_t hidden = 0;     // [local, hidden_size] f32
  uint64_t attention = 0;  // [local, num_q_heads, head_dim] f32
  uint64_t lse = 0;        // [local, num_q_heads] f32
  uint64_t q = 0;          // [local, num_q_heads, head_dim], compute type
  uint64_t compute_kv =
      0;  // one layer's own K and V where the wire type differs from the compute type, else 0
  uint64_t egress_kv = 0;  // one egress buffer: a layer's own K and V in the wire type
  int num_egress = 0;
  uint64_t receive_kv = 0;  // one receive buffer: the largest rank's K and V, compute type
  int num_receive = 0;
  // Where the strategy is sparse, else 0: the own K and V packed for another rank, compute type; all ranks'
  // KeySelection.
  uint64_t send_kv = 0;
  uint64_t selection = 0;
  uint64_t index = 0;   // the policy's block lists
  uint64_t tokens = 0;  // the assignment and its token ids
  uint64_t logits = 0;
  uint64_t scratch = 0;
  uint64_t checkpoint =
      0;  // two of them, [own + left neighbour's tokens, hidden_size] f32; or the one to go on from
  uint64_t device = 0;  // everything that lies on a GPU, where one computes

  // Of the buffers above that the loop takes from its arena, each rounded up to kAlignment.
  uint64_t arena_bytes() const;
  uint64_t total_bytes() const;

  static constexpr uint64_t kAlignment = 64;
};

// Ranks of the largest group.
inline constexpr int kMaxWorldSize = 256;

// local_tokens: of this rank; max_rank_tokens: of the rank that holds most; num_tokens: of the prompt, at
// most max_position; world_size: at most kMaxWorldSize; held_tokens: of the checkpoint that the rank goes on
// from, 0 for none. Saturates at 2^63 rather than wrap.
MemoryPlan PlanMemory(const MemoryShape& shape, kernels::DType wire, int64_t local_tokens,
                      int64_t max_rank_tokens, int64_t num_tokens, int world_size, int64_t held_tokens = 0,
                      v1::Strategy strategy = v1::STRATEGY_RING);

// fixed_bytes + n * bytes_per_token, and n * group_bytes_per_token with several ranks or a checkpoint of at
// most 4 n tokens, is at least total_bytes() of every plan in which no rank holds more than n tokens.
// budget_bytes counts the weights in: the sum may take what they leave.
v1::MemoryModel LinearMemoryModel(const MemoryShape& shape, uint64_t budget_bytes, uint64_t weight_bytes);

// FAILED_PRECONDITION, MEMORY_PLAN_TOO_LARGE, with bytes asked and available: the plan does not fit into what
// the weights leave of the budget.
absl::Status CheckMemoryPlan(const MemoryPlan& plan, uint64_t budget_bytes, uint64_t weight_bytes);

}  // namespace headwater

#endif  // HW_WORKER_MEMORY_PLAN_H_
