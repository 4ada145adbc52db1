#include "worker/cuda/cuda_time_budget.h"

#include <algorithm>
#include <numeric>
#include <variant>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

// Blocks of a tile's window, of all layers and KV heads on average.
double MeanWindow(const kernels::HeadwaterParameters& parameters) {
  if (parameters.windows.empty()) return parameters.window_blocks;
  const double sum = std::accumulate(parameters.windows.begin(), parameters.windows.end(), 0.0);
  return sum / static_cast<double>(parameters.windows.size());
}

// The least share of the blocks that policy headwater can read.
double LeastDensity(const kernels::HeadwaterParameters& parameters, int64_t num_tokens) {
  const double blocks = static_cast<double>(num_tokens) / 128 + 1;
  const double listed = 2 * (parameters.sink_blocks + MeanWindow(parameters) + 1) / blocks;
  return std::min(1.0, listed + 2.0 * parameters.dense_last_tokens / static_cast<double>(num_tokens));
}

}  // namespace

absl::Status CheckTimeBudget(const PrefillJob& job, const ModelConfig& config, const ComputeSpeed& speed,
                             bool dense) {
  const absl::Duration budget = job.quality.time_budget;
  if (budget == absl::ZeroDuration()) return absl::OkStatus();
  const auto tokens = static_cast<int64_t>(job.tokens.size());
  const auto* const own = std::get_if<kernels::HeadwaterParameters>(&job.policy->parameters());
  const double least = dense || own == nullptr ? 1 : LeastDensity(*own, tokens);
  const absl::Duration predicted =
      PredictTime(WorkOf(config, tokens), speed, config.num_layers, least) / job.world_size();
  if (predicted <= budget) return absl::OkStatus();
  return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_TIME_BUDGET_TOO_SHORT,
                   absl::StrCat("quality.time_budget is ", absl::FormatDuration(budget), "; ", tokens,
                                " tokens at density ", least, " take ", absl::FormatDuration(predicted)),
                   {{"value", absl::FormatDuration(budget)}, {"limit", absl::FormatDuration(predicted)}});
}

}  // namespace headwater
