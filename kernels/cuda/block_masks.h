// Bit masks of key blocks, which pattern policies write, and block lists, which attention reads.
#ifndef HW_KERNELS_CUDA_BLOCK_MASKS_H_
#define HW_KERNELS_CUDA_BLOCK_MASKS_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/attention.h"
#include "kernels/status.h"

namespace headwater::kernels {

// One sequence whose keys are its queries'. List l, tile t, block b: bit b % 32 of
// words[(l * tiles + t) * tile_words + b / 32]. Tiles have tile_positions query positions, blocks 128 keys.
struct CudaBlockMasks {
  uint32_t* words = nullptr;  // device memory, 16-byte aligned
  int64_t num_tokens = 0;
  int32_t num_lists = 0;  // query heads, or KV heads
  int32_t tile_positions = 0;

  int64_t tiles() const { return (num_tokens + tile_positions - 1) / tile_positions; }
  int64_t blocks() const { return (num_tokens + 127) / 128; }
  int64_t tile_words() const { return ((num_tokens + 127) / 128 + 31) / 32; }
  size_t bytes() const { return static_cast<size_t>(num_lists * tiles() * tile_words()) * 4; }
};

// Sized for num_tokens, with a list for each query head (tiles of 128 positions) or for each KV head (tiles
// of 128 / (query heads / KV heads), rounded down); words is null.
CudaBlockMasks CudaBlockMasksOf(int64_t num_tokens, int32_t num_q_heads, int32_t num_kv_heads,
                                bool per_query_head);

struct CudaListsOfMasksArgs {
  CudaBlockMasks masks;
  // [num_lists]; nonzero: all tiles of that list are dense, whatever its mask. Or null.
  const uint8_t* dense_lists = nullptr;
  int32_t* counts = nullptr;   // [num_lists * tiles]; written: -1 where every causal block is set
  int64_t* offsets = nullptr;  // [num_lists * tiles]; written
  int32_t* blocks = nullptr;   // [capacity]; written
  int64_t capacity = 0;        // a tile that finds no room goes dense
  // Device memory, written: (list, tile, block) that attention will visit, and tiles that went dense for want
  // of room.
  uint64_t* visited = nullptr;
  uint32_t* overflows = nullptr;
};

// Lists as attention takes them: ascending, one after the other in the order of segments. Bits past a tile's
// last visible block are not looked at. Enqueues on `stream`, no host synchronisation; arrays must live until
// it has passed. Equal calls give equal bits. INVALID_ARGUMENT: null or misaligned arrays (16 bytes; visited
// 8, overflows 4), sizes out of range. UNIMPLEMENTED: a device that is not sm_90. INTERNAL: a CUDA call
// failed. Cost: two reads of the masks as far as tiles see, a write of the lists, a sum over segments by one
// CTA.
Status CudaListsOfMasks(const CudaListsOfMasksArgs& args, cudaStream_t stream);

struct CudaCountListsArgs {
  CudaBlockLists lists;  // as CudaAttention() takes them for one prompt; num_lists over 0
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  // Device memory [num_lists], written: (tile, block) of each list that attention visits, and its tiles that
  // are dense.
  uint64_t* visited = nullptr;
  uint32_t* dense_tiles = nullptr;
  // Whose tiles the lists are of; their keys are the prompt's.
  CudaQueryRange queries = {};
  // Adds to what `visited` and `dense_tiles` hold, and *overflows to *overflow_sum, unless that is null.
  bool accumulate = false;
  const uint32_t* overflows = nullptr;
  uint32_t* overflow_sum = nullptr;
};

// Counts what lists hold. Enqueues on `stream`; lifetimes, errors and determinism as CudaListsOfMasks().
// Cost: a read of the counts.
Status CudaCountLists(const CudaCountListsArgs& args, cudaStream_t stream);

// Blocks of all lists that attention without lists would visit: what `visited` is a share of.
uint64_t CudaPossibleBlocks(const CudaBlockMasks& masks);

// Likewise of one list over some queries, a tile for each tile_positions of them from the first on.
uint64_t CudaPossibleBlocks(const CudaQueryRange& queries, int32_t tile_positions);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_BLOCK_MASKS_H_
