// Statistics of K and V by blocks of 128 tokens, from which block patterns are searched and corrected.
#ifndef HW_KERNELS_CUDA_BLOCK_STATS_H_
#define HW_KERNELS_CUDA_BLOCK_STATS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

inline constexpr int32_t kStatsBlockTokens = 128;
inline constexpr int32_t kBlocksPerSuperblock = 8;

// Where statistics go: f32 arrays in device memory, 16-byte aligned, of the whole sequence. blocks =
// CudaStatsBlocks(tokens); blocks are counted from token 0, a last one that is cut short counts its own
// tokens only. Null: not wanted.
struct CudaBlockStats {
  float* k_mean = nullptr;  // [blocks, num_kv_heads, head_dim]
  float* v_mean = nullptr;
  // Elementwise bounds of K (Quest, arXiv:2406.10774), [blocks, num_kv_heads, head_dim]; both or neither.
  float* k_min = nullptr;
  float* k_max = nullptr;
  float* k_mean_square = nullptr;  // [blocks, num_kv_heads] mean over tokens of |row|^2
  float* v_mean_square = nullptr;
  float* k_max_norm = nullptr;  // [blocks, num_kv_heads] largest |row|_2
  float* v_max_norm = nullptr;
};

struct CudaBlockStatsArgs {
  // bf16 [total_k, num_kv_heads, head_dim] in device memory, 16-byte aligned, K rotated. One of which no
  // statistic is wanted may be null.
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t total_k = 0;  // at most 2^31 - 1
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64 or 128
  // Only blocks from this token on are read and written: what a chunk adds. A multiple of 128, at most
  // total_k.
  int64_t first_token = 0;
  CudaBlockStats stats;
};

// ceil(tokens / 128).
constexpr int64_t CudaStatsBlocks(int64_t tokens) {
  return (tokens + kStatsBlockTokens - 1) / kStatsBlockTokens;
}

// Fills args.stats. A block's sums are f32 in an order of its own: equal rows give equal bits, whether in one
// call, chunk by chunk, or in CudaSplitQkv(). A NaN spoils the statistics of its own block and head: the
// means and bounds of its column, and the squares and norms.
//
// Enqueues on `stream` (the current device's); arrays must live until it has passed. total_k = 0, no new
// block or no statistic wanted: OK, nothing is enqueued. INVALID_ARGUMENT: null or misaligned arrays, one
// bound without the other, sizes out of range. UNIMPLEMENTED: head_dim, a device that is not sm_90. INTERNAL:
// a CUDA call failed. Cost: one read of K and V.
Status CudaBlockStatistics(const CudaBlockStatsArgs& args, cudaStream_t stream);

// Means as bf16 tables for products with queries, one or both.
struct CudaMeanTablesArgs {
  // f32 [blocks, num_kv_heads, head_dim], as CudaBlockStats; device memory, 16-byte aligned, like all here.
  const float* k_mean = nullptr;
  const float* v_mean = nullptr;
  // bf16 [num_kv_heads, CudaMeanTableRows(total_k), head_dim], written whole. Null together with its mean.
  void* k_table = nullptr;
  void* v_table = nullptr;
  int64_t total_k = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64 or 128
};

// A head's rows: one per block ("fine"), padded with zeros to a multiple of 8, then one per superblock of 8
// blocks ("coarse"): the mean over its tokens, padded with zeros to a multiple of 8. CudaMeanTableCoarseRow()
// is the number of the first coarse row.
constexpr int64_t CudaMeanTableCoarseRow(int64_t total_k) {
  constexpr int64_t kTokens = int64_t{kBlocksPerSuperblock} * kStatsBlockTokens;
  return (total_k + kTokens - 1) / kTokens * kBlocksPerSuperblock;
}
constexpr int64_t CudaMeanTableRows(int64_t total_k) {
  const int64_t fine = CudaMeanTableCoarseRow(total_k);
  const int64_t coarse = (fine / kBlocksPerSuperblock + 7) / 8 * 8;
  return fine + coarse;
}

// Fine rows are the means rounded to bf16; a coarse row weighs each block's f32 mean by the block's tokens,
// in order, and is rounded once. Stream, lifetime, errors and total_k = 0 as CudaBlockStatistics(). Cost: a
// read of the means, a write of the tables.
Status CudaMeanTables(const CudaMeanTablesArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_BLOCK_STATS_H_
