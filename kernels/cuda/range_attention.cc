#include "kernels/cuda/range_attention.h"

#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/range_attention_launch.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMostTokens = INT32_MAX - 256;  // keys of a tile stay in 32 bits

Status CheckRanges(const CudaKeyRanges& r, int32_t num_q_heads) {
  if (r.num_lists != 1 && r.num_lists != num_q_heads) {
    return InvalidArgument("num_lists is " + std::to_string(r.num_lists) + "; 1 or the " +
                           std::to_string(num_q_heads) + " query heads are wanted");
  }
  if (r.range_counts == nullptr || r.range_offsets == nullptr || r.ranges == nullptr) {
    return InvalidArgument("range_counts, range_offsets or ranges is null");
  }
  const int given = (r.column_counts != nullptr) + (r.column_offsets != nullptr) + (r.columns != nullptr);
  if (given != 0 && given != 3) {
    return InvalidArgument("of column_counts, column_offsets and columns " + std::to_string(given) +
                           " are given; all or none are wanted");
  }
  if ((r.sink_tokens < 0) != (r.window_tokens < 0)) {
    return InvalidArgument("sink_tokens is " + std::to_string(r.sink_tokens) + " and window_tokens " +
                           std::to_string(r.window_tokens) + "; both or none may be negative");
  }
  return {};
}

Status Validate(const CudaRangeAttentionArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 1, kMostTokens));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(a.num_tokens, a.num_tokens, a.num_q_heads, a.num_kv_heads, a.head_dim));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckRange("tiles of all heads", CudaRangeTiles(a.num_tokens) * a.num_q_heads, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", a.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", a.k));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("v", a.v));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("out", a.out));
  if (!(a.softmax_scale > 0) || !std::isfinite(a.softmax_scale)) {
    return InvalidArgument("softmax_scale is " + NumberText(a.softmax_scale) +
                           "; a positive number is wanted");
  }
  return CheckRanges(a.ranges, a.num_q_heads);
}

}  // namespace

Status CudaRangeAttention(const CudaRangeAttentionArgs& args, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchRangeAttention(args, stream));
  return {};
}

}  // namespace headwater::kernels
