// How fast this worker is, measured at its start, for the planner's cost model.
#ifndef HW_WORKER_CALIBRATION_H_
#define HW_WORKER_CALIBRATION_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "headwater/v1/worker.pb.h"
#include "kernels/dtype.h"
#include "model/config.h"
#include "model/model.h"
#include "worker/quality.h"

namespace headwater {

class PrefillBackend;
struct PrefillResult;

// Of a model on this machine's cores: its first layer, and attention, over more and more tokens until a call
// takes 60 ms; at most a chunk, or 2,048, of them. Takes half a second or less, more only where 64 tokens of
// a layer do. Errors of the model and of the kernel.
absl::StatusOr<ComputeSpeed> MeasureModel(const Model& model);

// Of a backend's whole loop: the last one of dense prompts of `num_tokens`, nothing sent, two at least and as
// many as take `settle`: a GPU's clocks fall under load. FAILED_PRECONDITION: its memory does not hold one;
// else Run()'s errors.
absl::StatusOr<ComputeSpeed> MeasureRun(PrefillBackend* backend, int64_t num_tokens, absl::Duration settle);
// What GPUs are given.
inline constexpr absl::Duration kSettleTime = absl::Seconds(2);

// Of a dense prompt of `num_tokens` on one rank that has run so. FAILED_PRECONDITION: its times tell nothing.
absl::StatusOr<ComputeSpeed> SpeedOf(const ModelConfig& config, int64_t num_tokens,
                                     const PrefillResult& result);

// What cannot be measured alone: assumed until a group, or a KV stream, has worked (link_probe.h).
struct LinkRates {
  double link_bytes_per_s = 0;
  double egress_bytes_per_s = 0;
  double exchange_step_s = 0;
  double group_start_s = 0;
};

// Of a device kind, "cpu" or "cuda", where the flags say nothing else. CPU: Gloo over TCP (1 GB/s) and a KV
// stream of two cores (0.75 GB/s, bench/results/kv.jsonl). GPU: NCCL of one host (100 GB/s: less than NVLink,
// more than PCIe) and eight channels (7.2 GB/s, bench/results/scaling.jsonl: a million tokens' cache in 18.9
// s of computing it in fp8, which is all hidden). Latencies are assumed, not measured.
LinkRates DefaultLinkRates(bool gpu);

// What the cost model needs of a model's shape, and what else a registration says of it; not its name and
// fingerprint.
v1::ServedModel ShapeOf(const ModelConfig& config);

// What registers.
v1::ComputeRates MakeComputeRates(const ComputeSpeed& speed, const LinkRates& links,
                                  const ModelConfig& config, kernels::DType exchanged);

}  // namespace headwater

#endif  // HW_WORKER_CALIBRATION_H_
