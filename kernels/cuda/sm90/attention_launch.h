// Launch of the sm_90a attention kernel.
#ifndef HW_KERNELS_CUDA_SM90_ATTENTION_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_ATTENTION_LAUNCH_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/cuda/sm90/attention_params.h"

namespace headwater::kernels::sm90 {

struct AttentionMaps {
  CUtensorMap q, k, v, out;
  CUtensorMap k_means, v_means;            // with correction: one group of 8 means a box
  CUtensorMap k_mean_steps, v_mean_steps;  // and 16 groups
};

struct AttentionTile {
  int32_t rows, keys;  // query rows of a tile, and keys of a step
};
AttentionTile TileFor(int head_dim, bool has_lists, int64_t kv_len);

cudaError_t LaunchAttention(const AttentionMaps& maps, const AttentionParams& params, int head_dim,
                            AttentionTile tile, bool corrected, int num_sms, cudaStream_t stream);

struct TilePrefixParams {
  const int32_t* cu_q;  // null: one sequence, of total_q and total_k tokens
  int32_t num_sequences;
  int32_t tile_positions;
  int32_t* tile_begin;  // [num_sequences + 1], written
  int32_t* next_tile;   // set to 0
  int32_t* single_q;    // {0, total_q}, written where cu_q is null
  int32_t* single_k;    // {0, total_k}
  int32_t total_q;
  int32_t total_k;
  int32_t* long_tile_count;  // set to 0; may be null, as the next
  int64_t* total_blocks;     // set to 0
};

// What the kernel above reads beside its inputs. One CTA; O(num_sequences).
cudaError_t LaunchTilePrefix(const TilePrefixParams& params, cudaStream_t stream);

// Finds the tiles that go first: sets *total_blocks, and *long_tile_count and long_tiles [tiles * num_heads]
// of `params` (which points to them). After LaunchTilePrefix. max_tiles: at least the tiles of a head.
cudaError_t LaunchLongTiles(const AttentionParams& params, int64_t max_tiles, cudaStream_t stream);

// Lowers *first_bad, unsigned and all ones before, to the first segment that CudaCheckBlockLists() refuses.
// After LaunchTilePrefix.
cudaError_t LaunchCheckLists(const AttentionParams& params, int64_t num_blocks, int64_t* first_bad,
                             int num_sms, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_ATTENTION_LAUNCH_H_
