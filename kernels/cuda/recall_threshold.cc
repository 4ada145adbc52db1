#include "kernels/cuda/recall_threshold.h"

#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/recall_threshold_launch.h"
#include "kernels/cuda/sm90/search_params.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

Status CheckRule(const CudaRecallThresholdArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("sink_blocks", a.sink_blocks, 0, INT32_MAX));
  for (int32_t head = 0; head < (a.windows == nullptr ? 0 : a.num_kv_heads); ++head) {
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("windows", a.windows[head], 1, INT32_MAX));
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("window_blocks", a.window_blocks, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("dense_last_tokens", a.dense_last_tokens, 0, INT32_MAX));
  if (!(a.goal.min_recall > 0 && a.goal.min_recall <= 1)) {
    return InvalidArgument("min_recall is " + NumberText(a.goal.min_recall) +
                           "; over 0 and at most 1 is wanted");
  }
  if (!(a.goal.errors >= 0 && std::isfinite(a.goal.errors))) {
    return InvalidArgument("errors is " + NumberText(a.goal.errors) + "; 0 or more is wanted");
  }
  return {};
}

Status Check(const CudaRecallThresholdArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(a.num_tokens, a.num_tokens, a.num_q_heads, a.num_kv_heads, a.head_dim));
  if (a.num_kv_heads > sm90::kSearchHeads) {
    return {StatusCode::kUnimplemented, std::to_string(a.num_kv_heads) + " KV heads; at most " +
                                            std::to_string(sm90::kSearchHeads) + " are known"};
  }
  if (!std::isfinite(a.softmax_scale) || a.softmax_scale <= 0) {
    return InvalidArgument("softmax_scale is " + NumberText(a.softmax_scale) + "; a number over 0 is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", a.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k_means", a.k_means));
  HW_KERNELS_RETURN_IF_ERROR(CheckRule(a));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_rows", a.goal.rows.num_rows, 1, 65536));
  HW_KERNELS_RETURN_IF_ERROR(CheckSampledRows(a.goal.rows));
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("mass", a.goal.mass, 4));
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("curve", a.goal.curve, 4));
  return CheckAligned("thresholds", a.goal.thresholds, 4);
}

}  // namespace

Status CudaThresholdsForRecall(const CudaRecallThresholdArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Check(a));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchThresholdsForRecall(a, stream));
  return {};
}

}  // namespace headwater::kernels
