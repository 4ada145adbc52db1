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
  return {};
}

Status CheckGoal(const CudaRecallGoal& goal) {
  if (!(goal.min_recall > 0 && goal.min_recall <= 1)) {
    return InvalidArgument("min_recall is " + NumberText(goal.min_recall) +
                           "; over 0 and at most 1 is wanted");
  }
  if (!(goal.errors >= 0 && std::isfinite(goal.errors))) {
    return InvalidArgument("errors is " + NumberText(goal.errors) + "; 0 or more is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_rows", goal.rows.num_rows, 1, 65536));
  return CheckAligned("curve", goal.curve, 4);
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
  HW_KERNELS_RETURN_IF_ERROR(CheckQueries(a.queries.first, a.queries.count, a.num_tokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRule(a));
  HW_KERNELS_RETURN_IF_ERROR(CheckGoal(a.goal));
  HW_KERNELS_RETURN_IF_ERROR(CheckSampledRows(a.goal.rows));
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("mass", a.goal.mass, 4));
  return a.goal.thresholds == nullptr ? Status() : CheckAligned("thresholds", a.goal.thresholds, 4);
}

}  // namespace

Status CudaThresholdsForRecall(const CudaRecallThresholdArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Check(a));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchRecallCurves(a, stream));
  if (a.goal.thresholds == nullptr) return {};
  return CudaThresholdsOfCurves(a.goal, a.num_kv_heads, stream);
}

Status CudaThresholdsOfCurves(const CudaRecallGoal& goal, int32_t num_kv_heads, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckGoal(goal));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_kv_heads", num_kv_heads, 1, sm90::kSearchHeads));
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("thresholds", goal.thresholds, 4));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchThresholdsOfCurves(goal, num_kv_heads, stream));
  return {};
}

}  // namespace headwater::kernels
