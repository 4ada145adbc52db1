// What the sm_90a attention kernels are told. Plain data, copied at launch.
#ifndef HW_KERNELS_CUDA_SM90_ATTENTION_PARAMS_H_
#define HW_KERNELS_CUDA_SM90_ATTENTION_PARAMS_H_

#include <cstdint>
#include <type_traits>

namespace headwater::kernels::sm90 {

inline constexpr int kBlockKeys = 128;  // keys of one step, and of one block of an index

// Query rows of one tile belong to `pack` neighbouring query heads at tile_positions positions: row r is
// position r / pack, head r % pack. pack is the GQA ratio, or 1 where every query head has lists of its own.
struct AttentionParams {
  int32_t num_sequences;
  const int32_t* cu_q;        // [num_sequences + 1] first query token of each sequence
  const int32_t* cu_k;        // [num_sequences + 1] first key token of each
  const int32_t* tile_begin;  // [num_sequences + 1] first tile of each, within one head
  int32_t q_position;         // of query 0 counted from key 0; kBottomRight: kv_len - q_len
  int32_t num_q_heads;
  int32_t num_heads;          // num_q_heads / pack
  int32_t heads_per_kv_head;  // num_heads / KV heads
  int32_t pack;
  int32_t tile_positions;  // rows of a tile / pack, rounded down
  int32_t section_heads;   // heads whose tiles are in flight together; divides num_heads
  int32_t store_by_map;    // whole tiles leave through the tensor map of `out`
  float scale_log2;        // softmax scale * log2(e)
  void* out;               // bf16 [tokens, num_q_heads, head_dim], or null
  float* out_f32;          // the same in f32, or null
  float* lse_ln;           // [tokens, num_q_heads], or null
  int32_t* next_tile;      // 0 at launch
  // Lists: segment = head * tiles + tile. null counts: every causal block.
  const int32_t* list_counts;   // blocks of each segment; kDenseSegment: every causal block
  const int64_t* list_offsets;  // first entry of each segment
  const int32_t* list_blocks;   // ascending within a segment
  // Mean correction: table row of the first superblock's mean / 8, and what a mean's raw score gains: log2 of
  // the tokens it stands for / scale_log2.
  int32_t coarse_group;
  float block_gain;
  float superblock_gain;
  // Segments of uncommon length go first: one of them drawn last would outlast everything else. null: none.
  const int32_t* long_tiles;       // their tile numbers
  const int32_t* long_tile_count;  // [1]
  const int64_t* total_blocks;     // [1] of all segments
};
static_assert(std::is_trivially_copyable_v<AttentionParams>);

inline constexpr int32_t kBottomRight = INT32_MIN;
inline constexpr int32_t kDenseSegment = -1;
inline constexpr int kSuperblock = 8;             // blocks
inline constexpr int kMaxSuperblockBytes = 2048;  // of a bitmap of superblocks: 16 Mi tokens

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_ATTENTION_PARAMS_H_
