#include "kernels/cuda/xattention.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/top_share_launch.h"
#include "kernels/cuda/sm90/xattention_launch.h"
#include "kernels/cuda/top_share.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kWorkspaceFloats = int64_t{64} << 20;

static_assert(kCudaXAttentionMostTokens == int64_t{128} * sm90::kMostShareBlocks);

Status CheckParameters(const CudaXAttentionArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(a.num_tokens, a.num_tokens, a.num_q_heads, a.num_kv_heads, a.head_dim));
  if (a.stride < 1 || a.stride > 128 || 128 % a.stride != 0) {
    return InvalidArgument("stride is " + std::to_string(a.stride) + "; a divisor of 128 is wanted");
  }
  if (a.stride != 4 && a.stride != 8 && a.stride != 16) {
    return {StatusCode::kUnimplemented, "stride " + std::to_string(a.stride) + "; 4, 8 and 16 are known"};
  }
  if (a.num_tokens > kCudaXAttentionMostTokens) {
    return {StatusCode::kUnimplemented, std::to_string(a.num_tokens) + " tokens; at most " +
                                            std::to_string(kCudaXAttentionMostTokens) + " are known"};
  }
  if (!std::isfinite(a.norm) || a.norm <= 0) {
    return InvalidArgument("norm is " + NumberText(a.norm) + "; a number over 0 is wanted");
  }
  if (!std::isfinite(a.softmax_scale) || a.softmax_scale <= 0) {
    return InvalidArgument("softmax_scale is " + NumberText(a.softmax_scale) + "; a number over 0 is wanted");
  }
  return {};
}

Status CheckArrays(const CudaXAttentionArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", a.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", a.k));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("words", a.masks.words));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("scores", a.scores));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckRange("the masks' num_tokens", a.masks.num_tokens, a.num_tokens, a.num_tokens));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckRange("the masks' num_lists", a.masks.num_lists, a.num_q_heads, a.num_q_heads));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("tile_positions", a.masks.tile_positions, 128, 128));
  if (a.num_thresholds != 1 && a.num_thresholds != a.num_q_heads) {
    return InvalidArgument("num_thresholds is " + std::to_string(a.num_thresholds) + "; 1 or " +
                           std::to_string(a.num_q_heads) + " is wanted");
  }
  if (a.thresholds == nullptr) return InvalidArgument("thresholds is null");
  for (int32_t i = 0; i < a.num_thresholds; ++i) {
    if (!(a.thresholds[i] >= 0 && a.thresholds[i] <= 1)) {
      return InvalidArgument("threshold " + NumberText(a.thresholds[i]) + " is outside 0 to 1");
    }
  }
  return {};
}

// Strips of `rows` query blocks of `heads` heads fit the workspace; `row` floats a query block and head.
struct Strips {
  int64_t blocks, row, rows, heads;

  explicit Strips(const CudaXAttentionArgs& a) {
    blocks = (a.num_tokens + 127) / 128;
    row = (128 / a.stride + 1) * blocks;
    const int64_t fit = std::max<int64_t>(1, kWorkspaceFloats / row);
    rows = blocks;
    if (fit < blocks) {
      // Strips of one size, of whole tiles of the products where they hold one.
      const int64_t count = (blocks + fit - 1) / fit, tile = 2 * a.stride,
                    even = (blocks + count - 1) / count;
      const int64_t whole = (even + tile - 1) / tile * tile;
      rows = whole <= fit ? whole : even;
    }
    heads = std::clamp<int64_t>(fit / rows, 1, std::min(a.num_q_heads, sm90::kShareLists));
  }
  int64_t PartialFloats(int32_t stride) const { return heads * rows * (128 / stride) * blocks; }
  size_t Bytes() const { return static_cast<size_t>(heads * rows * row) * sizeof(float); }
};

Status RunStrip(const CudaXAttentionArgs& a, const sm90::XAttentionParams& p, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchXAttention(p, a.stride, stream));
  CudaTopShareArgs top;
  top.scores = p.scores;
  top.list_stride = p.scores_head;
  top.masks = a.masks;
  top.first_list = p.first_head;
  top.num_lists = p.heads;
  top.first_row = p.first_row;
  top.num_rows = p.rows;
  const bool each = a.num_thresholds > 1;
  top.shares = a.thresholds + (each ? p.first_head : 0);
  top.num_shares = each ? p.heads : 1;
  return CudaTopShareRows(top, stream);
}

}  // namespace

size_t CudaXAttentionWorkspaceBytes(const CudaXAttentionArgs& args) {
  return CheckParameters(args).ok() ? Strips(args).Bytes() : 0;
}

Status CudaXAttentionMasks(const CudaXAttentionArgs& a, void* workspace, size_t workspace_bytes,
                           cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(a));
  HW_KERNELS_RETURN_IF_ERROR(CheckArrays(a));
  const Strips strips(a);
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 256 != 0 ||
      workspace_bytes < strips.Bytes()) {
    return InvalidArgument("workspace is null, not 256-byte aligned or smaller than " +
                           std::to_string(strips.Bytes()) + " bytes");
  }
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  const double scale = a.softmax_scale * kLog2E / (a.stride * a.norm);
  auto* const partial = static_cast<float*>(workspace);
  sm90::XAttentionParams p{};
  p.q = a.q;
  p.k = a.k;
  p.num_tokens = a.num_tokens;
  p.num_q_heads = a.num_q_heads;
  p.num_kv_heads = a.num_kv_heads;
  p.head_dim = a.head_dim;
  p.scale_log2 = static_cast<float>(scale);
  p.blocks = static_cast<int32_t>(strips.blocks);
  p.partial = partial;
  for (int64_t head = 0; head < a.num_q_heads; head += strips.heads) {
    p.first_head = static_cast<int32_t>(head);
    p.heads = static_cast<int32_t>(std::min(strips.heads, a.num_q_heads - head));
    for (int64_t row = 0; row < strips.blocks; row += strips.rows) {
      p.first_row = static_cast<int32_t>(row);
      p.rows = static_cast<int32_t>(std::min(strips.rows, strips.blocks - row));
      p.scores = a.scores == nullptr ? partial + strips.PartialFloats(a.stride)
                                     : a.scores + (head * strips.blocks + row) * strips.blocks;
      p.scores_head = (a.scores == nullptr ? p.rows : strips.blocks) * strips.blocks;
      HW_KERNELS_RETURN_IF_ERROR(RunStrip(a, p, stream));
    }
  }
  return {};
}

}  // namespace headwater::kernels
