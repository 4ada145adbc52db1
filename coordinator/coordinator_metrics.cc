#include "coordinator/coordinator_metrics.h"

#include <string>

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

constexpr char kReadyName[] = "headwater_time_to_kv_ready_seconds";
constexpr char kReadyHelp[] = "Time from acceptance to the committed cache, by stage.";

prometheus::Histogram::BucketBoundaries TokenBuckets() {
  return {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5'000, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6};
}

}  // namespace

CoordinatorMetrics::CoordinatorMetrics(Metrics* metrics)
    : requests_waiting(metrics->Gauge("headwater_requests_waiting", "Requests not started yet.")),
      requests_running(
          metrics->Gauge("headwater_requests_running", "Requests that hold workers or a session.")),
      tokens_waiting(metrics->Gauge("headwater_tokens_waiting", "Prompt tokens of the waiting requests.")),
      tokens_running(metrics->Gauge("headwater_tokens_running", "Prompt tokens of the running requests.")),
      workers(metrics->Gauge("headwater_workers", "Registered workers.")),
      draining_workers(
          metrics->Gauge("headwater_draining_workers",
                         "Registered workers that get nothing new and leave when they are done.")),
      decode_nodes(metrics->Gauge("headwater_decode_nodes", "Connected decode nodes.")),
      decode_kv_usage_ratio(
          metrics->Gauge("headwater_decode_kv_usage_ratio",
                         "Used part of the KV memory of all connected decode nodes, by their heartbeats.")),
      prompt_tokens_total(metrics->Counter("headwater_prompt_tokens_total",
                                           "Prompt tokens of completed requests.", {{"source", "computed"}})),
      retries_total(metrics->Counter("headwater_retries_total", "Epochs given up and started anew.")),
      resumed_epochs_total(
          metrics->Counter("headwater_resumed_epochs_total", "Epochs that went on from a checkpoint.")),
      lost_checkpoints_total(
          metrics->Counter("headwater_lost_checkpoints_total",
                           "Checkpoints that the next epoch could not go on from: it begins at layer 0.")),
      queue_seconds(metrics->Seconds(kReadyName, kReadyHelp, {{"stage", "queue"}})),
      compute_seconds(metrics->Seconds(kReadyName, kReadyHelp, {{"stage", "compute"}})),
      egress_seconds(metrics->Seconds(kReadyName, kReadyHelp, {{"stage", "egress"}})),
      total_seconds(metrics->Seconds(kReadyName, kReadyHelp, {{"stage", "total"}})),
      request_prompt_tokens(metrics->Histogram("headwater_request_prompt_tokens",
                                               "Prompt lengths of accepted requests.", TokenBuckets())),
      attention_density_ratio(metrics->Histogram("headwater_attention_density_ratio",
                                                 "Share of the causal attention pairs that were computed.",
                                                 {.001, .002, .005, .01, .02, .05, .1, .2, .5, 1})),
      metrics_(metrics) {}

void CoordinatorMetrics::CountEnd(const absl::Status& status) {
  const std::string reason = status.ok() ? "" : ReasonName(ReasonOf(status));
  metrics_
      ->Counter("headwater_requests_total", "Accepted requests that came to their end.",
                {{"code", absl::StatusCodeToString(status.code())}, {"reason", reason}})
      .Increment();
}

void CoordinatorMetrics::CountRejection(const absl::Status& status) {
  metrics_
      ->Counter("headwater_rejections_total", "Requests refused before they were accepted.",
                {{"reason", ReasonName(ReasonOf(status))}})
      .Increment();
}

}  // namespace headwater
