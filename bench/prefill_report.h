// One measured prompt length of a prefill benchmark: its floor, its result row (docs: bench/results), its
// line of the table.
#ifndef HW_BENCH_PREFILL_REPORT_H_
#define HW_BENCH_PREFILL_REPORT_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "nlohmann/json.hpp"

#include "bench/prefill_options.h"
#include "headwater/v1/types.pb.h"
#include "model/config.h"

namespace headwater {

// What a layer's linear layers take alone on the device, a chunk at a time, for each token.
struct LinearRate {
  double projection_s = 0;  // Q, K and V
  double rest_s = 0;        // output, gate, up, down
};

struct PrefillReport {
  std::string device;  // the hardware's name
  std::string linear;  // bf16, ...: what auto came to
  absl::Time date;
  std::string prompt;  // its name, or empty
  int64_t tokens = 0;
  double ttft_s = 0;  // until the first token is known and every block is with the sender
  std::vector<std::pair<std::string, double>> stages;  // seconds of each, by name
  // Only where blocks are acknowledged:
  std::optional<double> kv_acked_s;      // until every block was
  std::optional<double> kv_acked_share;  // of the bytes, when the first token was known
  double density = 1;                    // of attention, as executed
  double linear_flop = 0;
  double attention_flop = 0;  // executed
  std::optional<double> linear_floor_s;
  std::optional<double> attention_floor_s;
  uint64_t planned_bytes = 0;       // weights, scratch and the prompt
  uint64_t planned_host_bytes = 0;  // of all GPUs: what waits for the KV stream, and checkpoints; 0: none
  uint64_t peak_bytes = 0;          // measured
  uint64_t device_bytes = 0;        // that a plan may have; 0: not known
  std::optional<v1::PlanCost> predicted;  // before it ran
  std::optional<v1::AttentionReport> attention;
  // Of several GPUs that share prompts:
  struct Group {
    std::string partition, strategy;
    double exposed_comm_ratio =
        0;                 // of the first token's time, what the rank waited for others that waited most
    double imbalance = 0;  // compute of the rank that computed most over the mean
    struct Rank {
      double linear_s = 0, attention_s = 0, exchange_s = 0, egress_stall_s = 0;
    };
    std::vector<Rank> ranks;
    std::optional<uint32_t> checkpoint_layer = {};  // of the newest one that all KV was acknowledged below
  };
  int gpus = 0;  // 0: a CPU
  std::optional<Group> group;

  // Sums of the parts that are known; none without linear_floor_s.
  std::optional<double> floor_s() const;
  // Of one device.
  double tflops() const { return (linear_flop + attention_flop) / ttft_s * 1e-12 / std::max(1, gpus); }
};

// FLOP, and seconds at that rate, of a prompt's linear layers, and FLOP of its attention over all pairs. In
// the last layer only the last token passes what follows K and V.
double LinearFlop(const ModelConfig& config, int64_t tokens);
double DenseAttentionFlop(const ModelConfig& config, int64_t tokens);
double LinearSeconds(const LinearRate& rate, const ModelConfig& config, int64_t tokens);

// {"bench": "prefill", "device", "commit", "date", "params": {}, "metrics": {}, "peers": {}}, where there is
// a prediction "predicted": {ttft_s, error, linear_s, attention_s, exchange_s, exposed_s, egress_s}, error
// being the prediction's share over the measurement, below 0 under it, and where there is a group "ranks":
// [{linear_s, attention_s, exchange_s, egress_stall_s}], and where there is a report of the attention,
// "attention": {density, recall_mean, recall_p1, sampled_queries, fallback, wait_s, groups:
// [{layer, kv_head, density, recall, recall_p1, threshold, window_blocks, rounds, fallback, note}]}. What is
// not known is absent; fallbacks are the enum's names in lower case, without its prefix.
nlohmann::ordered_json ToJson(const PrefillReport& report, const PrefillBenchOptions& options);

// Of a length that the device's memory does not hold: "metrics": {planned_device_bytes, device_bytes}, and
// "skipped" says why.
nlohmann::ordered_json SkippedToJson(const PrefillReport& report, const PrefillBenchOptions& options);
std::string SkippedLine(const PrefillReport& report);

// Lines of a human table: what is said above it, its head, one length. All end in a newline.
std::string TableTitle(const PrefillReport& report, const PrefillBenchOptions& options);
std::string TableHead(const PrefillReport& report);
std::string TableRow(const PrefillReport& report);

}  // namespace headwater

#endif  // HW_BENCH_PREFILL_REPORT_H_
