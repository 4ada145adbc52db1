#include "kernels/cuda/pattern.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/attention_params.h"
#include "kernels/cuda/sm90/search_launch.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kProbeBytes = int64_t{64} << 20;

Status Validate(const CudaSearchArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckSizes(a.total_q, a.total_k, a.num_q_heads, a.num_kv_heads, a.head_dim));
  if (a.query_position != CudaAttentionArgs::kBottomRightAligned) {
    HW_KERNELS_RETURN_IF_ERROR(CheckPosition(a.query_position, a.total_q));
  }
  if (a.q == nullptr || (a.k == nullptr && a.k_means == nullptr) || Misaligned(a.q) || Misaligned(a.k) ||
      Misaligned(a.k_means)) {
    return InvalidArgument("q, k or k_means is null or not 16-byte aligned");
  }
  if (a.counts == nullptr || a.offsets == nullptr || a.blocks == nullptr || a.used == nullptr ||
      a.overflows == nullptr || a.capacity <= 0) {
    return InvalidArgument("an output is null, or capacity " + std::to_string(a.capacity) +
                           " is not positive");
  }
  if (!(a.softmax_scale > 0) || !std::isfinite(a.softmax_scale)) {
    return InvalidArgument("softmax_scale is " + NumberText(a.softmax_scale) +
                           "; a positive number is wanted");
  }
  if (!(a.forced_density >= 0 && a.forced_density <= 1)) {
    return InvalidArgument("forced_density is " + NumberText(a.forced_density) +
                           "; 0 (by threshold), or over 0 and at most 1 is wanted");
  }
  if (a.num_kv_heads > sm90::kSearchHeads) {
    return {StatusCode::kUnimplemented, std::to_string(a.num_kv_heads) + " KV heads; at most " +
                                            std::to_string(sm90::kSearchHeads) + " are known"};
  }
  for (int32_t head = 0; a.windows != nullptr && head < a.num_kv_heads; ++head) {
    if (a.windows[head] < 1) {
      return InvalidArgument("window of KV head " + std::to_string(head) + " is " +
                             std::to_string(a.windows[head]) + " blocks; 1 or more is wanted");
    }
  }
  for (int32_t head = 0; a.thresholds != nullptr && head < a.num_kv_heads; ++head) {
    if (!(a.thresholds[head] >= 0)) {
      return InvalidArgument("threshold of KV head " + std::to_string(head) + " is " +
                             NumberText(a.thresholds[head]) + "; 0 or more is wanted");
    }
  }
  if (a.forced_density == 0 && a.thresholds == nullptr && !(a.threshold > 0 && a.threshold <= 1)) {
    return InvalidArgument("threshold is " + NumberText(a.threshold) + "; over 0 and at most 1 is wanted");
  }
  if (a.sink_blocks < 0 || a.window_blocks < 1 || a.dense_last_tokens < 0) {
    return InvalidArgument("sink_blocks " + std::to_string(a.sink_blocks) + ", window_blocks " +
                           std::to_string(a.window_blocks) + ", dense_last_tokens " +
                           std::to_string(a.dense_last_tokens) + "; at least 0, 1 and 0 are wanted");
  }
  if (a.query_position == CudaAttentionArgs::kBottomRightAligned && a.total_k < a.total_q) {
    return InvalidArgument("kv_len " + std::to_string(a.total_k) + " is less than q_len " +
                           std::to_string(a.total_q));
  }
  return {};
}

struct Plan {
  int32_t pack, row_pack, tile_positions, tiles, tiles_per_cta, bitmap_words, section_words, tile_words;
  int32_t chunk_tiles;  // whose probes are in the workspace at once; whole CTAs
  int64_t blocks;
  size_t mean_bytes, probe_bytes;
};

