#include "coordinator/cost_model.h"

#include <algorithm>

namespace headwater {
namespace {

// As kPieces of worker/cuda/cuda_group.cc.
constexpr double kGpuPieces = 4;
constexpr double kGpuSearch = 0.0016;  // of dense attention's time
// Keys that one bit of a selection stands for.
constexpr double kSelectionKeys = 128;

struct Shape {
  double layers, hidden, q_width, kv_width, intermediate;

  explicit Shape(const v1::ServedModel& model)
      : layers(model.num_layers()),
        hidden(model.hidden_size()),
        q_width(static_cast<double>(model.num_q_heads()) * model.head_dim()),
        kv_width(static_cast<double>(model.num_kv_heads()) * model.head_dim()),
        intermediate(model.intermediate_size()) {}

  bool known() const { return layers * hidden * q_width * kv_width * intermediate > 0; }
  // FLOP of a token in one layer.
  double ProjectionFlop() const { return 2 * hidden * (q_width + 2 * kv_width); }
  double RestFlop() const { return 2 * hidden * (q_width + 3 * intermediate); }
};

// What of `time`, spent on `parts` parts, does not pass while `work` is done.
double Exposed(double time, double work, double parts) {
  return std::max(time / parts, time - work * (parts - 1) / parts);
}

double PairsOf(double tokens) { return tokens * (tokens + 1) / 2; }

double LocalPairs(const CostInput& input) {
  const auto tokens = static_cast<double>(input.num_tokens), local = static_cast<double>(input.local_tokens);
  if (input.partition == v1::PARTITION_CONTIGUOUS) return PairsOf(tokens) - PairsOf(tokens - local);
  return PairsOf(tokens) * (local / tokens);
}

struct Transfer {
  double time = 0, exposed = 0;
};

// projection, attention: the rank's time for them.
Transfer PredictExchange(const CostInput& input, const Shape& shape, const v1::ComputeRates& rates,
                         double projection, double attention) {
  const double others = input.world_size - 1;
  const bool sparse = input.strategy == v1::STRATEGY_SPARSE;
  const double bytes = shape.layers * static_cast<double>(input.num_tokens - input.local_tokens) *
                       rates.exchange_bytes_per_token() * (sparse ? input.selected : 1);
  if (input.gpu) {
    const double steps = shape.layers * kGpuPieces * (input.strategy == v1::STRATEGY_RING ? others : 1);
    const double time = bytes / rates.link_bytes_per_s() + steps * rates.exchange_step_s();
    return {time, Exposed(time, projection, kGpuPieces)};
  }
  const double steps = shape.layers * others * rates.exchange_step_s();
  const double time = bytes / rates.link_bytes_per_s() + steps;
  const double exposed = std::max(0.0, time - attention * others / input.world_size);
  if (!sparse) return {time, exposed};
  const double bitmap_bytes = shape.layers * others * input.model.num_kv_heads() *
                              static_cast<double>(input.num_tokens) / (8 * kSelectionKeys);
  const double bitmaps = bitmap_bytes / rates.link_bytes_per_s() + steps;
  return {time + bitmaps, exposed + bitmaps};
}

bool Known(const CostInput& input, const v1::ComputeRates& rates) {
  if (rates.linear_flops() <= 0 || rates.attention_flops() <= 0) return false;
  if (input.kv_bytes_per_token > 0 && rates.egress_bytes_per_s() <= 0) return false;
  return input.world_size == 1 || (rates.link_bytes_per_s() > 0 && rates.exchange_bytes_per_token() > 0);
}

}  // namespace

std::optional<v1::PlanCost> PredictCost(const CostInput& input, const v1::ComputeRates& rates) {
  const Shape shape(input.model);
  if (!shape.known() || !Known(input, rates) || input.num_tokens == 0) return std::nullopt;
  const auto local = static_cast<double>(input.local_tokens);
  const double projection = local * shape.layers * shape.ProjectionFlop() / rates.linear_flops();
  const double rest = local * (shape.layers - 1) * shape.RestFlop() / rates.linear_flops();
  const double share = input.density + (input.gpu && input.density < 1 ? kGpuSearch : 0);
  const double attention =
      (shape.layers - 1) * 4 * shape.q_width * LocalPairs(input) * share / rates.attention_flops();
  Transfer exchange, egress;
  double start = 0;
  if (input.world_size > 1) {
    exchange = PredictExchange(input, shape, rates, projection, attention);
    start = rates.group_start_s();
  }
  if (input.kv_bytes_per_token > 0) {
    egress.time = local * static_cast<double>(input.kv_bytes_per_token) / rates.egress_bytes_per_s();
    egress.exposed = Exposed(egress.time, projection + rest + attention + exchange.exposed, shape.layers);
  }
  v1::PlanCost cost;
  cost.set_linear_s(projection + rest);
  cost.set_attention_s(attention);
  cost.set_exchange_s(exchange.time);
  cost.set_exchange_hidden_s(exchange.time - exchange.exposed);
  cost.set_egress_s(egress.time);
  cost.set_egress_hidden_s(egress.time - egress.exposed);
  cost.set_start_s(start);
  cost.set_total_s(projection + rest + attention + exchange.exposed + egress.exposed + start);
  return cost;
}

v1::ComputeRates SlowerOf(const v1::ComputeRates& a, const v1::ComputeRates& b) {
  v1::ComputeRates slower;
  slower.set_linear_flops(std::min(a.linear_flops(), b.linear_flops()));
  slower.set_attention_flops(std::min(a.attention_flops(), b.attention_flops()));
  slower.set_link_bytes_per_s(std::min(a.link_bytes_per_s(), b.link_bytes_per_s()));
  slower.set_egress_bytes_per_s(std::min(a.egress_bytes_per_s(), b.egress_bytes_per_s()));
  slower.set_exchange_bytes_per_token(
      a.exchange_bytes_per_token() == 0 || b.exchange_bytes_per_token() == 0
          ? 0
          : std::max(a.exchange_bytes_per_token(), b.exchange_bytes_per_token()));
  slower.set_exchange_step_s(std::max(a.exchange_step_s(), b.exchange_step_s()));
  slower.set_group_start_s(std::max(a.group_start_s(), b.group_start_s()));
  return slower;
}

}  // namespace headwater
