#include "worker/quality.h"

#include <algorithm>
#include <variant>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

constexpr double kNewWeight = 0.3;
constexpr absl::Duration kLeastTime = absl::Microseconds(10);
constexpr int64_t kMostBudgetSeconds = int64_t{30} * 24 * 3600;

absl::Status BadField(const char* field, const std::string& value, const char* limit) {
  return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD,
                   absl::StrCat("quality.", field, " is ", value, "; ", limit, " is wanted"),
                   {{"field", absl::StrCat("quality.", field)}, {"value", value}, {"limit", limit}});
}

void Blend(double flop, absl::Duration time, double* speed) {
  if (time < kLeastTime || !(flop > 0)) return;
  *speed += kNewWeight * (flop / absl::ToDoubleSeconds(time) - *speed);
}

}  // namespace

absl::StatusOr<QualityBound> ReadQuality(const v1::Quality& quality) {
  QualityBound bound;
  switch (quality.bound_case()) {
    case v1::Quality::kMinRecall:
      bound.min_recall = quality.min_recall();
      if (bound.min_recall > 0 && bound.min_recall < 1) return bound;
      return BadField("min_recall", absl::StrCat(bound.min_recall), "over 0 and below 1");
    case v1::Quality::kMaxDensity:
      bound.max_density = quality.max_density();
      if (bound.max_density > 0 && bound.max_density <= 1) return bound;
      return BadField("max_density", absl::StrCat(bound.max_density), "over 0 and at most 1");
    case v1::Quality::kTimeBudget: {
      const int64_t seconds = quality.time_budget().seconds(), nanos = quality.time_budget().nanos();
      const bool valid = seconds >= 0 && seconds <= kMostBudgetSeconds && nanos >= 0 &&
                         nanos < 1'000'000'000 && (seconds > 0 || nanos > 0);
      bound.time_budget = absl::Seconds(seconds) + absl::Nanoseconds(nanos);
      if (valid) return bound;
      return BadField("time_budget", absl::StrCat(seconds, " s ", nanos, " ns"),
                      "over 0 and at most 30 days");
    }
    case v1::Quality::BOUND_NOT_SET:
      break;
  }
  return BadField("bound", "not set", "one of min_recall, max_density and time_budget");
}

void AddBound(const QualityBound& bound, const std::map<std::string, double>& given,
              kernels::PolicyParameters* parameters) {
  auto* const own = std::get_if<kernels::HeadwaterParameters>(parameters);
  if (own == nullptr || bound.max_density == 0 || given.count("dense_below_tokens") > 0) return;
  own->dense_below_tokens = 0;
}

void ComputeSpeed::Add(double linear_flop, absl::Duration linear_time, double attention_flop,
                       absl::Duration attention_time) {
  Blend(linear_flop, linear_time, &linear);
  Blend(attention_flop, attention_time, &attention);
}

LayerWork WorkOf(const ModelConfig& config, int64_t num_tokens) {
  const auto tokens = static_cast<double>(num_tokens);
  const double q_width = static_cast<double>(config.num_q_heads) * config.head_dim;
  const double kv_width = static_cast<double>(config.num_kv_heads) * config.head_dim;
  LayerWork work;
  work.linear =
      2 * tokens * config.hidden_size * (2 * q_width + 2 * kv_width + 3.0 * config.intermediate_size);
  work.dense_attention = 2 * q_width * tokens * tokens;
  return work;
}

absl::Duration PredictTime(const LayerWork& work, const ComputeSpeed& speed, int layers, double density) {
  return absl::Seconds(layers *
                       (work.linear / speed.linear + density * work.dense_attention / speed.attention));
}

double DensityWithin(absl::Duration left, const LayerWork& work, const ComputeSpeed& speed, int layers) {
  if (layers <= 0) return 1;
  const double attention = absl::ToDoubleSeconds(left) / layers - work.linear / speed.linear;
  return std::min(1.0, attention * speed.attention / work.dense_attention);
}

}  // namespace headwater
