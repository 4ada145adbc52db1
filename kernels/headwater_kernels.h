/* C interface of Headwater's GPU kernels: for other languages, and for measuring them beside others in one
 * process.
 *
 * Every function that can fail returns an hw_status; hw_last_error() has the text, per thread. Functions that
 * take a stream (a cudaStream_t) enqueue on it and return; arrays and workspace must live until the stream
 * has passed. Structures begin with their size as the caller knows it: fields added later read as 0. What
 * fields mean, shapes, errors and cost: the headers of the same names in kernels/cuda/ (attention.h,
 * pattern.h, merge.h, block_stats.h, block_mass.h, layer_ops.h, quantize.h, linear.h).
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
  const void *k_means, *v_means; /* tables of hw_mean_tables(): mean correction; both or neither */
} hw_attention_args;

HW_EXPORT size_t hw_attention_workspace_bytes(const hw_attention_args* args);
HW_EXPORT hw_status hw_attention(const hw_attention_args* args, void* workspace, size_t workspace_bytes,
                                 void* stream);

/* Checks args->lists; first_bad: int64 in device memory. */
HW_EXPORT hw_status hw_check_block_lists(const hw_attention_args* args, int64_t num_blocks,
                                         int64_t* first_bad, void* workspace, size_t workspace_bytes,
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
  const void* k_means;   /* table of hw_mean_tables(), or null: means are taken from k */
  double forced_density; /* 0: by threshold */
} hw_search_args;

/* Both 0 for invalid arguments (outputs must be non-null). */
HW_EXPORT int64_t hw_search_tiles(const hw_search_args* args);
HW_EXPORT size_t hw_search_workspace_bytes(const hw_search_args* args);
HW_EXPORT hw_status hw_select_blocks(const hw_search_args* args, void* workspace, size_t workspace_bytes,
                                     void* stream);

/* --- Merging (merge.h) --- */

typedef struct {
  uint32_t struct_size;
  const float *a, *a_lse_ln, *b, *b_lse_ln;
  float* out_f32;
  void* out; /* bf16 */
  float* lse_ln;
  int64_t num_rows;
  int32_t head_dim;
} hw_merge_args;
HW_EXPORT hw_status hw_merge_partials(const hw_merge_args* args, void* stream);

/* --- Block statistics (block_stats.h) --- */

typedef struct {
  float *k_mean, *v_mean; /* [blocks of 128 tokens, KV heads, head_dim]; null: not wanted, like all here */
  float *k_min, *k_max;
  float *k_mean_square, *v_mean_square; /* [blocks, KV heads] */
  float *k_max_norm, *v_max_norm;
} hw_block_stats;

typedef struct {
  uint32_t struct_size;
  const void *k, *v; /* bf16 */
  int64_t total_k;
  int32_t num_kv_heads, head_dim;
  int64_t first_token; /* only blocks from here on; a multiple of 128 */
  hw_block_stats stats;
} hw_block_statistics_args;
HW_EXPORT hw_status hw_block_statistics(const hw_block_statistics_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  const float *k_mean, *v_mean;
  void *k_table, *v_table; /* bf16 [KV heads, hw_mean_table_rows(), head_dim] */
  int64_t total_k;
  int32_t num_kv_heads, head_dim;
} hw_mean_tables_args;
HW_EXPORT hw_status hw_mean_tables(const hw_mean_tables_args* args, void* stream);
HW_EXPORT int64_t hw_mean_table_rows(int64_t total_k);
HW_EXPORT int64_t hw_mean_table_coarse_row(int64_t total_k); /* the first one */

/* --- Attention masses (block_mass.h) --- */

