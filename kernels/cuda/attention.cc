#include "kernels/cuda/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/attention_launch.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

// K and V of the heads in flight together; the L2 of a Hopper GPU is 50 MiB or more.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

constexpr int64_t kMaxCorrectedKeys =
    int64_t{sm90::kMaxSuperblockBytes} * 8 * sm90::kSuperblock * sm90::kBlockKeys;

Status ValidateCorrection(const CudaAttentionArgs& a) {
  const CudaMeanCorrection& correction = a.correction;
  if (correction.k_means == nullptr && correction.v_means == nullptr) return {};
  if (correction.k_means == nullptr || correction.v_means == nullptr || Misaligned(correction.k_means) ||
      Misaligned(correction.v_means)) {
    return InvalidArgument("one of k_means and v_means is null or not 16-byte aligned");
  }
  if (a.lists.num_lists == 0) return InvalidArgument("mean correction without block lists");
  if (a.cu_seqlens_q != nullptr) {
    return {StatusCode::kUnimplemented, "mean correction with cu_seqlens"};
  }
  if (a.total_k > kMaxCorrectedKeys) {
    return {StatusCode::kUnimplemented, "mean correction of " + std::to_string(a.total_k) +
                                            " keys; at most " + std::to_string(kMaxCorrectedKeys)};
  }
  return {};
}

Status Validate(const CudaAttentionArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckSizes(a.total_q, a.total_k, a.num_q_heads, a.num_kv_heads, a.head_dim));
  if (a.query_position != CudaAttentionArgs::kBottomRightAligned) {
    HW_KERNELS_RETURN_IF_ERROR(CheckPosition(a.query_position, a.total_q));
  }
  if (a.q == nullptr || a.k == nullptr || a.v == nullptr || (a.out == nullptr && a.out_f32 == nullptr)) {
    return InvalidArgument("q, k, v or both outputs are null");
  }
  if (Misaligned(a.q) || Misaligned(a.k) || Misaligned(a.v) || Misaligned(a.out) || Misaligned(a.out_f32)) {
    return InvalidArgument("q, k, v or an output is not 16-byte aligned");
  }
  if (!(a.softmax_scale > 0) || !std::isfinite(a.softmax_scale)) {
    return InvalidArgument("softmax_scale is " + NumberText(a.softmax_scale) +
                           "; a positive number is wanted");
  }
  if (a.num_sequences < 1 || (a.cu_seqlens_q == nullptr) != (a.cu_seqlens_k == nullptr) ||
      (a.num_sequences > 1 && a.cu_seqlens_q == nullptr)) {
    return InvalidArgument("cu_seqlens_q and cu_seqlens_k must both be given, or neither for one sequence");
  }
  if (a.prompt_k != 0 && a.prompt_k < a.total_k / a.num_sequences) {
    return InvalidArgument("prompt_k is " + std::to_string(a.prompt_k) + ", less than kv_len " +
                           std::to_string(a.total_k / a.num_sequences));
  }
  if (a.cu_seqlens_q == nullptr && a.query_position == CudaAttentionArgs::kBottomRightAligned &&
      a.total_k < a.total_q) {
    return InvalidArgument("kv_len " + std::to_string(a.total_k) + " is less than q_len " +
                           std::to_string(a.total_q));
  }
  const CudaBlockLists& lists = a.lists;
  if (lists.num_lists != 0) {
    if (lists.num_lists != a.num_kv_heads && lists.num_lists != a.num_q_heads) {
      return InvalidArgument("num_lists is " + std::to_string(lists.num_lists) + "; " +
                             std::to_string(a.num_kv_heads) + " (KV heads) or " +
                             std::to_string(a.num_q_heads) + " (query heads) is wanted");
    }
    if (lists.counts == nullptr || lists.offsets == nullptr || lists.blocks == nullptr) {
      return InvalidArgument("block lists with null arrays");
    }
  }
  return ValidateCorrection(a);
}

struct Plan {
  sm90::AttentionTile tile;
  int32_t pack, tile_positions, num_heads, heads_per_kv_head, section_heads;
};

Plan MakePlan(const CudaAttentionArgs& a) {
  Plan plan;
  const bool has_lists = a.lists.num_lists != 0;
  plan.tile = sm90::TileFor(a.head_dim, has_lists, a.prompt_k > 0 ? a.prompt_k : a.total_k / a.num_sequences);
  plan.pack = a.num_q_heads / (has_lists ? a.lists.num_lists : a.num_kv_heads);
  plan.tile_positions = plan.tile.rows / plan.pack;
  plan.num_heads = a.num_q_heads / plan.pack;
  plan.heads_per_kv_head = plan.num_heads / a.num_kv_heads;
  const int64_t head_bytes = a.total_k / a.num_sequences * a.head_dim * 4;
  int32_t kv_heads = 1;
  while (kv_heads * 2 * head_bytes <= kSectionBytes && a.num_kv_heads % (kv_heads * 2) == 0) kv_heads *= 2;
  plan.section_heads = kv_heads * plan.heads_per_kv_head;
  return plan;
}

