// What the planner would say of a benchmark's job before it runs.
#ifndef HW_BENCH_PREFILL_PREDICTION_H_
#define HW_BENCH_PREFILL_PREDICTION_H_

#include <optional>

#include "bench/prefill_options.h"
#include "headwater/v1/types.pb.h"
#include "model/config.h"
#include "worker/prefill.h"
#include "worker/quality.h"

namespace headwater {

// coordinator/cost_model.h, with the speed that a worker would have measured at its start, and with the
// options' links; the group is there already. density: of attention, expected. Nullopt: the model has no such
// prediction.
std::optional<v1::PlanCost> PredictPrefill(const PrefillBenchOptions& options, const ModelConfig& config,
                                           const ComputeSpeed& speed, const PrefillJob& job, double density);

}  // namespace headwater

#endif  // HW_BENCH_PREFILL_PREDICTION_H_