typedef struct {
  uint32_t struct_size;
  const void *q, *k;    /* bf16 [num_tokens, heads, head_dim] */
  const float* lse_ln;  /* [num_tokens, num_q_heads], of hw_attention() without lists */
  const int32_t* heads; /* [num_heads], or null */
  const uint8_t* flags; /* [num_q_heads], or null */
  float* average;       /* [num_heads, blocks, blocks] */
  int64_t num_tokens;
  int32_t num_q_heads, num_kv_heads, head_dim;
  float softmax_scale;
  int32_t num_heads;
} hw_block_mass_args;
HW_EXPORT hw_status hw_block_mass(const hw_block_mass_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  const void *q, *k;        /* as above */
  const int64_t* positions; /* [num_rows], device memory */
  float* mass;              /* [num_rows, num_q_heads, blocks] */
  int64_t num_tokens;
  int32_t num_q_heads, num_kv_heads, head_dim;
  float softmax_scale;
  int32_t num_rows;
} hw_row_mass_args;
HW_EXPORT hw_status hw_row_mass(const hw_row_mass_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  const float* mass;        /* of hw_row_mass() */
  const int64_t* positions; /* [num_rows], device memory */
  float* recall;            /* [num_rows, num_q_heads] */
  int64_t num_tokens;
  int32_t num_q_heads, num_rows;
  hw_block_lists lists;
} hw_recall_of_rows_args;
HW_EXPORT hw_status hw_recall_of_rows(const hw_recall_of_rows_args* args, void* stream);

/* --- Layer operations (layer_ops.h) --- */

typedef enum { HW_F32 = 0, HW_F16 = 1, HW_BF16 = 2 } hw_dtype; /* passed as int32_t */

typedef struct {
  uint32_t struct_size;
  const void* table; /* bf16 */
  const int32_t* ids;
  void* out;
  int32_t out_dtype;
  int64_t num_tokens, vocab, width;
} hw_embed_tokens_args;
HW_EXPORT hw_status hw_embed_tokens(const hw_embed_tokens_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  void* x;
  int32_t x_dtype;
  const void* delta;
  const void* weight;
  int32_t weight_dtype;
  void* out;
  float epsilon;
  int64_t num_tokens, width;
  float* scale; /* or null */
} hw_rms_norm_args;
HW_EXPORT hw_status hw_rms_norm(const hw_rms_norm_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  const double* inverse;        /* [head_dim / 2] in host memory, read before the call returns; or null */
  const double* inverse_device; /* [head_dim / 2] in device memory, if `inverse` is null */
  double attention_factor;
  int32_t head_dim;
  int64_t num_tokens, begin;
  const int32_t* positions_i32;
  const int64_t* positions_i64;
  float *cos, *sin;
} hw_rope_table_args;
HW_EXPORT hw_status hw_rope_table(const hw_rope_table_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  const void* qkv;
  int64_t num_tokens;
  int32_t num_q_heads, num_kv_heads, head_dim;
  const void *q_norm, *k_norm;
  int32_t norm_dtype;
  float epsilon;
  const float *cos, *sin;
  void *q, *k, *v;
  hw_block_stats stats;
  int64_t first_token;
} hw_split_qkv_args;
HW_EXPORT hw_status hw_split_qkv(const hw_split_qkv_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  const void* gate_up;
  void* out;
  int64_t num_tokens, width;
  float* scale; /* or null */
} hw_silu_mul_args;
HW_EXPORT hw_status hw_silu_mul(const hw_silu_mul_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  const void* x;
  void* out;
  float* scale;
  int64_t num_rows, width;
} hw_quantize_rows_args;
HW_EXPORT hw_status hw_quantize_rows(const hw_quantize_rows_args* args, void* stream);

typedef struct {
  uint32_t struct_size;
  const void* x;
  int32_t dtype;
  int64_t num_tokens, width;
  int64_t* row; /* device memory */
} hw_first_nonfinite_row_args;
HW_EXPORT hw_status hw_first_nonfinite_row(const hw_first_nonfinite_row_args* args, void* stream);

typedef struct {
  int64_t source_token, count, destination_offset;
} hw_token_run;

typedef struct {
  uint32_t struct_size;
  const void *k, *v;
  int64_t num_tokens;
  int32_t num_kv_heads, head_dim;
  void *k_destination, *v_destination;
  int64_t destination_bytes;
  int32_t wire_dtype;
  const hw_token_run* runs; /* device memory */
  int32_t num_runs;
  uint32_t* problems; /* device memory, or null; bit 0: a value was not representable, bit 1: a bad run */
} hw_pack_kv_args;
HW_EXPORT hw_status hw_pack_kv(const hw_pack_kv_args* args, void* stream);

