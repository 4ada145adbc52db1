// The stages of FlexPrefill (arXiv:2502.20766) that follow the tail profile and cover(), which SharePrefill
// is built on too. The rule of each is that of reference/policies/flex.h with block_tokens = 128; nb =
// ceil(num_tokens / 128).
//
// All: arrays are device memory, contiguous, 16-byte aligned, and live until the stream has passed. Equal
// calls give equal bits. INVALID_ARGUMENT: null or misaligned arrays, a value out of range, a workspace too
// small. UNIMPLEMENTED: head_dim, GQA ratio, a device that is not sm_90. INTERNAL: a CUDA call failed.
#ifndef HW_KERNELS_CUDA_POLICIES_FLEX_STAGES_H_
#define HW_KERNELS_CUDA_POLICIES_FLEX_STAGES_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_masks.h"
#include "kernels/status.h"

namespace headwater::kernels {

struct CudaFlexBudgetsArgs {
  const void* q = nullptr;        // bf16 [num_tokens, num_q_heads, head_dim]
  const float* k_mean = nullptr;  // [nb, num_kv_heads, head_dim], as CudaBlockStatistics() gives it
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;  // at most 32767
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64 or 128
  float softmax_scale = 0;
  const float* column_scores = nullptr;  // V: [num_q_heads, nb]
  const int64_t* covers = nullptr;       // [2, num_q_heads]: of vertical, of slash
  double tau = 0;                        // 0 to 1
  bool nan_rule = true;                  // as reference::FlexCompat
  int64_t min_blocks = 0;                // 1 to 2^31 - 1
  int64_t max_blocks = 0;                // likewise

  float* pooled = nullptr;         // pbar: [num_q_heads, nb]
  float* js_distance = nullptr;    // [num_q_heads]; NaN by nan_rule
  uint8_t* query_aware = nullptr;  // [num_q_heads]: 0 or 1
  // n_v and n_s as used: min_blocks in query-aware heads; in others cover / 128 + 1, clamped. At most nb.
  int32_t* budgets = nullptr;  // [2, num_q_heads]
};

// Fills the last four. Sums over blocks are f64. A NaN in q or k_mean makes its head's distance NaN. Cost: a
// read of k_mean for each query head, by one CTA.
Status CudaFlexBudgets(const CudaFlexBudgetsArgs& args, cudaStream_t stream);

struct CudaFlexTopArgs {
  const float* scores = nullptr;     // [2, num_heads, num_blocks]: V, D
  const int32_t* budgets = nullptr;  // [2, num_heads]
  int64_t num_blocks = 0;            // 1 to 2^24
  int32_t num_heads = 0;             // 1 to 32767
  // Bit i % 32 of word i / 32 of a row, ceil(nb / 32) words. Of V: column i. Of D: offset nb - 1 - i.
  uint32_t* bits = nullptr;  // [2, num_heads, words]
};

// Column 0 and the best budget - 1 others, of equal ones the lowest; offset 0 and the best budget - 1 others,
// of equal ones the smallest. Scores that are not positive numbers count as 0, budgets below 1 as 1. Cost:
// four reads of a row, by one CTA.
Status CudaFlexTop(const CudaFlexTopArgs& args, cudaStream_t stream);

// Writes every word of masks (tiles of 128 positions, one list per query head) from CudaFlexTop()'s bits: in
// tile i columns j <= i, and i - o for offsets o <= i. Cost: a write of the masks.
Status CudaFlexMasks(const uint32_t* bits, const CudaBlockMasks& masks, cudaStream_t stream);

struct CudaFlexPooledArgs {
  const void* q = nullptr;        // as above
  const float* k_mean = nullptr;  // as above
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64 or 128
  float softmax_scale = 0;
  const uint8_t* query_aware = nullptr;    // [num_q_heads]
  double gamma = 0;                        // over 0 and below 1
  CudaBlockMasks masks;                    // blocks are added to it
  int64_t map_bytes = int64_t{256} << 20;  // of maps at a time; 1 or more
};

// 256-byte aligned device memory that CudaFlexPooled() needs: means of q, f32, and the maps of as many heads
// as 256 MiB hold, at least of one (2 nb (nb + 1) bytes).
size_t CudaFlexPooledWorkspaceBytes(const CudaFlexPooledArgs& args);

// Query-aware heads: adds the best (I, J) of the pooled map, over all rows at once, while their sum is at
// most gamma * nb; of equal ones the lower row, then column. Scores and shares are f32. NaN shares count as
// 0. Cost: in query-aware heads a read of q, 2 head_dim nb^2 / 2 FLOP in f32 and seven passes over the map;
// in others nothing but launches.
Status CudaFlexPooled(const CudaFlexPooledArgs& args, void* workspace, size_t workspace_bytes,
                      cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_FLEX_STAGES_H_
