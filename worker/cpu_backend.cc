#include "worker/cpu_backend.h"

#include <utility>

#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "kernels/ops/linear.h"
#include "kernels/pattern/policy.h"
#include "worker/calibration.h"
#include "worker/memory_budget.h"

namespace headwater {
namespace {

constexpr double kDefaultBudgetShare = 0.8;

// Lists that depend on Q and K are searched on GPUs.
std::vector<std::string> Policies() { return {"dense", "a_shape"}; }

kernels::DType ComputeType(const std::string& name) {
  if (name == "f32") return kernels::DType::kF32;
  if (name == "bf16") return kernels::DType::kBF16;
  return kernels::PreferredComputeType();
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillBackend>> CpuBackend::Load(const WorkerOptions& options) {
  const std::string policy = options.default_policy.empty() ? "dense" : options.default_policy;
  HW_RETURN_IF_ERROR(CheckDefaultPolicy(policy, Policies()));
  for (const auto& [flag, file] :
       {std::pair<const char*, const std::string&>("share_clusters", options.share_clusters),
        {"headwater_calibration", options.headwater_calibration}}) {
    if (!file.empty()) return FlagError(flag, file, absl::UnimplementedError("its policy needs a GPU"));
  }
  uint64_t budget = options.memory_budget_bytes;
  if (budget == 0) {
    HW_ASSIGN_OR_RETURN(const uint64_t available, AvailableMemoryBytes());
    budget = static_cast<uint64_t>(kDefaultBudgetShare * static_cast<double>(available));
  }
  kernels::SetNumThreads(static_cast<int>(options.threads));
  ModelOptions model_options;
  model_options.directory = options.model;
  model_options.compute = ComputeType(options.compute);
  model_options.weight_budget_bytes = budget;
  absl::StatusOr<std::unique_ptr<Model>> loaded = Model::Load(model_options);
  if (!loaded.ok()) return FlagError("model", options.model, loaded.status());
  const std::shared_ptr<const Model> model = *std::move(loaded);
  MemoryShape shape =
      MakeMemoryShape(*model, static_cast<int>(options.threads), static_cast<int>(options.egress_buffers),
                      static_cast<int>(options.kv_channels));
  shape.checkpoints = options.checkpoint_layers > 0;
  return std::make_unique<CpuBackend>(model, shape, budget, policy);
}

std::vector<std::string> CpuBackend::policies() const { return Policies(); }

v1::MemoryModel CpuBackend::memory_model() const {
  return LinearMemoryModel(shape_, budget_bytes_, model_->weight_bytes());
}

absl::StatusOr<ComputeSpeed> CpuBackend::MeasureSpeed() { return MeasureModel(*model_); }

std::string CpuBackend::Describe() const {
  return absl::StrCat(kernels::NameOf(model_->compute()), ", ", model_->weight_bytes(),
                      " bytes of weights, budget ", budget_bytes_, " bytes");
}

absl::StatusOr<MemoryPlan> CpuBackend::Plan(const kernels::PatternPolicy& /*policy*/, kernels::DType wire,
                                            int64_t local_tokens, int64_t max_rank_tokens, int64_t num_tokens,
                                            int world_size, int64_t held_tokens,
                                            v1::Strategy strategy) const {
  const MemoryPlan plan =
      PlanMemory(shape_, wire, local_tokens, max_rank_tokens, num_tokens, world_size, held_tokens, strategy);
  HW_RETURN_IF_ERROR(CheckMemoryPlan(plan, budget_bytes_, model_->weight_bytes()));
  return plan;
}

absl::StatusOr<PrefillResult> CpuBackend::Run(const PrefillJob& job, const PrefillContext& context) {
  PrefillContext complete = context;
  complete.model = model_.get();
  complete.arena = &arena_;
  return RunPrefill(job, complete);
}

}  // namespace headwater