/* --- Pattern policies (policy.h) --- */

typedef struct hw_policy hw_policy;

typedef struct {
  int32_t layer, head, cluster;
} hw_head_cluster;

typedef struct {
  uint32_t struct_size;
  const char* name;        /* as pattern/parameters.h has them */
  const char* const* keys; /* [num_parameters] */
  const double* values;    /* [num_parameters] */
  int32_t num_parameters;
  int32_t num_layers, num_q_heads, num_kv_heads, head_dim;
  float softmax_scale;
  const double* rope_frequencies;  /* [head_dim / 2] in host memory, for "skeleton", or null: by rope_base */
  const hw_head_cluster* clusters; /* for "share", or null */
  int32_t num_clusters;
  const int32_t* shared_clusters;
  int32_t num_shared_clusters;
  const float* thresholds; /* [num_layers * num_kv_heads], for "headwater", or null */
  int32_t num_thresholds;
  const int32_t* windows; /* likewise, in blocks */
  int32_t num_windows;
} hw_policy_config;

/* Keys to the token, per tile of 64 rows (range_attention.h); num_lists 0: none. */
typedef struct {
  int32_t num_lists;
  const int32_t* range_counts;
  const int64_t* range_offsets;
  const int32_t* ranges; /* pairs: begin, end */
  const int32_t* column_counts;
  const int64_t* column_offsets;
  const int32_t* columns;
  int32_t sink_tokens, window_tokens;
} hw_key_ranges;

/* What a layer's attention read; device memory of the policy. */
typedef struct {
  uint32_t struct_size;
  hw_block_lists lists;          /* num_lists 0: dense, or key ranges */
  const void *k_means, *v_means; /* mean correction, or null */
  hw_key_ranges ranges;
  const uint64_t* visited;   /* or null */
  const uint32_t* overflows; /* or null */
  uint64_t possible;
} hw_selection;

/* *policy is null where this fails. */
HW_EXPORT hw_status hw_policy_create(const hw_policy_config* config, hw_policy** policy);
HW_EXPORT void hw_policy_destroy(hw_policy* policy); /* null: does nothing */
HW_EXPORT size_t hw_policy_memory_bytes(const hw_policy* policy, int64_t num_tokens);
HW_EXPORT size_t hw_policy_workspace_bytes(const hw_policy* policy, int64_t num_tokens);
HW_EXPORT int32_t hw_policy_wants_lse(const hw_policy* policy);
HW_EXPORT hw_status hw_policy_begin(hw_policy* policy, int64_t num_tokens, void* memory, size_t memory_bytes,
                                    void* stream);
/* One layer: search, attention, and what later layers want to know of it. out: bf16 as q. lse_ln: f32
 * [tokens, query heads], or null unless the policy wants it. */
HW_EXPORT hw_status hw_policy_attention(hw_policy* policy, int32_t layer, const void* q, const void* k,
                                        const void* v, void* out, float* lse_ln, void* workspace,
                                        size_t workspace_bytes, void* stream, hw_selection* selection);

/* --- Linear layers (linear.h) --- */

typedef struct hw_linear hw_linear;

typedef struct {
  uint32_t struct_size;
  void* workspace; /* null: the object's own */
  uint64_t workspace_bytes;
  int32_t max_plans; /* 0: the default */
} hw_linear_options;

typedef struct {
  uint32_t struct_size;
  const void *x, *weight, *bias;
  void* y;
  int32_t y_dtype;
  int32_t accumulate; /* 0 or 1 */
  int64_t num_tokens, in_features, out_features;
  const float *x_scale, *weight_scale; /* both or neither: e4m3 operands */
} hw_linear_args;

/* Null options: the defaults. *linear is null where this fails. */
HW_EXPORT hw_status hw_linear_create(const hw_linear_options* options, hw_linear** linear);
HW_EXPORT hw_status hw_linear_run(hw_linear* linear, const hw_linear_args* args, void* stream);
HW_EXPORT void hw_linear_destroy(hw_linear* linear); /* null: does nothing */

#ifdef __cplusplus
}
#endif

#endif /* HEADWATER_KERNELS_H_ */
