/* C interface of Headwater's GPU kernels: for other languages, and for measuring them beside others in one
 * process.
 *
 * Every function that can fail returns an hw_status; hw_last_error() has the text, per thread. Functions that
 * take a stream (a cudaStream_t) enqueue on it and return; arrays and workspace must live until the stream
 * has passed. Structures begin with their size as the caller knows it: fields added later read as 0. What
 * fields mean, shapes, errors and cost: kernels/cuda/attention.h and kernels/cuda/pattern.h.
 */
#ifndef HEADWATER_KERNELS_H_
#define HEADWATER_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HW_KERNELS_ABI_VERSION 1

#if defined(__GNUC__)
#define HW_EXPORT __attribute__((visibility("default")))
#else
#define HW_EXPORT
#endif

/* Values as in google.rpc.Code. */
typedef enum {
  HW_OK = 0,
  HW_INVALID_ARGUMENT = 3,
  HW_RESOURCE_EXHAUSTED = 8,
  HW_UNIMPLEMENTED = 12,
  HW_INTERNAL = 13
} hw_status;

HW_EXPORT int32_t hw_kernels_abi_version(void);
/* Of this thread's last failed call; "" before any. Valid until its next call. */
HW_EXPORT const char* hw_last_error(void);

#define HW_BOTTOM_RIGHT INT32_MIN

typedef struct {
  int32_t num_lists; /* 0: dense */
  const int32_t* counts;
  const int64_t* offsets;
  const int32_t* blocks;
} hw_block_lists;

typedef struct {
  uint32_t struct_size;
  const void *q, *k, *v; /* bf16, device memory */
  void* out;             /* bf16, or null */
  float* out_f32;        /* or null */
  float* lse_ln;         /* or null */
  int64_t total_q, total_k;
  int32_t num_q_heads, num_kv_heads, head_dim;
  float softmax_scale;
  int32_t num_sequences;
  const int32_t *cu_seqlens_q, *cu_seqlens_k; /* device memory, or both null for one sequence */
  int32_t query_position; /* HW_BOTTOM_RIGHT, or the position of query 0 counted from key 0 */
  hw_block_lists lists;
} hw_attention_args;

HW_EXPORT size_t hw_attention_workspace_bytes(const hw_attention_args* args);
HW_EXPORT hw_status hw_attention(const hw_attention_args* args, void* workspace, size_t workspace_bytes,
                                 void* stream);

typedef struct {
  uint32_t struct_size;
  const void *q, *k; /* bf16, device memory */
  int64_t total_q, total_k;
  int32_t num_q_heads, num_kv_heads, head_dim;
  float softmax_scale;
  int32_t query_position;
  float threshold;
  int32_t sink_blocks, window_blocks, dense_last_tokens;
  int32_t* counts;  /* [num_kv_heads * tiles] */
  int64_t* offsets; /* [num_kv_heads * tiles] */
  int32_t* blocks;  /* [capacity] */
  int64_t capacity;
  uint64_t* used;
  uint32_t* overflows;
} hw_search_args;

/* Both 0 for invalid arguments (outputs must be non-null). */
HW_EXPORT int64_t hw_search_tiles(const hw_search_args* args);
HW_EXPORT size_t hw_search_workspace_bytes(const hw_search_args* args);
HW_EXPORT hw_status hw_select_blocks(const hw_search_args* args, void* workspace, size_t workspace_bytes,
                                     void* stream);

#ifdef __cplusplus
}
#endif

#endif /* HEADWATER_KERNELS_H_ */
