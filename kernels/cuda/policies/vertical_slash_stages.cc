#include "kernels/cuda/policies/vertical_slash_stages.h"

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/vertical_slash_launch.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMostTokens = INT32_MAX - 256;
constexpr int32_t kMostHeads = 65535;  // a dimension of a grid

const reference::VerticalSlashBudget& BudgetOf(const reference::VerticalSlashParameters& parameters,
                                               int32_t head) {
  return parameters.budgets[parameters.budgets.size() == 1 ? 0 : head];
}

Status CheckSizes(int64_t num_tokens, int32_t num_heads) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, kMostTokens));
  return CheckRange("num_heads", num_heads, 1, kMostHeads);
}

Status CheckChosen(const CudaChosen& chosen) {
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("chosen columns", chosen.columns));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("column_totals", chosen.column_totals));
  return CheckArray("distances", chosen.distances);
}

}  // namespace

int32_t VerticalSlashColumns(const reference::VerticalSlashParameters& parameters, int32_t head,
                             int64_t num_tokens) {
  return static_cast<int32_t>(
      std::min(std::max(BudgetOf(parameters, head).n_vertical, parameters.least_verticals), num_tokens));
}

int32_t VerticalSlashDistances(const reference::VerticalSlashParameters& parameters, int32_t head,
                               int64_t num_tokens) {
  return static_cast<int32_t>(
      std::min(std::max(BudgetOf(parameters, head).n_slash, parameters.least_slashes), num_tokens));
}

Status CudaChooseVerticalSlash(const reference::VerticalSlashParameters& parameters,
                               const CudaChooseArgs& args, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckSizes(args.num_tokens, args.num_heads));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("vertical", args.vertical));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("slash", args.slash));
  HW_KERNELS_RETURN_IF_ERROR(CheckChosen(args.chosen));
  for (int32_t head = 0; head < args.num_heads; ++head) {
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("column_stride", args.chosen.column_stride,
                                          VerticalSlashColumns(parameters, head, args.num_tokens),
                                          INT32_MAX));
  }
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  for (int32_t first = 0; first < args.num_heads; first += sm90::kChooseHeads) {
    sm90::ChooseParams p = {};
    p.args = args;
    p.first_head = first;
    p.heads = std::min(sm90::kChooseHeads, args.num_heads - first);
    p.forced[0] = static_cast<int32_t>(std::min(parameters.forced_verticals, args.num_tokens));
    p.forced[1] = static_cast<int32_t>(std::min(parameters.forced_locals, args.num_tokens));
    for (int32_t i = 0; i < p.heads; ++i) {
      p.counts[0][i] = VerticalSlashColumns(parameters, first + i, args.num_tokens);
      p.counts[1][i] = VerticalSlashDistances(parameters, first + i, args.num_tokens);
    }
    HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchChoose(p, stream));
  }
  return {};
}

Status CudaMergeVerticalSlash(const CudaMergeVerticalSlashArgs& args, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckSizes(args.num_tokens, args.num_heads));
  HW_KERNELS_RETURN_IF_ERROR(CheckChosen(args.chosen));
  if (args.range_counts == nullptr || args.range_offsets == nullptr || args.ranges == nullptr ||
      args.column_counts == nullptr || args.column_offsets == nullptr || args.columns == nullptr ||
      args.visited == nullptr || args.overflows == nullptr) {
    return InvalidArgument("an output is null");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("range_capacity", args.range_capacity, 1, INT64_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("column_capacity", args.column_capacity, 1, INT64_MAX));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchMergeVerticalSlash(args, stream));
  return {};
}

}  // namespace headwater::kernels
