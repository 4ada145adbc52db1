// What FlashPrefill's selection kernel is told, and its launch.
#ifndef HW_KERNELS_CUDA_SM90_FLASH_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_FLASH_LAUNCH_H_

#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace headwater::kernels::sm90 {

inline constexpr int32_t kFlashRows =
    128;  // of a tile: row r is position r / pack, head r % pack of the list
inline constexpr int32_t kFlashChunk = 64;  // block means that a warpgroup scores at a time

struct FlashParams {
  int32_t pack;  // query heads of a list
  int32_t lists_per_kv_head;
  int32_t num_lists;
  int32_t num_tokens;
  int32_t tiles;  // of a list
  int32_t tile_positions;
  bool own_block;    // the last row of a tile of 128 positions scores the tile's own block
  float scale_log2;  // softmax scale * log2(e)
  float alpha_log2;
  int32_t sink_blocks;
  int32_t window_blocks;
  int32_t first_dense_tile;
  int32_t min_blocks;
  uint32_t* words;  // [num_lists, tiles, tile_words]
  int64_t tile_words;
  float* energies;  // [num_lists, tiles, blocks], or null
  int64_t blocks;
};
static_assert(std::is_trivially_copyable_v<FlashParams>);

// Maps of Q with the dimensions 64 columns, heads of a list, positions, 64-column panels, lists; a box is a
// tile's rows of one panel. Of means: 64 columns, rows, panels, KV heads; a box is kFlashChunk rows of all
// panels.
cudaError_t LaunchFlashSelect(const CUtensorMap& q, const CUtensorMap& means, const FlashParams& params,
                              int head_dim, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_FLASH_LAUNCH_H_
