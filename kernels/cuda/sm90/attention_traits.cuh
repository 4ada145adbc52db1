// Tile sizes, shared memory and barriers of the sm_90a attention kernel.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/sm90/attention_params.h"

namespace headwater::kernels::sm90 {

// One tile of work, as the scheduler hands it to producer and consumers.
struct TileInfo {
  static constexpr int kMaskedBlocks = 3;

  const int32_t* blocks;  // ascending; null: every block below num_blocks
  int32_t num_blocks;     // steps; 0: no key is visible; kNoMoreTiles: the end
  int32_t head;           // packed head
  int32_t kv_panel;       // first 64-column panel of its KV head
  int32_t position;       // of row 0, counted from the sequence's first query
  int32_t q_begin;        // the sequence's first query token
  int32_t q_len;
  int32_t k_begin;  // its first key token
  int32_t kv_len;
  int32_t complete;     // blocks that every row sees whole
  int32_t corrections;  // steps over means, after the others
  int32_t key_of_row;   // last visible key of a row = its position + key_of_row (at most kv_len - 1)
  int32_t masked_block[kMaskedBlocks];  // the first steps' blocks; later ones need no mask

  // Steps walk from the last block down: masks come first, and the running maximum starts high.
  __device__ __forceinline__ int Block(int step) const {
    const int i = num_blocks - 1 - step;
    return blocks == nullptr ? i : __ldg(blocks + i);
  }
};
inline constexpr int32_t kNoMoreTiles = -1;

// One column of a step over means: eight of them.
struct MeanGroup {
  uint32_t live : 8;    // which of them count
  uint32_t coarse : 1;  // means of superblocks
  uint32_t group : 23;  // row of the tables / 8
};

// kHeadDim 64 or 128; kConsumers warpgroups of 64 rows each; kKeys a step; kCorrected: with mean correction.
template <int kHeadDim_, int kConsumers_, int kKeys_, bool kCorrected_ = false>
struct AttentionTraits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kKeys = kKeys_;
  static constexpr bool kCorrected = kCorrected_;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kPanels = kHeadDim / 64;  // 128 bytes wide: what a swizzled copy can do
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kStages = 2;
  static constexpr int kTileSlots = 4;
  // Groups of means lie one after the other, 8 rows a panel, where K and V have their panels apart.
  static constexpr int kGroups = kKeys / 8;
  static constexpr uint32_t kGroupBytes = 8 * kHeadDim * 2;
  static constexpr uint32_t kQBytes = kRows * kHeadDim * 2;
  static constexpr uint32_t kKvBytes = kKeys * kHeadDim * 2;
  // Staging room for O; with 160 keys there is none left, and rows leave straight from registers.
  static constexpr uint32_t kOutBytes = kKeys == 128 ? kQBytes : 0;
  // 168 (384 threads) or 128 (512 threads) registers at launch, dealt anew: sums stay within 64 Ki.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kCorrected ? 40 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : kCorrected ? 232 : 240;

  // Q has two buffers so that the next tile's scores start under this tile's last values; O has its own so
  // that both Q buffers stay free. d = 128: 64 + 64 + 64 + 32 KiB of 227, or 64 + 80 + 80 with 160 keys.
  struct Shared {
    alignas(1024) uint8_t q[2][kQBytes];
    alignas(1024) uint8_t k[kStages][kKvBytes];
    alignas(1024) uint8_t v[kStages][kKvBytes];
    alignas(1024) uint8_t out[kOutBytes > 0 ? kOutBytes : 16];
    alignas(16) TileInfo tiles[kTileSlots];
    alignas(16) MeanGroup groups[kCorrected ? kStages : 1][kGroups];  // of the K in each stage
    uint8_t expanded[kCorrected ? kMaxSuperblockBytes : 1];  // the producer's: superblocks by their blocks
    // "full": the copy has landed (or the slot is written); "empty": every consumer is done with it.
    uint64_t q_full[2], q_empty[2];
    uint64_t k_full[kStages], k_empty[kStages];
    uint64_t v_full[kStages], v_empty[kStages];
    uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

// Named barriers; 0 is __syncthreads().
enum class NamedBarrier : int {
  kTurn = 1,      // + consumer: its turn to issue matrix instructions
  kConsumer = 5,  // + consumer: the 128 threads of one warpgroup
};

}  // namespace headwater::kernels::sm90
