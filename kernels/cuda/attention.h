// Attention on a Hopper GPU: dense causal, or over block lists. The device side of attention/attention.h;
// this one enqueues and returns. Not for decoding (a query or a few against a long cache): tiles are 128
// rows.
#ifndef HW_KERNELS_CUDA_ATTENTION_H_
#define HW_KERNELS_CUDA_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

// Key blocks per query tile, in device memory. A tile is 128 / pack positions of `pack` neighbouring query
// heads, where pack = num_q_heads / num_lists; tiles of a sequence start at its first query, blocks of 128
// keys at its first key. Segment (list, tile) has the number list * tiles + tile, where tiles counts those of
// all sequences.
struct CudaBlockLists {
  int32_t num_lists = 0;             // 0: no lists (dense); else num_kv_heads or num_q_heads
  const int32_t* counts = nullptr;   // [num_lists * tiles]; -1: every causal block
  const int64_t* offsets = nullptr;  // [num_lists * tiles] first entry in `blocks`
  // Ascending, without repeats, none past the tile's last visible key: CudaCheckBlockLists(). Other entries
  // are memory-safe, but what rows of that tile get is undefined; offsets and counts that leave the arrays
  // are not.
  const int32_t* blocks = nullptr;
};

// Some of a prompt's queries, by position; count 0: all of them.
struct CudaQueryRange {
  int64_t first = 0, count = 0;
};

// Means of K and V that stand for the keys a tile does not list (FlashPrefill V2's correction,
// arXiv:2603.06199, with one mean a superblock where none of its blocks is listed, so that the cost is N^2 /
// 1024 of a score in place of N^2 / 128). CudaMeanTables() of cuda/block_stats.h makes them; tables of
// total_k tokens, device memory, 16-byte aligned. For each block J that all rows of a tile see whole and the
// tile does not list, one key of logit softmax_scale * q . kmean_J + ln |J| and value vmean_J enters softmax;
// for a superblock of which nothing is listed, and which all rows see whole, one key does.
struct CudaMeanCorrection {
  const void* k_means = nullptr;  // bf16 [num_kv_heads, CudaMeanTableRows(total_k), head_dim]; null: none
  const void* v_means = nullptr;
};

// bf16 arrays in device memory, 16-byte aligned, contiguous.
struct CudaAttentionArgs {
  const void* q = nullptr;   // [total_q, num_q_heads, head_dim], rotated
  const void* k = nullptr;   // [total_k, num_kv_heads, head_dim], rotated
  const void* v = nullptr;   // as k
  void* out = nullptr;       // bf16 as q, or null; may be q itself: a row is read before it is written
  float* out_f32 = nullptr;  // f32 as q, or null: for partial results that are merged by lse_ln
  float* lse_ln = nullptr;   // [total_q, num_q_heads] natural log of the sum of exp(scaled score), or null
  int64_t total_q = 0;
  int64_t total_k = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;  // num_q_heads / num_kv_heads is 1 to 8
  int32_t head_dim = 0;      // 64 or 128
  float softmax_scale = 0;
  // Sequences lie one after the other: query tokens cu_seqlens_q[i] to cu_seqlens_q[i + 1], keys likewise.
  // Device memory, int32 [num_sequences + 1], ascending, from 0 to total_q (total_k). Null: one sequence.
  int32_t num_sequences = 1;
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  // Key j is visible to query i of its sequence if j <= i + query_position. kBottomRightAligned: the last
  // query sees the last key (kv_len - q_len). May be negative; rows that see nothing get 0 and -infinity.
  static constexpr int32_t kBottomRightAligned = INT32_MIN;
  int32_t query_position = kBottomRightAligned;
  // Keys of the prompt that this call has some queries of; 0: total_k / num_sequences. It chooses how many
  // keys are taken at once: calls that agree in it give a query the same bits, however they cut the prompt.
  int64_t prompt_k = 0;
  CudaBlockLists lists;
  CudaMeanCorrection correction;  // with lists, for one sequence
};

// Device memory that CudaAttention() needs, 16-byte aligned: a few bytes a sequence.
size_t CudaAttentionWorkspaceBytes(const CudaAttentionArgs& args);

// out = softmax(softmax_scale * q k^T + causal mask) v per query head; head h reads KV head h / (num_q_heads
// / num_kv_heads). Base-2 online softmax, f32 accumulation, P rounded to bf16: relative error 4e-3 at most
// against double on inputs of unit variance. Deterministic: equal calls give equal bits.
//
// Enqueues on `stream` (the current device's); arrays and workspace must live until the stream has passed. A
// NaN or infinity in a row of Q or K spoils the rows that see it; one in V may also spoil rows that see other
// keys of the same 128 (with correction 8,192), never another sequence's.
//
// INVALID_ARGUMENT: null or misaligned arrays, sizes that contradict each other, one sequence with kv_len <
// q_len and bottom-right alignment, a workspace too small. UNIMPLEMENTED: head_dim, GQA ratio, or a device
// that is not sm_90; correction of several sequences or over 16,777,216 keys. INTERNAL: a CUDA call failed.
// Cost: 4 * head_dim FLOP per listed (row, key).
Status CudaAttention(const CudaAttentionArgs& args, void* workspace, size_t workspace_bytes,
                     cudaStream_t stream);

// Checks args.lists, for lists from outside: writes to *first_bad (device memory, 8-byte aligned) the
// smallest number of a segment whose count is below -1, whose entries leave the num_blocks ones of `blocks`,
// are not ascending, repeat, or lie past its tile's last visible key; -1: none. Arguments, workspace, stream
// and errors as CudaAttention() with those args; a tensor's memory is not read. Cost: a read of the lists.
Status CudaCheckBlockLists(const CudaAttentionArgs& args, int64_t num_blocks, int64_t* first_bad,
                           void* workspace, size_t workspace_bytes, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_ATTENTION_H_