Plan MakePlan(const CudaSearchArgs& a) {
  Plan plan;
  plan.pack = a.num_q_heads / a.num_kv_heads;
  plan.row_pack = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(plan.pack)));
  plan.tile_positions = sm90::kSearchRows / plan.pack;
  plan.tiles = static_cast<int32_t>((a.total_q + plan.tile_positions - 1) / plan.tile_positions);
  plan.blocks = (a.total_k + sm90::kBlockKeys - 1) / sm90::kBlockKeys;
  plan.bitmap_words = static_cast<int32_t>((plan.blocks + 31) / 32);
  plan.section_words = std::min(sm90::kSearchSectionWords, (plan.bitmap_words + 3) / 4 * 4);
  plan.tile_words = a.forced_density == 0 ? plan.bitmap_words : sm90::kSearchBins;
  plan.tiles_per_cta =
      std::min(sm90::kSearchRows / plan.row_pack, sm90::kSearchBitmapWords / plan.tile_words);
  const int64_t tile_bytes = int64_t{a.num_q_heads} * a.head_dim * 2;
  const int64_t most = std::max<int64_t>(1, kProbeBytes / tile_bytes / std::max(1, plan.tiles_per_cta)) *
                       std::max(1, plan.tiles_per_cta);
  plan.chunk_tiles = static_cast<int32_t>(std::min<int64_t>(plan.tiles, most));
  plan.mean_bytes =
      a.k_means != nullptr ? 0 : static_cast<size_t>(plan.blocks * a.num_kv_heads * a.head_dim * 2);
  plan.probe_bytes = static_cast<size_t>(plan.chunk_tiles * tile_bytes);
  return plan;
}

// Means of Q as the search reads them, kSearchRows a box: a tile's rows are padded with zeros to row_pack.
Status ProbeMap(const void* probes, const Plan& plan, int32_t tiles, int32_t heads, int32_t head_dim,
                CUtensorMap* map) {
  const int64_t panels = head_dim / 64, row = int64_t{head_dim} * 2, tile = plan.pack * row;
  return MakeTensorMap(probes,
                       {{64, 2, 64},
                        {plan.pack, row, plan.row_pack},
                        {tiles, tile, sm90::kSearchRows / plan.row_pack},
                        {panels, 128, static_cast<int32_t>(panels)},
                        {heads, tiles * tile, 1}},
                       map);
}

// Rows of block means as the search reads them, 128 a box.
Status MeanMap(const void* means, int64_t rows, int32_t heads, int32_t head_dim, CUtensorMap* map) {
  const int64_t panels = head_dim / 64, row = int64_t{head_dim} * 2;
  // Panels of a head are 128 bytes apart, heads rows * row: one dimension cannot step through both.
  return MakeTensorMap(
      means,
      {{64, 2, 64}, {rows, row, 128}, {panels, 128, static_cast<int32_t>(panels)}, {heads, rows * row, 1}},
      map);
}

}  // namespace

int64_t CudaSearchWaves(const CudaSearchArgs& args, int num_sms, int64_t most) {
  if (num_sms < 1 || !Validate(args).ok()) return 0;
  const Plan plan = MakePlan(args);
  if (plan.tiles_per_cta == 0) return 0;
  const int64_t queries = int64_t{plan.tiles_per_cta} * plan.tile_positions, heads = args.num_kv_heads;
  const int64_t waves = std::max<int64_t>(1, most / queries * heads / num_sms);
  return std::max<int64_t>(1, waves * num_sms / heads) * queries;
}

int64_t CudaSearchTiles(const CudaSearchArgs& args) { return Validate(args).ok() ? MakePlan(args).tiles : 0; }

size_t CudaSearchWorkspaceBytes(const CudaSearchArgs& args) {
  if (!Validate(args).ok()) return 0;
  const Plan plan = MakePlan(args);
  return plan.mean_bytes + plan.probe_bytes;
}

size_t CudaSearchProbeBytes(int64_t num_tokens, int32_t num_q_heads, int32_t num_kv_heads, int32_t head_dim) {
  CudaSearchArgs args;
  args.k_means = &args;  // its contents are not looked at
  args.total_q = args.total_k = num_tokens;
  args.num_q_heads = num_q_heads;
  args.num_kv_heads = num_kv_heads;
  args.head_dim = head_dim;
  if (!CheckSizes(num_tokens, num_tokens, num_q_heads, num_kv_heads, head_dim).ok()) return 0;
  const size_t by_threshold = MakePlan(args).probe_bytes;
  args.forced_density = 1;
  return std::max(by_threshold, MakePlan(args).probe_bytes);
}

