#include "kernels/attention/block_index.h"

#include <string>

namespace headwater::kernels {
namespace {

// Positions stay exact in double and far from overflow in int64_t.
constexpr int64_t kMaxPosition = int64_t{1} << 53;

std::string Name(const BlockIndex& index, int64_t row) {
  const int64_t list = row / index.num_q_tiles;
  const int64_t tile = index.first_q_tile + row % index.num_q_tiles;
  return "segment (list " + std::to_string(list) + ", tile " + std::to_string(tile) + ")";
}

// The last block that tile `tile` may attend to: the one of its last query.
int64_t LastBlock(const BlockIndex& index, int64_t tile) {
  return ((tile + 1) * index.q_tile_tokens - 1) / index.k_block_tokens;
}

Status ValidateSizes(const BlockIndex& index) {
  if (index.q_tile_tokens < 1 || index.k_block_tokens < 1) {
    return InvalidArgument("q_tile_tokens " + std::to_string(index.q_tile_tokens) + " and k_block_tokens " +
                           std::to_string(index.k_block_tokens) + " must be at least 1");
  }
  if (index.num_lists < 1) {
    return InvalidArgument("num_lists " + std::to_string(index.num_lists) + " is below 1");
  }
  if (index.first_q_tile < 0 || index.num_q_tiles < 0 || index.first_q_tile > kMaxPosition ||
      index.num_q_tiles > kMaxPosition ||
      static_cast<__int128>(index.first_q_tile + index.num_q_tiles) * index.q_tile_tokens > kMaxPosition) {
    return InvalidArgument("tiles from " + std::to_string(index.first_q_tile) + ", " +
                           std::to_string(index.num_q_tiles) + " of them, are outside positions 0 to 2^53");
  }
  const auto segments = static_cast<__int128>(index.num_lists) * index.num_q_tiles;
  if (segments != static_cast<__int128>(index.dense.size()) ||
      segments + 1 != static_cast<__int128>(index.offsets.size())) {
    return InvalidArgument("dense has " + std::to_string(index.dense.size()) + " and offsets " +
                           std::to_string(index.offsets.size()) + " entries for num_lists " +
                           std::to_string(index.num_lists) + " times num_q_tiles " +
                           std::to_string(index.num_q_tiles));
  }
  if (index.offsets.front() != 0 || index.offsets.back() != static_cast<int64_t>(index.blocks.size())) {
    return InvalidArgument("offsets go from " + std::to_string(index.offsets.front()) + " to " +
                           std::to_string(index.offsets.back()) + ", not from 0 to the number of blocks, " +
                           std::to_string(index.blocks.size()));
  }
  const bool no_mask = index.sink_tokens < 0 && index.window_tokens < 0;
  const bool mask = index.sink_tokens >= 0 && index.window_tokens >= 0;
  if (!no_mask && !mask) {
    return InvalidArgument("sink_tokens " + std::to_string(index.sink_tokens) + " and window_tokens " +
                           std::to_string(index.window_tokens) + " must both be negative or both not");
  }
  return {};
}

Status ValidateSegment(const BlockIndex& index, int64_t row) {
  const auto begin = index.offsets[static_cast<size_t>(row)];
  const auto end = index.offsets[static_cast<size_t>(row) + 1];
  if (index.dense[static_cast<size_t>(row)] != 0 && begin != end) {
    return InvalidArgument(Name(index, row) + " is dense, but lists " + std::to_string(end - begin) +
                           " blocks");
  }
  const int64_t last = LastBlock(index, index.first_q_tile + row % index.num_q_tiles);
  int64_t previous = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = index.blocks[static_cast<size_t>(i)];
    if (block <= previous) {
      return InvalidArgument(Name(index, row) + ": block " + std::to_string(block) + " comes after " +
                             std::to_string(previous) + ", blocks must be ascending from 0");
    }
    if (block > last) {
      return InvalidArgument(Name(index, row) + ": block " + std::to_string(block) +
                             " is past the tile's own, " + std::to_string(last));
    }
    previous = block;
  }
  return {};
}

}  // namespace

BlockIndex DenseBlockIndex(int64_t first_q_tile, int64_t num_q_tiles) {
  BlockIndex index;
  index.first_q_tile = first_q_tile;
  index.num_q_tiles = num_q_tiles;
  index.dense.assign(static_cast<size_t>(num_q_tiles), 1);
  index.offsets.assign(static_cast<size_t>(num_q_tiles) + 1, 0);
  return index;
}

Status ValidateBlockIndex(const BlockIndex& index) {
  HW_KERNELS_RETURN_IF_ERROR(ValidateSizes(index));
  const int64_t segments = index.num_lists * index.num_q_tiles;
  for (int64_t row = 0; row < segments; ++row) {
    if (index.offsets[static_cast<size_t>(row)] > index.offsets[static_cast<size_t>(row) + 1]) {
      return InvalidArgument(Name(index, row) + ": offsets fall");
    }
  }
  for (int64_t row = 0; row < segments; ++row) {
    HW_KERNELS_RETURN_IF_ERROR(ValidateSegment(index, row));
  }
  return {};
}

BlockCounts CountBlocks(const BlockIndex& index) {
  BlockCounts counts;
  for (int64_t row = 0; row < index.num_lists * index.num_q_tiles; ++row) {
    const auto possible =
        static_cast<uint64_t>(LastBlock(index, index.first_q_tile + row % index.num_q_tiles) + 1);
    const auto segment = static_cast<size_t>(row);
    counts.possible += possible;
    counts.selected += index.dense[segment] != 0
                           ? possible
                           : static_cast<uint64_t>(index.offsets[segment + 1] - index.offsets[segment]);
  }
  return counts;
}

}  // namespace headwater::kernels
