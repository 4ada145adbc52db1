// CpuBackend: prefill on this machine's cores.
#ifndef HW_WORKER_CPU_BACKEND_H_
#define HW_WORKER_CPU_BACKEND_H_

#include <memory>
#include <string>
#include <vector>

#include "model/model.h"
#include "worker/arena.h"
#include "worker/backend.h"
#include "worker/options.h"

namespace headwater {

class CpuBackend final : public PrefillBackend {
 public:
  // Loads the model that the options name, within their budget or 80 % of the memory that is available.
  // Errors as Model::Load().
  static absl::StatusOr<std::unique_ptr<PrefillBackend>> Load(const WorkerOptions& options);

  CpuBackend(std::shared_ptr<const Model> model, const MemoryShape& shape, uint64_t budget_bytes,
             std::string default_policy = "dense")
      : model_(std::move(model)),
        shape_(shape),
        budget_bytes_(budget_bytes),
        default_policy_(std::move(default_policy)) {}

  const ModelConfig& config() const override { return model_->config(); }
  const std::string& fingerprint() const override { return model_->fingerprint(); }
  std::vector<std::string> policies() const override;
  std::string default_policy() const override { return default_policy_; }
  uint32_t max_world_size() const override { return 0; }
  v1::MemoryModel memory_model() const override;
  absl::StatusOr<ComputeSpeed> MeasureSpeed() override;
  kernels::DType exchange_type() const override { return model_->compute(); }
  std::string Describe() const override;
  absl::StatusOr<MemoryPlan> Plan(const kernels::PatternPolicy& policy, kernels::DType wire,
                                  int64_t local_tokens, int64_t max_rank_tokens, int64_t num_tokens,
                                  int world_size, int64_t held_tokens, v1::Strategy strategy) const override;
  absl::Status Reserve(const PrefillJob& job) override { return arena_.Reset(job.plan.arena_bytes()); }
  absl::StatusOr<PrefillResult> Run(const PrefillJob& job, const PrefillContext& context) override;

 private:
  const std::shared_ptr<const Model> model_;
  const MemoryShape shape_;
  const uint64_t budget_bytes_;
  const std::string default_policy_;
  Arena arena_;
};

}  // namespace headwater

#endif  // HW_WORKER_CPU_BACKEND_H_