Status CudaSelectBlocks(const CudaSearchArgs& args, void* workspace, size_t workspace_bytes,
                        cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  const Plan plan = MakePlan(args);
  if (plan.tiles_per_cta == 0) {
    const int64_t most = int64_t{sm90::kSearchBitmapWords} * 32 * 128;
    return {StatusCode::kUnimplemented,
            "kv_len " + std::to_string(args.total_k) + " is over " + std::to_string(most)};
  }
  if (workspace == nullptr || workspace_bytes < plan.mean_bytes + plan.probe_bytes || Misaligned(workspace)) {
    return InvalidArgument("the workspace has " + std::to_string(workspace_bytes) + " bytes; " +
                           std::to_string(plan.mean_bytes + plan.probe_bytes) +
                           ", 16-byte aligned, are wanted");
  }
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  char* const probes = static_cast<char*>(workspace) + plan.mean_bytes;

  sm90::SearchParams p{};
  p.num_tiles = plan.tiles;
  p.num_heads = args.num_kv_heads;
  p.pack = plan.pack;
  p.row_pack = plan.row_pack;
  p.tiles_per_cta = plan.tiles_per_cta;
  p.bitmap_words = plan.bitmap_words;
  p.section_words = plan.section_words;
  p.tile_words = plan.tile_words;
  p.tile_positions = plan.tile_positions;
  p.q_len = static_cast<int32_t>(args.total_q);
  p.kv_len = static_cast<int32_t>(args.total_k);
  p.q_position = args.query_position == CudaAttentionArgs::kBottomRightAligned ? p.kv_len - p.q_len
                                                                               : args.query_position;
  p.scale_log2 = static_cast<float>(args.softmax_scale * kLog2E);
  for (int32_t head = 0; head < args.num_kv_heads; ++head) {
    const float threshold = args.thresholds == nullptr ? args.threshold : args.thresholds[head];
    p.thresholds_log2[head] = threshold > 1 ? INFINITY : std::log2(threshold);
  }
  // Where no head is, the kernel reads no probe.
  const bool searched =
      args.forced_density > 0 || std::any_of(p.thresholds_log2, p.thresholds_log2 + args.num_kv_heads,
                                             [](float t) { return std::isfinite(t); });
  p.forced_density = args.forced_density;
  p.sink_blocks = args.sink_blocks;
  for (int32_t head = 0; head < args.num_kv_heads; ++head) {
    p.window_blocks[head] = args.windows == nullptr ? args.window_blocks : args.windows[head];
  }
  p.first_dense_tile =
      static_cast<int32_t>(std::max<int64_t>(0, args.total_q - args.dense_last_tokens) / plan.tile_positions);
  if (args.dense_last_tokens == 0) p.first_dense_tile = plan.tiles;
  p.counts = args.counts;
  p.offsets = args.offsets;
  p.blocks = args.blocks;
  p.cursor = args.used;
  p.capacity = static_cast<uint64_t>(args.capacity);
  p.overflows = args.overflows;

  HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(args.used, 0, sizeof *args.used, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(args.overflows, 0, sizeof *args.overflows, stream));
  CUtensorMap mean_map;
  if (args.k_means != nullptr) {
    // Coarse rows follow the blocks' and count as blocks that no tile sees.
    HW_KERNELS_RETURN_IF_ERROR(
        MeanMap(args.k_means, CudaMeanTableRows(args.total_k), args.num_kv_heads, args.head_dim, &mean_map));
  } else {
    HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchWindowMeans(
        {args.k, workspace, args.total_k, args.num_kv_heads, args.head_dim, sm90::kBlockKeys, 1}, stream));
    HW_KERNELS_RETURN_IF_ERROR(MeanMap(workspace, plan.blocks, args.num_kv_heads, args.head_dim, &mean_map));
  }
  // Last chunk first: its tiles see most.
  for (int32_t end = plan.tiles; end > 0;) {
    p.begin_tile = (end - 1) / plan.chunk_tiles * plan.chunk_tiles;
    p.end_tile = end;
    const int64_t first = int64_t{p.begin_tile} * plan.tile_positions;
    const int64_t tokens = std::min<int64_t>(args.total_q, int64_t{end} * plan.tile_positions) - first;
    const int64_t row_bytes = int64_t{args.num_q_heads} * args.head_dim * 2;
    if (searched) {
      HW_KERNELS_RETURN_IF_CUDA_ERROR(
          sm90::LaunchWindowMeans({static_cast<const char*>(args.q) + first * row_bytes, probes, tokens,
                                   args.num_q_heads, args.head_dim, plan.tile_positions, plan.pack},
                                  stream));
    }
    CUtensorMap probe_map;
    HW_KERNELS_RETURN_IF_ERROR(
        ProbeMap(probes, plan, end - p.begin_tile, args.num_kv_heads, args.head_dim, &probe_map));
    HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSearch(probe_map, mean_map, p, args.head_dim, stream));
    end = p.begin_tile;
  }
  return {};
}

}  // namespace headwater::kernels
