// Pattern search on a Hopper GPU: block lists for CudaAttention() from means of Q and K. Its cost is linear
// in the tokens but for one product of means with means, N^2 / (32 * 128) of a score each.
#ifndef HW_KERNELS_CUDA_PATTERN_H_
#define HW_KERNELS_CUDA_PATTERN_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/attention.h"
#include "kernels/status.h"

namespace headwater::kernels {

// One sequence; q and k as in CudaAttentionArgs.
struct CudaSearchArgs {
  const void* q = nullptr;
  const void* k = nullptr;  // may be null where k_means is given
  // bf16 table of K that CudaMeanTables() of cuda/block_stats.h made. Null: means are taken from k, which
  // costs a read of it.
  const void* k_means = nullptr;
  int64_t total_q = 0;
  int64_t total_k = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float softmax_scale = 0;
  int32_t query_position = CudaAttentionArgs::kBottomRightAligned;
  // A block is listed if it is worth `threshold` (over 0, at most 1) of the tile's best one.
  float threshold = 0.18f;
  // Host memory [num_kv_heads], read before the call returns, or null: a threshold for each KV head in place
  // of `threshold`. 0: the head is dense; over 1: its lists are sinks and window, and it is not searched.
  const float* thresholds = nullptr;
  const int32_t* windows = nullptr;  // likewise, in place of window_blocks
  // Over 0, at most 1: the ceil(forced_density * visible) best blocks are listed, sinks and window among
  // them; `visible` blocks are seen by the tile's last query, and threshold is not used. For measuring on
  // inputs without a pattern: every list has just this length (or that of sinks and window, where they are
  // more), and all lists together need capacity for their sum. 0: by threshold.
  double forced_density = 0;
  int32_t sink_blocks = 2;         // always listed, 0 and more
  int32_t window_blocks = 4;       // last ones of a tile, its own included, always listed; 1 and more
  int32_t dense_last_tokens = 32;  // tiles that hold one of the last queries attend to everything
  // Lists per KV head (num_lists = num_kv_heads); written. Segments as in CudaBlockLists, numbers of tiles as
  // CudaSearchTiles().
  int32_t* counts = nullptr;   // [num_kv_heads * tiles]
  int64_t* offsets = nullptr;  // [num_kv_heads * tiles]
  int32_t* blocks = nullptr;   // [capacity]
  int64_t capacity = 0;        // 16 a tile is usual; a tile that finds no room goes dense
  // Device memory, written: entries of `blocks` asked for (over capacity where some found no room), and tiles
  // that went dense for want of room.
  uint64_t* used = nullptr;
  uint32_t* overflows = nullptr;
};

// Of queries that a call searches for, the largest number up to `most` that leaves none of num_sms
// multiprocessors without work at the end, but one such number at least; 0: invalid arguments. args.total_q
// is not looked at.
int64_t CudaSearchWaves(const CudaSearchArgs& args, int num_sms, int64_t most);

// Tiles of one head: query positions / (128 / (num_q_heads / num_kv_heads)), rounded up.
int64_t CudaSearchTiles(const CudaSearchArgs& args);

// Means of K (unless given), 2 bytes * head_dim a block and KV head, and at most 64 MiB of means of Q. 0:
// invalid arguments.
size_t CudaSearchWorkspaceBytes(const CudaSearchArgs& args);

// Workspace of a search of num_tokens queries with k_means given, by threshold or density; 0: sizes that
// CudaSelectBlocks() refuses.
size_t CudaSearchProbeBytes(int64_t num_tokens, int32_t num_q_heads, int32_t num_kv_heads, int32_t head_dim);

// Finds the block lists: sm90/search_kernel.cuh has the rule, sm90/search_density.cuh that of a forced
// density, whose best blocks are exact but for margins within 2^-12 of the last one's. Enqueues on `stream`,
// no host synchronisation; same lifetimes and errors as CudaAttention(). Deterministic but for the order of
// lists within `blocks`, and, where there is not room for all, for which tiles go dense.
//
// Cost: one read of q and k (or k_means), and 4 * head_dim FLOP per (probe, block), 8 * head_dim with a
// forced density.
Status CudaSelectBlocks(const CudaSearchArgs& args, void* workspace, size_t workspace_bytes,
                        cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_PATTERN_H_
