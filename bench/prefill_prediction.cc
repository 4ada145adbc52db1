#include "bench/prefill_prediction.h"

#include "bench/prefill_device.h"
#include "coordinator/cost_model.h"
#include "worker/calibration.h"

namespace headwater {

std::optional<v1::PlanCost> PredictPrefill(const PrefillBenchOptions& options, const ModelConfig& config,
                                           const ComputeSpeed& speed, const PrefillJob& job, double density) {
  const bool gpu = options.gpu != PrefillBenchOptions::kCpu;
  LinkRates links = DefaultLinkRates(gpu);
  links.group_start_s = 0;
  if (options.link_gbytes_per_s > 0) links.link_bytes_per_s = 1e9 * options.link_gbytes_per_s;
  if (options.egress_gbytes_per_s > 0) links.egress_bytes_per_s = 1e9 * options.egress_gbytes_per_s;
  const kernels::DType exchanged =
      job.geometry->layout().dtype() == v1::KV_DTYPE_F32 ? kernels::DType::kF32 : kernels::DType::kBF16;
  CostInput input;
  input.model = ShapeOf(config);
  input.num_tokens = job.tokens.size();
  input.local_tokens = static_cast<uint64_t>(MostTokens(job.partition));
  input.world_size = static_cast<uint32_t>(job.world_size());
  input.strategy = job.strategy;
  input.gpu = gpu;
  input.density = density;
  if (input.world_size > 1) input.partition = PartitionOf(options);
  if (options.sink != "none") {
    input.kv_bytes_per_token = job.geometry->total_bytes() / static_cast<uint64_t>(job.tokens.size());
  }
  return PredictCost(input, MakeComputeRates(speed, links, config, exchanged));
}

}  // namespace headwater
