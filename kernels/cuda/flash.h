// FlashPrefill's selection of key blocks on a Hopper GPU, V1 (arXiv:2603.06199) and V2 (arXiv:2608.19758):
// every row of a query tile scores the mean key of every block. The rules are those of
// reference/policies/flash.h and flash2.h.
#ifndef HW_KERNELS_CUDA_FLASH_H_
#define HW_KERNELS_CUDA_FLASH_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_masks.h"
#include "kernels/status.h"

namespace headwater::kernels {

// One sequence whose keys are its queries'. Device memory, 16-byte aligned.
struct CudaFlashArgs {
  const void* q = nullptr;  // bf16 [num_tokens, num_q_heads, head_dim], rotated
  // bf16 [num_kv_heads, mean_rows, head_dim]; row J < blocks: mean of K over the tokens of block J. A table
  // of CudaMeanTables() will do.
  const void* k_means = nullptr;
  int64_t mean_rows = 0;  // at least blocks = ceil(num_tokens / 128)
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;  // num_q_heads / num_kv_heads is 1 to 8
  int32_t head_dim = 0;      // 64 or 128
  float softmax_scale = 0;   // over 0
  // True: V1. A tile is 128 positions of one query head, and of its own block its last row has a say, if the
  // prompt reaches that far. False: V2. A tile is 128 / (num_q_heads / num_kv_heads) positions of a KV head's
  // query heads; scored are blocks that end at or before its last position, which all rows see.
  bool per_query_head = false;
  double alpha = 0;              // 0 to 1
  int32_t sink_blocks = 0;       // 0 and more
  int32_t window_blocks = 1;     // 1 and more: back from the block of the tile's first position
  int32_t dense_last_tiles = 0;  // 0 and more
  int32_t min_blocks = 0;        // 0 and more; as FlashParameters has it
  // CudaBlockMasksOf(num_tokens, num_q_heads, num_kv_heads, per_query_head) with its words. A tile's words
  // are written as far as it sees blocks.
  CudaBlockMasks masks;
  // For tests, or null: f32 [num_lists, tiles, blocks], log2 of the energies, sums over rows of 2^x, not
  // divided by their largest term; -infinity: no row sees the block. Written as far as a tile scores blocks,
  // unless it is dense.
  float* energies_log2 = nullptr;
};

inline constexpr int64_t kCudaFlashMostTokens = int64_t{1} << 22;

// Writes the masks. Logits and energies are f32: a block whose energy is within 2^-10 of the threshold,
// relatively, may be decided otherwise than in double. Deterministic. A block whose energy is not a number
// (NaN or infinity in Q or K) is listed only where a rule other than the threshold lists it.
//
// Enqueues on `stream` (the current device's), no workspace, no host synchronisation; arrays must live until
// it has passed. INVALID_ARGUMENT: null or misaligned arrays, values out of range, masks of another shape.
// UNIMPLEMENTED: head_dim, GQA ratio, more than kCudaFlashMostTokens, a device that is not sm_90. INTERNAL: a
// CUDA call failed. Cost: a read of q, and per query row and visible block 2 * head_dim FLOP and one 2^x:
// num_q_heads * num_tokens^2 / 256 of both; 1.3 ms on an H100 for 131,072 tokens and 32 heads of 128.
Status CudaFlashSelect(const CudaFlashArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_FLASH_H_
