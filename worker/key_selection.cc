#include "worker/key_selection.h"

namespace headwater {

void KeySelection::Add(int rank, const kernels::BlockIndex& index) const {
  const int32_t group = num_q_heads_ / num_kv_heads_;
  for (int32_t list = 0; list < index.num_lists; ++list) {
    // The KV heads whose query heads use this list: a list may be of several, and several of one.
    const auto first_head =
        static_cast<int32_t>((int64_t{list} * num_q_heads_ + index.num_lists - 1) / index.num_lists / group);
    const auto last_head = static_cast<int32_t>(
        (((int64_t{list} + 1) * num_q_heads_ + index.num_lists - 1) / index.num_lists - 1) / group);
    int64_t dense_blocks = 0;  // all below the highest dense tile's end
    for (int64_t tile = index.first_q_tile; tile < index.first_q_tile + index.num_q_tiles; ++tile) {
      const auto segment = static_cast<size_t>(index.Row(list, tile));
      if (index.dense[segment] != 0) {
        dense_blocks = ((tile + 1) * index.q_tile_tokens - 1) / index.k_block_tokens + 1;
        continue;
      }
      for (int64_t i = index.offsets[segment]; i < index.offsets[segment + 1]; ++i) {
        for (int32_t head = first_head; head <= last_head; ++head) {
          Set(rank, index.blocks[static_cast<size_t>(i)], head);
        }
      }
    }
    for (int64_t block = 0; block < dense_blocks; ++block) {
      for (int32_t head = first_head; head <= last_head; ++head) Set(rank, block, head);
    }
  }
}

}  // namespace headwater
