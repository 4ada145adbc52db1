#include "worker/metrics.h"

#include "absl/strings/ascii.h"
#include "absl/strings/strip.h"

namespace headwater {
namespace {

prometheus::Histogram& Stage(Metrics* metrics, const char* stage) {
  return metrics->Seconds("headwater_worker_layer_seconds", "Time of one layer of one rank, by stage.",
                          {{"stage", stage}});
}

prometheus::Histogram& Collective(Metrics* metrics, const char* op) {
  return metrics->Seconds("headwater_collective_seconds",
                          "Time that a rank waited for collective operations: to connect its group, in one "
                          "layer's ring, for a checkpoint, and to load one.",
                          {{"op", op}});
}

// "dense_recall"
std::string FallbackWord(v1::AttentionFallback fallback) {
  return absl::AsciiStrToLower(
      absl::StripPrefix(v1::AttentionFallback_Name(fallback), "ATTENTION_FALLBACK_"));
}

}  // namespace

WorkerMetrics::WorkerMetrics(Metrics* metrics)
    : registry(metrics),
      prompt_tokens(
          metrics->Counter("headwater_prompt_tokens_total", "Prompt tokens prefilled by this rank.")),
      layer_linear(Stage(metrics, "linear")),
      layer_attention(Stage(metrics, "attention")),
      layer_exchange(Stage(metrics, "exchange")),
      layer_egress_stall(Stage(metrics, "egress_stall")),
      last_step_age(metrics->Gauge("headwater_worker_last_step_age_seconds",
                                   "Age of the compute loop's last step; 0 while idle.")),
      epoch(metrics->Gauge("headwater_worker_epoch", "Epoch of the last assignment started.")),
      planned_bytes(metrics->Gauge("headwater_planned_bytes",
                                   "Memory planned for the running assignments, without the weights.")),
      pass_prompts(metrics->Histogram("headwater_worker_pass_prompts", "Prompts of one packed pass.",
                                      {1, 2, 4, 8, 16, 32, 64, 128, 256})),
      memory_budget(metrics->Gauge("headwater_memory_budget_bytes", "Memory budget, with the weights.")),
      connect_group(Collective(metrics, "connect")),
      ring_exchange(Collective(metrics, "ring_exchange")),
      checkpoint_exchange(Collective(metrics, "checkpoint")),
      resume_exchange(Collective(metrics, "resume")),
      checkpoint_bytes(metrics->Gauge("headwater_worker_checkpoint_bytes",
                                      "Host memory that checkpoints of a group's prompt take.")),
      checkpoints_left_out(
          metrics->Counter("headwater_worker_prompts_without_checkpoints_total",
                           "Prompts of a group whose checkpoints found no room in host memory.")),
      collective_aborts(metrics->Counter("headwater_collective_aborts_total",
                                         "Groups given up because of an abort, a lost or a late peer.")),
      exchange_saved(metrics->Counter("headwater_exchange_bytes_saved_total",
                                      "K/V bytes that allgather would have brought besides.")),
      search_overflows(
          metrics->Counter("headwater_worker_search_overflow_tiles_total",
                           "Query tiles computed densely because their block lists found no room.")) {}

void WorkerMetrics::CountPrefill(const absl::Status& status) {
  registry
      ->Counter("headwater_worker_prefills_total", "Assignments ended, by status code.",
                {{"code", absl::StatusCodeToString(status.code())}})
      .Increment();
}

void WorkerMetrics::CountExchange(const std::string& strategy, uint64_t bytes, uint64_t allgather_bytes) {
  registry
      ->Counter("headwater_exchange_bytes_total", "K/V bytes received from other ranks, by strategy.",
                {{"strategy", strategy}})
      .Increment(static_cast<double>(bytes));
  if (bytes < allgather_bytes) exchange_saved.Increment(static_cast<double>(allgather_bytes - bytes));
}

void WorkerMetrics::ObserveAttention(const std::string& policy, double density,
                                     const v1::AttentionReport* report) {
  const MetricLabels labels = {{"policy", policy}};
  registry
      ->Histogram("headwater_attention_density_ratio",
                  "Attention blocks computed, of those causally possible, by policy.",
                  {.002, .005, .01, .02, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .999}, labels)
      .Observe(density);
  if (report == nullptr) return;
  if (report->has_recall_mean()) {
    registry
        ->Histogram("headwater_attention_recall_ratio",
                    "Share of dense attention's mass on the keys that were read, mean over sampled queries, "
                    "by policy.",
                    {.5, .6, .7, .8, .85, .9, .92, .94, .95, .96, .97, .98, .99, .995, .999}, labels)
        .Observe(report->recall_mean());
  }
  const auto count = [&](v1::AttentionFallback fallback) {
    if (fallback == v1::ATTENTION_FALLBACK_UNSPECIFIED) return;
    registry
        ->Counter("headwater_attention_fallbacks_total",
                  "Prompts, layers or groups of heads that read more or less than their policy asked for.",
                  {{"reason", FallbackWord(fallback)}})
        .Increment();
  };
  count(report->fallback());
  for (const v1::AttentionGroup& group : report->groups()) count(group.fallback());
}

}  // namespace headwater