Status MakeMaps(const CudaAttentionArgs& a, const Plan& plan, sm90::AttentionMaps* maps) {
  const int64_t row = int64_t{a.head_dim} * 2, panels = a.head_dim / 64;
  const auto queries = [&](const void* base, int32_t positions, CUtensorMap* map) {
    return MakeTensorMap(base,
                         {{64, 2, 64},
                          {plan.pack, row, plan.pack},
                          {a.total_q, a.num_q_heads * row, positions},
                          {panels, 128, 1},
                          {plan.num_heads, plan.pack * row, 1}},
                         map);
  };
  const auto keys = [&](const void* base, CUtensorMap* map) {
    return MakeTensorMap(base,
                         {{64, 2, 64},
                          {a.total_k, a.num_kv_heads * row, plan.tile.keys},
                          {a.num_kv_heads * panels, 128, static_cast<int32_t>(panels)}},
                         map);
  };
  HW_KERNELS_RETURN_IF_ERROR(queries(a.q, plan.tile_positions, &maps->q));
  HW_KERNELS_RETURN_IF_ERROR(keys(a.k, &maps->k));
  HW_KERNELS_RETURN_IF_ERROR(keys(a.v, &maps->v));
  if (a.correction.k_means == nullptr) {
    maps->k_means = maps->v_means = maps->k_mean_steps = maps->v_mean_steps = maps->k;  // not used
  } else {
    const int64_t rows = CudaMeanTableRows(a.total_k);
    const auto means = [&](const void* base, int32_t groups, CUtensorMap* map) {
      return MakeTensorMap(base,
                           {{64, 2, 64},
                            {8, row, 8},
                            {panels, 128, static_cast<int32_t>(panels)},
                            {rows / 8, 8 * row, groups},
                            {a.num_kv_heads, rows * row, 1}},
                           map);
    };
    HW_KERNELS_RETURN_IF_ERROR(means(a.correction.k_means, 1, &maps->k_means));
    HW_KERNELS_RETURN_IF_ERROR(means(a.correction.v_means, 1, &maps->v_means));
    HW_KERNELS_RETURN_IF_ERROR(means(a.correction.k_means, 16, &maps->k_mean_steps));
    HW_KERNELS_RETURN_IF_ERROR(means(a.correction.v_means, 16, &maps->v_mean_steps));
  }
  // Not used where tiles are stored by rows; then any valid map will do.
  return queries(a.out != nullptr ? a.out : a.q, std::max(1, 64 / plan.pack), &maps->out);
}

// Tiles of one head at most.
int64_t MaxTiles(const CudaAttentionArgs& args, const Plan& plan) {
  return args.total_q / plan.tile_positions + args.num_sequences;
}

// Layout of the workspace in bytes; next_tile, long_tile_count and total_blocks come first.
struct WorkspaceLayout {
  size_t tile_begin = 16, single_q, single_k, long_tiles, end;

  WorkspaceLayout(const CudaAttentionArgs& args, const Plan& plan) {
    const size_t entries = static_cast<size_t>(args.num_sequences) + 1;
    single_q = tile_begin + entries * 4;
    single_k = single_q + 8;
    long_tiles = single_k + 8;
    end = long_tiles +
          (args.lists.num_lists == 0 ? 0 : static_cast<size_t>(MaxTiles(args, plan) * plan.num_heads) * 4);
  }
};

// What the kernels are told.
struct Call {
  sm90::AttentionParams params{};
  sm90::TilePrefixParams prefix{};

