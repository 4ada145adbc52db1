#include "kernels/cuda/flash.h"

#include <cmath>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/flash_launch.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

Status CheckMasks(const CudaFlashArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("masks.words", a.masks.words));
  const CudaBlockMasks wanted =
      CudaBlockMasksOf(a.num_tokens, a.num_q_heads, a.num_kv_heads, a.per_query_head);
  if (a.masks.num_tokens == wanted.num_tokens && a.masks.num_lists == wanted.num_lists &&
      a.masks.tile_positions == wanted.tile_positions) {
    return {};
  }
  return InvalidArgument("masks of " + std::to_string(a.masks.num_tokens) + " tokens, " +
                         std::to_string(a.masks.num_lists) + " lists, tiles of " +
                         std::to_string(a.masks.tile_positions) + " positions; " +
                         std::to_string(wanted.num_tokens) + ", " + std::to_string(wanted.num_lists) +
                         " and " + std::to_string(wanted.tile_positions) + " are wanted");
}

Status Validate(const CudaFlashArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(a.num_tokens, a.num_tokens, a.num_q_heads, a.num_kv_heads, a.head_dim));
  if (a.num_tokens > kCudaFlashMostTokens) {
    return {StatusCode::kUnimplemented, "num_tokens is " + std::to_string(a.num_tokens) + "; at most " +
                                            std::to_string(kCudaFlashMostTokens) + " is known"};
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", a.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k_means", a.k_means));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("energies_log2", a.energies_log2));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("mean_rows", a.mean_rows, (a.num_tokens + 127) / 128, INT32_MAX));
  if (!(a.softmax_scale > 0) || !std::isfinite(a.softmax_scale)) {
    return InvalidArgument("softmax_scale is " + NumberText(a.softmax_scale) +
                           "; a positive number is wanted");
  }
  if (!(a.alpha >= 0 && a.alpha <= 1)) {
    return InvalidArgument("alpha is " + NumberText(a.alpha) + "; 0 to 1 is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("sink_blocks", a.sink_blocks, 0, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("window_blocks", a.window_blocks, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("dense_last_tiles", a.dense_last_tiles, 0, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("min_blocks", a.min_blocks, 0, INT32_MAX));
  return CheckMasks(a);
}

// Queries as tiles take them: the rows of one tile's panel of 64 columns a box. Means: 64 rows, all panels.
Status MakeMaps(const CudaFlashArgs& a, int32_t pack, CUtensorMap* q, CUtensorMap* means) {
  const int64_t row = int64_t{a.head_dim} * 2, panels = a.head_dim / 64;
  HW_KERNELS_RETURN_IF_ERROR(MakeTensorMap(a.q,
                                           {{64, 2, 64},
                                            {pack, row, pack},
                                            {a.num_tokens, a.num_q_heads * row, a.masks.tile_positions},
                                            {panels, 128, 1},
                                            {a.masks.num_lists, pack * row, 1}},
                                           q));
  return MakeTensorMap(a.k_means,
                       {{64, 2, 64},
                        {a.mean_rows, row, sm90::kFlashChunk},
                        {panels, 128, static_cast<int32_t>(panels)},
                        {a.num_kv_heads, a.mean_rows * row, 1}},
                       means);
}

}  // namespace

Status CudaFlashSelect(const CudaFlashArgs& args, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  const int64_t tiles = args.masks.tiles();
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_lists * tiles", args.masks.num_lists * tiles, 1, INT32_MAX));
  sm90::FlashParams p{};
  p.pack = args.per_query_head ? 1 : args.num_q_heads / args.num_kv_heads;
  p.lists_per_kv_head = args.masks.num_lists / args.num_kv_heads;
  p.num_lists = args.masks.num_lists;
  p.num_tokens = static_cast<int32_t>(args.num_tokens);
  p.tiles = static_cast<int32_t>(tiles);
  p.tile_positions = args.masks.tile_positions;
  p.own_block = args.per_query_head;
  p.scale_log2 = static_cast<float>(args.softmax_scale * kLog2E);
  p.alpha_log2 = static_cast<float>(std::log2(args.alpha));
  p.sink_blocks = args.sink_blocks;
  p.window_blocks = args.window_blocks;
  p.first_dense_tile =
      static_cast<int32_t>(tiles > args.dense_last_tiles ? tiles - args.dense_last_tiles : 0);
  p.min_blocks = args.min_blocks;
  p.words = args.masks.words;
  p.tile_words = args.masks.tile_words();
  p.energies = args.energies_log2;
  p.blocks = args.masks.blocks();
  CUtensorMap q, means;
  HW_KERNELS_RETURN_IF_ERROR(MakeMaps(args, p.pack, &q, &means));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchFlashSelect(q, means, p, args.head_dim, stream));
  return {};
}

}  // namespace headwater::kernels
