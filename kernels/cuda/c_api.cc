#include "kernels/c_api_support.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/merge.h"
#include "kernels/cuda/pattern.h"
#include "kernels/headwater_kernels.h"

namespace {

namespace hk = headwater::kernels;

using hk::capi::Counted;
using hk::capi::Read;
using hk::capi::WithArgs;

cudaStream_t StreamOf(void* stream) { return static_cast<cudaStream_t>(stream); }

hk::CudaAttentionArgs FromC(const hw_attention_args& c) {
  hk::CudaAttentionArgs args;
  args.q = c.q;
  args.k = c.k;
  args.v = c.v;
  args.out = c.out;
  args.out_f32 = c.out_f32;
  args.lse_ln = c.lse_ln;
  args.total_q = c.total_q;
  args.total_k = c.total_k;
  args.num_q_heads = c.num_q_heads;
  args.num_kv_heads = c.num_kv_heads;
  args.head_dim = c.head_dim;
  args.softmax_scale = c.softmax_scale;
  args.num_sequences = c.num_sequences;
  args.cu_seqlens_q = c.cu_seqlens_q;
  args.cu_seqlens_k = c.cu_seqlens_k;
  args.query_position = c.query_position;
  args.lists = {c.lists.num_lists, c.lists.counts, c.lists.offsets, c.lists.blocks};
  args.correction = {c.k_means, c.v_means};
  return args;
}

hk::CudaSearchArgs FromC(const hw_search_args& c) {
  hk::CudaSearchArgs args;
  args.q = c.q;
  args.k = c.k;
  args.total_q = c.total_q;
  args.total_k = c.total_k;
  args.num_q_heads = c.num_q_heads;
  args.num_kv_heads = c.num_kv_heads;
  args.head_dim = c.head_dim;
  args.softmax_scale = c.softmax_scale;
  args.query_position = c.query_position;
  args.threshold = c.threshold;
  args.sink_blocks = c.sink_blocks;
  args.window_blocks = c.window_blocks;
  args.dense_last_tokens = c.dense_last_tokens;
  args.counts = c.counts;
  args.offsets = c.offsets;
  args.blocks = c.blocks;
  args.capacity = c.capacity;
  args.used = c.used;
  args.overflows = c.overflows;
  args.k_means = c.k_means;
  args.forced_density = c.forced_density;
  return args;
}

}  // namespace

extern "C" {

int32_t hw_kernels_abi_version(void) { return HW_KERNELS_ABI_VERSION; }

const char* hw_last_error(void) { return hk::capi::LastError().c_str(); }

size_t hw_attention_workspace_bytes(const hw_attention_args* args) {
  hw_attention_args c;
  if (!Read(args, &c)) return 0;
  return Counted([&] { return hk::CudaAttentionWorkspaceBytes(FromC(c)); });
}

hw_status hw_attention(const hw_attention_args* args, void* workspace, size_t workspace_bytes, void* stream) {
  return WithArgs(args, [&](const hw_attention_args& c) {
    return hk::CudaAttention(FromC(c), workspace, workspace_bytes, StreamOf(stream));
  });
}

hw_status hw_check_block_lists(const hw_attention_args* args, int64_t num_blocks, int64_t* first_bad,
                               void* workspace, size_t workspace_bytes, void* stream) {
  return WithArgs(args, [&](const hw_attention_args& c) {
    return hk::CudaCheckBlockLists(FromC(c), num_blocks, first_bad, workspace, workspace_bytes,
                                   StreamOf(stream));
  });
}

int64_t hw_search_tiles(const hw_search_args* args) {
  hw_search_args c;
  if (!Read(args, &c)) return 0;
  return Counted([&] { return hk::CudaSearchTiles(FromC(c)); });
}

size_t hw_search_workspace_bytes(const hw_search_args* args) {
  hw_search_args c;
  if (!Read(args, &c)) return 0;
  return Counted([&] { return hk::CudaSearchWorkspaceBytes(FromC(c)); });
}

hw_status hw_select_blocks(const hw_search_args* args, void* workspace, size_t workspace_bytes,
                           void* stream) {
  return WithArgs(args, [&](const hw_search_args& c) {
    return hk::CudaSelectBlocks(FromC(c), workspace, workspace_bytes, StreamOf(stream));
  });
}

hw_status hw_merge_partials(const hw_merge_args* args, void* stream) {
  return WithArgs(args, [&](const hw_merge_args& c) {
    return hk::CudaMergePartials(
        {c.a, c.a_lse_ln, c.b, c.b_lse_ln, c.out_f32, c.out, c.lse_ln, c.num_rows, c.head_dim},
        StreamOf(stream));
  });
}

}  // extern "C"
