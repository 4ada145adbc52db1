// The worker's metrics, made once.
#ifndef HW_WORKER_METRICS_H_
#define HW_WORKER_METRICS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "base/metrics.h"
#include "headwater/v1/types.pb.h"

namespace headwater {

// Handles into a Metrics object, which must outlive this. Thread-safe.
class WorkerMetrics {
 public:
  explicit WorkerMetrics(Metrics* metrics);

  // headwater_worker_prefills_total{code}: one ended assignment.
  void CountPrefill(const absl::Status& status);

  // headwater_attention_density_ratio{policy}, headwater_attention_recall_ratio{policy} and
  // headwater_attention_fallbacks_total{reason}: one prompt of this rank; the report's density is not looked
  // at. policy: one that is known.
  void ObserveAttention(const std::string& policy, double density, const v1::AttentionReport* report);

  // headwater_exchange_bytes_total{strategy}: K/V bytes received; headwater_exchange_bytes_saved_total: by
  // how much they are fewer than what strategy allgather brings.
  void CountExchange(const std::string& strategy, uint64_t bytes, uint64_t allgather_bytes);

  Metrics* const registry;
  prometheus::Counter& prompt_tokens;   // headwater_prompt_tokens_total: local tokens of completed ranks
  prometheus::Histogram& layer_linear;  // headwater_worker_layer_seconds{stage}
  prometheus::Histogram& layer_attention;
  prometheus::Histogram& layer_exchange;
  prometheus::Histogram& layer_egress_stall;
  prometheus::Gauge& last_step_age;      // headwater_worker_last_step_age_seconds
  prometheus::Gauge& epoch;              // headwater_worker_epoch: of the last assignment started
  prometheus::Gauge& planned_bytes;      // headwater_planned_bytes: of the assignments running
  prometheus::Histogram& pass_prompts;   // headwater_worker_pass_prompts: of passes that prompts may share
  prometheus::Gauge& memory_budget;      // headwater_memory_budget_bytes
  prometheus::Histogram& connect_group;  // headwater_collective_seconds{op}
  prometheus::Histogram& ring_exchange;
  prometheus::Histogram& checkpoint_exchange;
  prometheus::Histogram& resume_exchange;
  prometheus::Gauge& checkpoint_bytes;        // headwater_worker_checkpoint_bytes
  prometheus::Counter& checkpoints_left_out;  // headwater_worker_prompts_without_checkpoints_total
  prometheus::Counter& collective_aborts;     // headwater_collective_aborts_total
  prometheus::Counter& exchange_saved;
  prometheus::Counter&
      search_overflows;  // headwater_worker_search_overflow_tiles_total: dense for want of room
};

}  // namespace headwater

#endif  // HW_WORKER_METRICS_H_
