// The coordinator's metrics by name and label. Labels come from closed sets only.
#ifndef HW_COORDINATOR_COORDINATOR_METRICS_H_
#define HW_COORDINATOR_COORDINATOR_METRICS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "base/metrics.h"

namespace headwater {

// Thread-safe. Every request is in one of requests_waiting, requests_running, requests_total (accepted and
// ended) and rejections_total (ended without having been accepted).
class CoordinatorMetrics {
 public:
  // `metrics` must outlive this object.
  explicit CoordinatorMetrics(Metrics* metrics);

  // An accepted request came to its end.
  void CountEnd(const absl::Status& status);
  // A request was refused before it was accepted.
  void CountRejection(const absl::Status& status);

  prometheus::Gauge& requests_waiting;
  prometheus::Gauge& requests_running;
  prometheus::Gauge& tokens_waiting;
  prometheus::Gauge& tokens_running;
  prometheus::Gauge& workers;
  prometheus::Gauge& draining_workers;
  prometheus::Gauge& decode_nodes;
  prometheus::Gauge& decode_kv_usage_ratio;
  prometheus::Counter& prompt_tokens_total;
  prometheus::Counter& retries_total;
  prometheus::Counter& resumed_epochs_total;
  prometheus::Counter& lost_checkpoints_total;
  prometheus::Histogram& queue_seconds;
  prometheus::Histogram& compute_seconds;
  prometheus::Histogram& egress_seconds;
  prometheus::Histogram& total_seconds;
  prometheus::Histogram& request_prompt_tokens;
  prometheus::Histogram& attention_density_ratio;

 private:
  Metrics* const metrics_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_COORDINATOR_METRICS_H_
