// Sparse attention over a chunk of keys, merging into a running result: the form that context parallelism
// needs.
#ifndef HW_KERNELS_ATTENTION_ATTENTION_H_
#define HW_KERNELS_ATTENTION_ATTENTION_H_

#include <cstdint>

#include "kernels/attention/block_index.h"
#include "kernels/dtype.h"
#include "kernels/status.h"

namespace headwater::kernels {

struct AttentionShape {
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;  // divides num_q_heads; head h reads KV head h / (num_q_heads / num_kv_heads)
  int32_t head_dim = 0;      // a multiple of 16, at most 256
  float softmax_scale = 0;   // usually 1 / sqrt(head_dim)
};

// Consecutive queries. Row i is the token at position `begin` + i.
struct QueryChunk {
  const void* q = nullptr;  // [num_tokens, num_q_heads, head_dim], rotated
  DType dtype = DType::kF32;
  int64_t begin = 0;
  int64_t num_tokens = 0;
};

// Consecutive keys and values. Row j is the token at position `begin` + j.
struct KeyChunk {
  const void* k = nullptr;  // [num_tokens, num_kv_heads, head_dim], rotated
  const void* v = nullptr;  // the same shape
  DType dtype = DType::kF32;
  int64_t begin = 0;
  int64_t num_tokens = 0;
};

// Softmax attention of all keys seen so far, normalised; lse_ln is the natural log of the sum of exp(scaled
// score). Start with ResetAttentionState(); rows that have seen no key have out 0 and lse -infinity.
struct AttentionState {
  float* out = nullptr;     // [num_tokens, num_q_heads, head_dim]
  float* lse_ln = nullptr;  // [num_tokens, num_q_heads]
};

void ResetAttentionState(const AttentionShape& shape, int64_t num_tokens, const AttentionState& state);

// Checks everything that the kernels below take as given.
Status ValidateAttention(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                         const BlockIndex& index);

// Merges the attention of `queries` over those of `keys` that `index` selects and causality allows into
// `state`: each row ends as if all its keys so far had been one softmax. Online softmax, base e, f32
// accumulation.
//
// `index` must cover the tiles of `queries` (chunks need not start or end on tile or block boundaries). Pairs
// without a visible key are skipped at no cost. All threads of the calling thread's OpenMP team; the work
// split does not depend on timing, so equal calls give bitwise equal results. `state` is read and written;
// nothing else is.
//
// Where both chunks are bf16 and the CPU has AMX or AVX512-BF16, scores and values are multiplied in bf16
// with f32 accumulation (P rounded to bf16); else, and for a token or a few, in f32. A NaN or infinite score
// makes the rows that see it NaN; a NaN or infinity in V may also spoil rows that see other keys of the same
// 128. A row that sees no key of this chunk keeps its bits.
//
// Errors: as ValidateAttention(); RESOURCE_EXHAUSTED: scratch memory, AttentionScratchBytes().
// Cost: 4 * head_dim FLOP per visible (query, key, head).
Status SparseAttention(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                       const BlockIndex& index, const AttentionState& state);

// Most bytes that a SparseAttention() call allocates for its own time, with the calling thread's OpenMP team
// and at most `num_keys` keys: about 0.5 MiB a thread, and for bf16 multiplication the keys and values in
// packed form, 4 * num_kv_heads * head_dim bytes a key (head_dim rounded up to 32 for K) for at most 4,096
// keys at a time.
uint64_t AttentionScratchBytes(const AttentionShape& shape, int64_t num_keys);

namespace reference {

// The same contract in obvious loops and double precision, one thread. Merges exactly as the fast one does.
Status SparseAttention(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                       const BlockIndex& index, const AttentionState& state);

}  // namespace reference
}  // namespace headwater::kernels

#endif  // HW_KERNELS_ATTENTION_ATTENTION_H_
