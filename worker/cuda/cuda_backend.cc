#include "worker/cuda/cuda_backend.h"

#include <algorithm>
#include <utility>

#include <cuda_runtime_api.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/signals.h"
#include "base/status_macros.h"
#include "model/cuda/cuda_model.h"
#include "worker/cuda/cuda_egress.h"
#include "worker/cuda/cuda_prefill.h"

namespace headwater {
namespace {

constexpr double kDefaultBudgetShare = 0.9;
constexpr int kMostLoadThreads = 8;
// Of a packed pass: enough tokens that the time between two passes does not show, few enough that a prompt
// does not wait long for the one under way (about 0.7 s of an H100 at 8 billion parameters).
constexpr int64_t kPackedTokens = 1 << 15, kLeastPackedTokens = 1 << 10;
constexpr uint32_t kPackedPrompts = 128;
// Token ids as the assignment's message, in its serialised form and as the loop takes them: host memory.
constexpr uint64_t kBytesPerPromptToken = 16;

// After kv_stall_timeout a stalled sender fails by itself, and gRPC soon lets go of its blocks. Only a ring
// that stands still for longer may end the pass, and with it prompts whose decode nodes are well.
constexpr absl::Duration kReleaseTime = absl::Seconds(10);

// After a fault of the device (EX_SOFTWARE), once the results have gone out.
constexpr int kExitBroken = 70;
constexpr absl::Duration kFarewell = absl::Seconds(2);

class Backend final : public PrefillBackend {
 public:
  Backend(std::unique_ptr<CudaModel> model, std::unique_ptr<CudaEgressMemory> egress, uint64_t budget_bytes)
      : model_(std::move(model)),
        egress_(std::move(egress)),
        budget_bytes_(budget_bytes),
        limits_(LimitsFor(*model_, budget_bytes)) {}

  const ModelConfig& config() const override { return model_->config(); }
  const std::string& fingerprint() const override { return model_->fingerprint(); }
  std::vector<std::string> policies() const override { return {"dense", "probe"}; }

  uint32_t max_world_size() const override { return 1; }

  std::string Describe() const override {
    const v1::MemoryModel memory = memory_model();
    const uint64_t taken = memory.weight_bytes() + memory.fixed_bytes();
    const uint64_t tokens = budget_bytes_ > taken ? (budget_bytes_ - taken) / memory.bytes_per_token() : 0;
    return absl::StrCat("bf16, ", NameOf(model_->linear()), " linear layers, ", model_->weight_bytes(),
                        " bytes of weights and ", model_->scratch_bytes(),
                        " of scratch on the device, budget ", budget_bytes_, " bytes: prompts of up to ",
                        tokens, " tokens at ", memory.bytes_per_token(), " bytes each");
  }

  v1::MemoryModel memory_model() const override {
    // The plan is linear but for what is rounded, and the lists, which reach their full size early.
    constexpr int64_t kMany = 1 << 20;
    const uint64_t one = PlanOf(1).total_bytes(), many = PlanOf(kMany).total_bytes();
    v1::MemoryModel model;
    model.set_budget_bytes(budget_bytes_);
    model.set_weight_bytes(resident_bytes());
    model.set_bytes_per_token((many - one) / (kMany - 1) + 1);
    model.set_fixed_bytes(one + PlanCudaPattern(model_->config(), kMany).total_bytes() + 16 * 256);
    return model;
  }

  absl::StatusOr<MemoryPlan> Plan(kernels::DType /*wire*/, int64_t local_tokens, int64_t /*max_rank_tokens*/,
                                  int64_t num_tokens, int world_size) const override {
    if (world_size != 1) return absl::UnimplementedError("context parallelism between GPUs");
    MemoryPlan plan = PlanOf(local_tokens);
    HW_RETURN_IF_ERROR(CheckMemoryPlan(plan, budget_bytes_, resident_bytes()));
    plan.tokens = static_cast<uint64_t>(num_tokens) * kBytesPerPromptToken;
    return plan;
  }

  PackLimits pack_limits() const override { return limits_; }

  bool MayPack(const PrefillJob& job) const override {
    return limits_.max_prompts > 1 && static_cast<int64_t>(job.tokens.size()) <= limits_.max_tokens &&
           MayPackCuda(job);
  }

  std::vector<absl::StatusOr<PrefillResult>> RunPacked(absl::Span<const PrefillJob* const> jobs,
                                                       absl::Span<const PrefillContext> contexts) override {
    std::vector<CudaPrefillPrompt> prompts;
    for (size_t i = 0; i < jobs.size(); ++i) {
      prompts.push_back(
          {jobs[i], contexts[i].sender, contexts[i].control, contexts[i].progress, contexts[i].ended});
    }
    return RunPass(prompts, contexts.empty() ? nullptr : contexts[0].metrics);
  }