  Call(const CudaAttentionArgs& args, const Plan& plan, const WorkspaceLayout& layout, void* workspace) {
    auto* const bytes = static_cast<char*>(workspace);
    const auto words = [&](size_t at) { return reinterpret_cast<int32_t*>(bytes + at); };
    const bool has_lists = args.lists.num_lists != 0;
    sm90::AttentionParams& p = params;
    p.num_sequences = args.num_sequences;
    p.next_tile = words(0);
    p.tile_begin = words(layout.tile_begin);
    p.cu_q = args.cu_seqlens_q != nullptr ? args.cu_seqlens_q : words(layout.single_q);
    p.cu_k = args.cu_seqlens_k != nullptr ? args.cu_seqlens_k : words(layout.single_k);
    p.q_position = args.query_position;
    p.num_q_heads = args.num_q_heads;
    p.num_heads = plan.num_heads;
    p.heads_per_kv_head = plan.heads_per_kv_head;
    p.pack = plan.pack;
    p.tile_positions = plan.tile_positions;
    p.section_heads = plan.section_heads;
    p.store_by_map = args.out != nullptr && args.out_f32 == nullptr && 64 % plan.pack == 0;
    p.scale_log2 = static_cast<float>(args.softmax_scale * kLog2E);
    p.out = args.out;
    p.out_f32 = args.out_f32;
    p.lse_ln = args.lse_ln;
    if (has_lists) {
      p.list_counts = args.lists.counts;
      p.list_offsets = args.lists.offsets;
      p.list_blocks = args.lists.blocks;
      p.coarse_group = static_cast<int32_t>(CudaMeanTableCoarseRow(args.total_k) / 8);
      p.block_gain = std::log2(static_cast<float>(sm90::kBlockKeys)) / p.scale_log2;
      p.superblock_gain = std::log2(static_cast<float>(sm90::kBlockKeys * sm90::kSuperblock)) / p.scale_log2;
      p.long_tiles = words(layout.long_tiles);
      p.long_tile_count = words(4);
      p.total_blocks = reinterpret_cast<const int64_t*>(bytes + 8);
    }
    prefix = {args.cu_seqlens_q,
              args.num_sequences,
              plan.tile_positions,
              words(layout.tile_begin),
              words(0),
              words(layout.single_q),
              words(layout.single_k),
              static_cast<int32_t>(args.total_q),
              static_cast<int32_t>(args.total_k),
              has_lists ? words(4) : nullptr,
              has_lists ? reinterpret_cast<int64_t*>(bytes + 8) : nullptr};
  }
};

Status CheckWorkspace(const CudaAttentionArgs& args, const Plan& plan, const void* workspace, size_t bytes) {
  const size_t wanted = WorkspaceLayout(args, plan).end;
  if (workspace == nullptr || bytes < wanted || Misaligned(workspace)) {
    return InvalidArgument("the workspace has " + std::to_string(bytes) + " bytes; " +
                           std::to_string(wanted) + ", 16-byte aligned, are wanted");
  }
  if (MaxTiles(args, plan) * plan.num_heads > INT32_MAX) {
    return InvalidArgument(std::to_string(MaxTiles(args, plan) * plan.num_heads) +
                           " tiles; at most 2147483647");
  }
  return {};
}

}  // namespace

size_t CudaAttentionWorkspaceBytes(const CudaAttentionArgs& args) {
  if (!Validate(args).ok()) return 0;
  return WorkspaceLayout(args, MakePlan(args)).end;
}

Status CudaAttention(const CudaAttentionArgs& args, void* workspace, size_t workspace_bytes,
                     cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  const Plan plan = MakePlan(args);
  HW_KERNELS_RETURN_IF_ERROR(CheckWorkspace(args, plan, workspace, workspace_bytes));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  sm90::AttentionMaps maps;
  HW_KERNELS_RETURN_IF_ERROR(MakeMaps(args, plan, &maps));
  const Call call(args, plan, WorkspaceLayout(args, plan), workspace);

  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchTilePrefix(call.prefix, stream));
  if (args.lists.num_lists != 0) {
    HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchLongTiles(call.params, MaxTiles(args, plan), stream));
  }
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchAttention(maps, call.params, args.head_dim, plan.tile,
                                                        args.correction.k_means != nullptr, num_sms, stream));
  return {};
}

Status CudaCheckBlockLists(const CudaAttentionArgs& args, int64_t num_blocks, int64_t* first_bad,
                           void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  if (args.lists.num_lists == 0 || num_blocks < 0 || first_bad == nullptr ||
      reinterpret_cast<uintptr_t>(first_bad) % 8 != 0) {
    return InvalidArgument("no block lists, num_blocks " + std::to_string(num_blocks) +
                           " below 0, or first_bad null or not 8-byte aligned");
  }
  const Plan plan = MakePlan(args);
  HW_KERNELS_RETURN_IF_ERROR(CheckWorkspace(args, plan, workspace, workspace_bytes));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  const Call call(args, plan, WorkspaceLayout(args, plan), workspace);

  HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(first_bad, 0xFF, sizeof *first_bad, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchTilePrefix(call.prefix, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(
      sm90::LaunchCheckLists(call.params, num_blocks, first_bad, num_sms, stream));
  return {};
}

}  // namespace headwater::kernels
