#include "bench/prefill_report.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"

namespace headwater {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kGiB = 1 << 30;

// FLOP of one token in one layer: of Q, K and V, and of the rest.
double ProjectionFlop(const ModelConfig& c) {
  return 2.0 * c.hidden_size * c.head_dim * (c.num_q_heads + 2.0 * c.num_kv_heads);
}
double RestFlop(const ModelConfig& c) {
  return 2.0 * c.hidden_size * (1.0 * c.num_q_heads * c.head_dim + 3.0 * c.intermediate_size);
}

// Of tokens in layers: those that the projections take, and those that the rest takes.
double ProjectedRows(const ModelConfig& config, int64_t tokens) {
  return static_cast<double>(tokens) * config.num_layers;
}
double FinishedRows(const ModelConfig& config, int64_t tokens) {
  return static_cast<double>(tokens) * (config.num_layers - 1) + 1;
}

// Six digits: what a timing is worth.
double Rounded(double value) { return std::strtod(absl::StrFormat("%.6g", value).c_str(), nullptr); }

struct Cell {
  std::string title;
  std::string value;
};

std::string Seconds(const std::optional<double>& seconds) {
  return seconds.has_value() ? absl::StrFormat("%.4g", *seconds) : "-";
}
std::string Percent(const std::optional<double>& share) {
  return share.has_value() ? absl::StrFormat("%.1f %%", 100 * *share) : "-";
}

std::vector<Cell> Cells(const PrefillReport& r) {
  std::vector<Cell> cells = {{"tokens", absl::StrCat(r.tokens)}, {"TTFT s", Seconds(r.ttft_s)}};
  if (r.predicted.has_value()) cells.push_back({"predicted s", Seconds(r.predicted->total_s())});
  for (const auto& [name, seconds] : r.stages) {
    cells.push_back({absl::StrCat(absl::StrReplaceAll(name, {{"_", " "}}), " s"), Seconds(seconds)});
  }
  const std::optional<double> floor = r.floor_s();
  const std::vector<Cell> rest = {
      {"tokens/s", absl::StrFormat("%.0f", static_cast<double>(r.tokens) / r.ttft_s)},
      {"TFLOP/s", absl::StrFormat("%.4g", r.tflops())},
      {"floor s", Seconds(floor)},
      {"of floor", Percent(floor.has_value() ? std::optional<double>(*floor / r.ttft_s) : std::nullopt)},
      {"KV acked", Percent(r.kv_acked_share)},
      {"all acked s", Seconds(r.kv_acked_s)},
      {"density", absl::StrFormat("%.4g", r.density)},
      {"peak GiB", absl::StrFormat("%.2f", static_cast<double>(r.peak_bytes) / kGiB)},
      {"planned GiB", absl::StrFormat("%.2f", static_cast<double>(r.planned_bytes) / kGiB)}};
  cells.insert(cells.end(), rest.begin(), rest.end());
  if (r.planned_host_bytes > 0) {
    cells.push_back({"host GiB", absl::StrFormat("%.2f", static_cast<double>(r.planned_host_bytes) / kGiB)});
  }
  if (r.group.has_value()) {
    cells.push_back({"exposed", Percent(r.group->exposed_comm_ratio)});
    cells.push_back({"imbalance", absl::StrFormat("%.3f", r.group->imbalance)});
  }
  if (r.attention.has_value() && r.attention->has_recall_mean()) {
    cells.push_back({"recall", absl::StrFormat("%.4f", r.attention->recall_mean())});
  }
  if (!r.prompt.empty()) cells.push_back({"prompt", r.prompt});
  return cells;
}

std::string NameOf(v1::AttentionFallback fallback) {
  return absl::AsciiStrToLower(
      absl::StripPrefix(v1::AttentionFallback_Name(fallback), "ATTENTION_FALLBACK_"));
}

Json ToJson(const v1::AttentionGroup& group) {
  Json json = {{"layer", group.layer()}};
  if (group.has_kv_head()) json["kv_head"] = group.kv_head();
  json["density"] = group.density();
  if (group.has_recall()) json["recall"] = group.recall();
  if (group.has_recall_p1()) json["recall_p1"] = group.recall_p1();
  if (group.has_threshold()) json["threshold"] = group.threshold();  // all digits: lists are made with it
  if (group.has_forced_density()) json["forced_density"] = group.forced_density();
  if (group.has_window_blocks()) json["window_blocks"] = group.window_blocks();
  json["rounds"] = group.rounds();
  if (group.no_room_tiles() > 0) json["no_room_tiles"] = group.no_room_tiles();
  if (group.fallback() != v1::ATTENTION_FALLBACK_UNSPECIFIED) json["fallback"] = NameOf(group.fallback());
  if (!group.note().empty()) json["note"] = group.note();
  return json;
}

Json ToJson(const v1::AttentionReport& report) {
  Json json = {{"density", report.density()}};
  if (report.has_recall_mean()) json["recall_mean"] = report.recall_mean();
  if (report.has_recall_p1()) json["recall_p1"] = report.recall_p1();
  json["sampled_queries"] = report.sampled_queries();
  if (report.fallback() != v1::ATTENTION_FALLBACK_UNSPECIFIED) json["fallback"] = NameOf(report.fallback());
  json["wait_s"] =
      static_cast<double>(report.wait().seconds()) + 1e-9 * static_cast<double>(report.wait().nanos());
  json["groups"] = Json::array();
  for (const v1::AttentionGroup& group : report.groups()) json["groups"].push_back(ToJson(group));
  return json;
}

// Cells to the right, as wide as their titles and as what usually stands below.
std::string Line(const std::vector<Cell>& cells, std::string Cell::*text) {
  constexpr size_t kLeast = 8;
  std::string line;
  for (const Cell& cell : cells) {
    const int width = static_cast<int>(std::max(kLeast, cell.title.size()));
    absl::StrAppendFormat(&line, "%s%*s", line.empty() ? "" : "  ", width, cell.*text);
  }
  return line + "\n";
}

Json ParamsOf(const PrefillReport& r, const PrefillBenchOptions& options) {
  Json params = {{"model", options.model_name()},
                 {"weights", options.model.empty() ? "random" : "checkpoint"},
                 {"tokens", r.tokens},
                 {"gpus", r.gpus},
                 {"policy", options.policy.name},
                 {"density_mode", options.policy.density > 0 ? "forced" : "natural"},
                 {"linear", r.linear},
                 {"sink", options.sink},
                 {"repeat", options.repeat}};
  if (!r.prompt.empty()) params["prompt"] = r.prompt;
  if (r.gpus > 1) {
    params["partition"] = options.partition;
    params["strategy"] = options.strategy;
    if (options.emulate) {
      params["emulated"] = true;
      params["link_gbytes_per_s"] = options.link_gbytes_per_s;
    }
    if (options.checkpoint_layers > 0) params["checkpoint_layers"] = options.checkpoint_layers;
  }
  if (!options.policy.parameters.empty()) params["policy_parameters"] = options.policy.parameters;
  if (options.measure_recall) params["measure_recall"] = true;
  const QualityBound& quality = options.quality;
  if (quality.min_recall > 0) params["min_recall"] = quality.min_recall;
  if (quality.max_density > 0) params["max_density"] = quality.max_density;
  if (quality.time_budget > absl::ZeroDuration()) {
    params["time_budget_s"] = absl::ToDoubleSeconds(quality.time_budget);
  }
  return params;
}

// What names a row, before its metrics.
Json RowOf(const PrefillReport& r, const PrefillBenchOptions& options) {
  return {{"bench", "prefill"},
          {"device", r.device},
          {"commit", options.commit},
          {"date", absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", r.date, absl::UTCTimeZone())},
          {"params", ParamsOf(r, options)}};
}

Json PredictionOf(const v1::PlanCost& cost, double ttft_s) {
  return {{"ttft_s", Rounded(cost.total_s())},
          {"error", Rounded(cost.total_s() / ttft_s - 1)},
          {"linear_s", Rounded(cost.linear_s())},
          {"attention_s", Rounded(cost.attention_s())},
          {"exchange_s", Rounded(cost.exchange_s())},
          {"exposed_s", Rounded(cost.exchange_s() - cost.exchange_hidden_s())},
          {"egress_s", Rounded(cost.egress_s())}};
}

}  // namespace

std::optional<double> PrefillReport::floor_s() const {
  if (!linear_floor_s.has_value()) return std::nullopt;
  return *linear_floor_s + attention_floor_s.value_or(0);
}

double LinearFlop(const ModelConfig& config, int64_t tokens) {
  return ProjectionFlop(config) * ProjectedRows(config, tokens) +
         RestFlop(config) * FinishedRows(config, tokens);
}

double DenseAttentionFlop(const ModelConfig& config, int64_t tokens) {
  const auto n = static_cast<double>(tokens);
  return 4.0 * config.num_q_heads * config.head_dim * (n * (n + 1) / 2 * (config.num_layers - 1) + n);
}

double LinearSeconds(const LinearRate& rate, const ModelConfig& config, int64_t tokens) {
  return rate.projection_s * ProjectedRows(config, tokens) + rate.rest_s * FinishedRows(config, tokens);
}

Json ToJson(const PrefillReport& r, const PrefillBenchOptions& options) {
  Json metrics = {{"ttft_s", Rounded(r.ttft_s)},
                  {"density", Rounded(r.density)},
                  {"tokens_per_s", Rounded(static_cast<double>(r.tokens) / r.ttft_s)},
                  {"tflops_per_gpu", Rounded(r.tflops())}};
  const auto add = [&metrics](const std::string& name, const std::optional<double>& value) {
    if (value.has_value()) metrics[name] = Rounded(*value);
  };
  add("kv_acked_s", r.kv_acked_s);
  add("kv_acked_share_at_first_token", r.kv_acked_share);
  for (const auto& [name, seconds] : r.stages) add(absl::StrCat(name, "_s"), seconds);
  add("linear_floor_s", r.linear_floor_s);
  add("attention_floor_s", r.attention_floor_s);
  add("floor_s", r.floor_s());
  if (r.group.has_value()) {
    metrics["exposed_comm_ratio"] = Rounded(r.group->exposed_comm_ratio);
    metrics["imbalance"] = Rounded(r.group->imbalance);
    if (r.group->checkpoint_layer.has_value()) metrics["checkpoint_layer"] = *r.group->checkpoint_layer;
  }
  metrics["attention_flop"] = Rounded(r.attention_flop);
  metrics["planned_device_bytes"] = r.planned_bytes;
  if (r.planned_host_bytes > 0) metrics["planned_host_bytes"] = r.planned_host_bytes;
  metrics["peak_device_bytes"] = r.peak_bytes;
  Json row = RowOf(r, options);
  row["metrics"] = std::move(metrics);
  row["peers"] = Json::object();
  if (r.predicted.has_value()) row["predicted"] = PredictionOf(*r.predicted, r.ttft_s);
  if (r.group.has_value()) {
    for (const PrefillReport::Group::Rank& rank : r.group->ranks) {
      row["ranks"].push_back({{"linear_s", Rounded(rank.linear_s)},
                              {"attention_s", Rounded(rank.attention_s)},
                              {"exchange_s", Rounded(rank.exchange_s)},
                              {"egress_stall_s", Rounded(rank.egress_stall_s)}});
    }
  }
  if (r.attention.has_value()) row["attention"] = ToJson(*r.attention);
  return row;
}

Json SkippedToJson(const PrefillReport& r, const PrefillBenchOptions& options) {
  Json row = RowOf(r, options);
  row["metrics"] = {{"planned_device_bytes", r.planned_bytes}, {"device_bytes", r.device_bytes}};
  row["peers"] = Json::object();
  row["skipped"] = "the plan is over the device's memory";
  return row;
}

std::string SkippedLine(const PrefillReport& r) {
  return absl::StrCat(r.tokens, " tokens: skipped, the plan's ", r.planned_bytes,
                      " bytes are over the device's ", r.device_bytes, "\n");
}

std::string TableTitle(const PrefillReport& r, const PrefillBenchOptions& o) {
  const bool on_gpu = o.gpu != PrefillBenchOptions::kCpu;
  std::string text = absl::StrCat(r.device, ": ", o.model_name(), o.model.empty() ? " (random weights)" : "",
                                  ", linear ", r.linear, ", policy ", o.policy.name);
  if (o.policy.density > 0) absl::StrAppend(&text, " forced to ", o.policy.density);
  if (r.group.has_value())
    absl::StrAppend(&text, ", ", r.gpus, o.emulate ? " emulated GPUs, " : " GPUs, ", r.group->partition, ", ",
                    r.group->strategy);
  absl::StrAppend(&text, ", sink ", o.sink, ", median of ", o.repeat, "\n");
  if (r.linear_floor_s.has_value()) {
    absl::StrAppend(&text, "floor: linear layers' products alone in this process");
    if (r.attention_floor_s.has_value()) {
      absl::StrAppend(&text, ", and attention's FLOP at ", o.attention_tflops, " TFLOP/s\n");
    } else {
      absl::StrAppend(&text, "; without attention, which --attention_tflops adds\n");
    }
  }
  if (r.predicted.has_value()) {
    absl::StrAppend(&text,
                    "predicted: the planner's cost model, at the speed that a worker here measures at its "
                    "start\n");
  }
  absl::StrAppend(&text, "peak: ",
                  on_gpu ? "most memory of the device in use, CUDA's own and other processes' too, looked at "
                           "every 5 ms"
                         : "most memory of the process, so far",
                  "; planned: weights, scratch and the prompt",
                  r.planned_host_bytes > 0
                      ? "; host: planned for blocks on their way out and for checkpoints, all GPUs"
                      : "",
                  "\n\n");
  return text;
}

std::string TableHead(const PrefillReport& report) { return Line(Cells(report), &Cell::title); }
std::string TableRow(const PrefillReport& report) { return Line(Cells(report), &Cell::value); }

}  // namespace headwater