  // The loop allocates what the plan says and gives it back at its end.
  absl::Status Reserve(const PrefillJob& /*job*/) override { return absl::OkStatus(); }

  absl::StatusOr<PrefillResult> Run(const PrefillJob& job, const PrefillContext& context) override {
    CudaPrefillPrompt prompt{&job, context.sender, context.control, context.progress, {}};
    return std::move(RunPass({&prompt, 1}, context.metrics)[0]);
  }

 private:
  std::vector<absl::StatusOr<PrefillResult>> RunPass(absl::Span<const CudaPrefillPrompt> prompts,
                                                     WorkerMetrics* metrics) {
    if (broken_) {
      return std::vector<absl::StatusOr<PrefillResult>>(
          prompts.size(), MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST,
                                    "this worker's GPU has failed, and its process ends"));
    }
    auto results = RunCudaPrefill(prompts, {model_.get(), egress_.get(), metrics});
    const bool internal = std::any_of(results.begin(), results.end(),
                                      [](const auto& result) { return absl::IsInternal(result.status()); });
    if (const cudaError_t error = internal ? cudaDeviceSynchronize() : cudaSuccess; error != cudaSuccess) {
      // In this process every later call fails, too. The results still go out: work that breaks a GPU is not
      // to be tried on the next one.
      HW_LOG(ERROR) << "the GPU has failed, the process ends: " << cudaGetErrorString(error);
      broken_ = true;
      ExitOnSignalOrAfter(kFarewell, kExitBroken);
    }
    return results;
  }

  // The largest pass up to kPackedTokens that the budget has room for.
  static PackLimits LimitsFor(const CudaModel& model, uint64_t budget_bytes) {
    const uint64_t resident = model.weight_bytes() + model.scratch_bytes();
    for (int64_t tokens = kPackedTokens; tokens >= kLeastPackedTokens; tokens /= 2) {
      const CudaPrefillPlan plan =
          PlanCudaPrefill(model.config(), model.chunk_tokens(), tokens, kPackedPrompts);
      if (resident + plan.total_bytes() <= budget_bytes) return {kPackedPrompts, tokens, true};
    }
    return {};
  }

  uint64_t resident_bytes() const { return model_->weight_bytes() + model_->scratch_bytes(); }
  MemoryPlan PlanOf(int64_t num_tokens) const {
    MemoryPlan plan;
    plan.device = PlanCudaPrefill(model_->config(), model_->chunk_tokens(), num_tokens).total_bytes();
    return plan;
  }

  const std::unique_ptr<CudaModel> model_;
  const std::unique_ptr<CudaEgressMemory> egress_;
  const uint64_t budget_bytes_;
  const PackLimits limits_;
  bool broken_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillBackend>> CudaBackend::Load(const WorkerOptions& options) {
  if (options.compute == "f32") {
    return absl::UnimplementedError("--compute=f32: a GPU computes in bf16 (auto or bf16)");
  }
  CudaModelOptions model;
  model.directory = options.model;
  model.linear = options.linear == "fp8" ? LinearType::kFP8 : LinearType::kBF16;
  int count = 0;
  HW_RETURN_IF_ERROR(FromCuda(cudaGetDeviceCount(&count), absl::StrCat("--device=", options.device)));
  if (!absl::SimpleAtoi(options.device.substr(options.device.find(':') + 1), &model.device) ||
      model.device >= count) {
    return absl::InvalidArgumentError(
        absl::StrCat("--device=", options.device, ": this machine has ", count, " GPUs"));
  }
  HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(model.device), absl::StrCat("--device=", options.device)));
  uint64_t budget = options.memory_budget_bytes;
  if (budget == 0) {
    size_t free = 0, total = 0;
    HW_RETURN_IF_ERROR(FromCuda(cudaMemGetInfo(&free, &total), "the device's memory"));
    budget = static_cast<uint64_t>(kDefaultBudgetShare * static_cast<double>(free));
  }
  model.budget_bytes = budget;
  model.num_threads = static_cast<int>(std::min<int64_t>(options.threads, kMostLoadThreads));
  HW_ASSIGN_OR_RETURN(std::unique_ptr<CudaEgressMemory> egress,
                      CudaEgressMemory::Allocate(options.kv_stall_timeout + kReleaseTime));
  absl::StatusOr<std::unique_ptr<CudaModel>> loaded = CudaModel::Load(model);
  if (!loaded.ok()) return FlagError("model", options.model, loaded.status());
  return std::make_unique<Backend>(*std::move(loaded), std::move(egress), budget);
}

}  // namespace headwater
