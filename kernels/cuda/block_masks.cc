#include "kernels/cuda/block_masks.h"

#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/block_masks_launch.h"

namespace headwater::kernels {
namespace {

constexpr int32_t kMostLists = 1 << 16;

Status CheckPointer(const char* name, const void* pointer, size_t alignment) {
  if (pointer == nullptr) return InvalidArgument(std::string(name) + " is null");
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return {};
  return InvalidArgument(std::string(name) + " is not " + std::to_string(alignment) + "-byte aligned");
}

Status Validate(const CudaListsOfMasksArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.masks.num_tokens, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_lists", a.masks.num_lists, 1, kMostLists));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("tile_positions", a.masks.tile_positions, 1, 128));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("capacity", a.capacity, 1, INT64_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("words", a.masks.words));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("counts", a.counts));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("offsets", a.offsets));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("blocks", a.blocks));
  HW_KERNELS_RETURN_IF_ERROR(CheckPointer("visited", a.visited, 8));
  HW_KERNELS_RETURN_IF_ERROR(CheckPointer("overflows", a.overflows, 4));
  return CheckRange("num_lists * tiles", a.masks.num_lists * a.masks.tiles(), 1, INT32_MAX);
}

Status Validate(const CudaCountListsArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_lists", a.lists.num_lists, 1, kMostLists));
  const int32_t lists = a.lists.num_lists;
  if (a.num_q_heads < lists || a.num_q_heads % lists != 0 || a.num_q_heads / lists > 128) {
    return InvalidArgument(std::to_string(lists) + " lists of " + std::to_string(a.num_q_heads) +
                           " query heads; 1 to 128 heads a list are wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckPointer("counts", a.lists.counts, 4));
  HW_KERNELS_RETURN_IF_ERROR(CheckQueries(a.queries.first, a.queries.count, a.num_tokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckPointer("visited", a.visited, 8));
  if (a.overflow_sum != nullptr) {
    HW_KERNELS_RETURN_IF_ERROR(CheckPointer("overflows", a.overflows, 4));
    HW_KERNELS_RETURN_IF_ERROR(CheckPointer("overflow_sum", a.overflow_sum, 4));
  }
  return CheckPointer("dense_tiles", a.dense_tiles, 4);
}

}  // namespace

CudaBlockMasks CudaBlockMasksOf(int64_t num_tokens, int32_t num_q_heads, int32_t num_kv_heads,
                                bool per_query_head) {
  return {nullptr, num_tokens, per_query_head ? num_q_heads : num_kv_heads,
          per_query_head ? 128 : 128 / (num_q_heads / num_kv_heads)};
}

Status CudaListsOfMasks(const CudaListsOfMasksArgs& args, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchListsOfMasks(args, stream));
  return {};
}

Status CudaCountLists(const CudaCountListsArgs& args, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchCountLists(args, stream));
  return {};
}

uint64_t CudaPossibleBlocks(const CudaBlockMasks& masks) {
  // Block b is seen from the tile on that holds its first token, 128 * b / positions; a period of `positions`
  // blocks adds 128 to that.
  const int64_t positions = masks.tile_positions, blocks = masks.blocks();
  const int64_t periods = blocks / positions, rest = blocks % positions;
  int64_t unseen = 64 * positions * periods * (periods - 1) + 128 * periods * rest;
  for (int64_t i = 0; i < positions; ++i) unseen += (periods + (i < rest ? 1 : 0)) * (i * 128 / positions);
  return static_cast<uint64_t>(masks.tiles() * blocks - unseen) * static_cast<uint64_t>(masks.num_lists);
}

uint64_t CudaPossibleBlocks(const CudaQueryRange& queries, int32_t tile_positions) {
  uint64_t blocks = 0;
  for (int64_t at = 0; at < queries.count; at += tile_positions) {
    const int64_t end = queries.first + std::min<int64_t>(at + tile_positions, queries.count);
    blocks += static_cast<uint64_t>((end + 127) / 128);
  }
  return blocks;
}

}  // namespace headwater::kernels
