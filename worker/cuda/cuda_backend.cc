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
#include "worker/calibration.h"
#include "worker/cuda/cuda_checkpoints.h"
#include "worker/cuda/cuda_egress.h"
#include "worker/cuda/cuda_prefill.h"
#include "worker/cuda/cuda_sequences.h"
#include "worker/cuda/nccl_group.h"
#include "worker/policy_tables.h"
#include "worker/ring_attention.h"

namespace headwater {
namespace {

constexpr double kDefaultBudgetShare = 0.9;
constexpr int kMostLoadThreads = 8;
// Of a packed pass: enough tokens that the time between two passes does not show, few enough that a prompt
// does not wait long for the one under way (about 0.7 s of an H100 at 8 billion parameters).
constexpr int64_t kPackedTokens = 1 << 15, kLeastPackedTokens = 1 << 10;
constexpr uint32_t kPackedPrompts = 128;
// Enough to fill the device, and to teach time budgets the speed: 0.2 s of an H100 at 8 billion parameters a
// prompt.
constexpr int64_t kCalibrationTokens = 1 << 13;
// Token ids as the assignment's message, in its serialised form and as the loop takes them: host memory.
constexpr uint64_t kBytesPerPromptToken = 16;

// After kv_stall_timeout a stalled sender fails by itself, and gRPC soon lets go of its blocks. Only a ring
// that stands still for longer may end the pass, and with it prompts whose decode nodes are well.
constexpr absl::Duration kReleaseTime = absl::Seconds(10);

// After a fault of the device (EX_SOFTWARE), once the results have gone out.
constexpr int kExitBroken = 70;
constexpr absl::Duration kFarewell = absl::Seconds(2);

// How a worker is told to treat policies.
struct PolicyOptions {
  std::string default_policy;
  PolicyTables tables;
  bool measure_recall = true;
  std::vector<std::string> served;
};

kernels::PolicyParameters DefaultParameters(const std::string& name, const PolicyTables& tables) {
  kernels::PolicyParameters parameters;
  HW_CHECK(kernels::ParsePolicyParameters(name, {}, &parameters).ok());
  AddPolicyTables(tables, {}, &parameters);
  return parameters;
}

// Those that there is a GPU path for.
std::vector<std::string> ServedPolicies(const ModelConfig& config, const PolicyTables& tables) {
  std::vector<std::string> served;
  for (const std::string& name : kernels::PolicyNames()) {
    std::unique_ptr<kernels::CudaPolicy> made;
    const kernels::PolicyParameters parameters = DefaultParameters(name, tables);
    const kernels::Status status = kernels::MakeCudaPolicy(parameters, CudaPolicyShapeOf(config), &made);
    if (status.ok()) {
      served.push_back(name);
    } else {
      HW_LOG(WARNING).Field("policy", name) << "not served: " << status.message();
    }
  }
  return served;
}

class Backend final : public PrefillBackend {
 public:
  Backend(std::unique_ptr<CudaModel> model, std::unique_ptr<CudaEgressMemory> egress, uint64_t budget_bytes,
          PolicyOptions policies, uint32_t max_gpus, int checkpoint_layers)
      : model_(std::move(model)),
        egress_(std::move(egress)),
        budget_bytes_(budget_bytes),
        max_gpus_(max_gpus),
        checkpoint_layers_(checkpoint_layers),
        options_(std::move(policies)),
        policy_limits_(LimitsOfPolicies()),
        limits_(LimitsFor(*model_, budget_bytes, policy_limits_, options_.default_policy)) {}

  const ModelConfig& config() const override { return model_->config(); }
  const std::string& fingerprint() const override { return model_->fingerprint(); }
  std::vector<std::string> policies() const override { return options_.served; }
  std::string default_policy() const override { return options_.default_policy; }
  std::vector<v1::PolicyLimit> policy_limits() const override { return policy_limits_; }
  bool serves_quality() const override { return true; }
  void AddTables(const std::map<std::string, double>& given,
                 kernels::PolicyParameters* parameters) const override {
    AddPolicyTables(options_.tables, given, parameters);
  }

  uint32_t max_world_size() const override { return max_gpus_; }
  std::vector<v1::Strategy> strategies() const override {
    return {v1::STRATEGY_ALLGATHER, v1::STRATEGY_RING};
  }

  absl::StatusOr<ComputeSpeed> MeasureSpeed() override {
    return MeasureRun(this, std::min(kCalibrationTokens, model_->config().max_position), kSettleTime);
  }

  std::string Describe() const override {
    const v1::MemoryModel memory = memory_model();
    const uint64_t taken = memory.weight_bytes() + memory.fixed_bytes();
    const uint64_t tokens = budget_bytes_ > taken ? (budget_bytes_ - taken) / memory.bytes_per_token() : 0;
    return absl::StrCat("bf16, ", NameOf(model_->linear()), " linear layers, ", model_->weight_bytes(),
                        " bytes of weights and ", model_->scratch_bytes(),
                        " of scratch on the device, budget ", budget_bytes_, " bytes: prompts of up to ",
                        tokens, " tokens at ", memory.bytes_per_token(), " bytes each, densely; policy ",
                        options_.default_policy, " unless a request names another");
  }

  v1::MemoryModel memory_model() const override {
    // The plan is linear but for what is rounded, and the lists, which reach their full size early.
    constexpr int64_t kMany = 1 << 20;
    const uint64_t one = DenseBytes(1), many = DenseBytes(kMany);
    v1::MemoryModel model;
    model.set_budget_bytes(budget_bytes_);
    model.set_weight_bytes(resident_bytes());
    model.set_bytes_per_token((many - one) / (kMany - 1) + 1);
    model.set_fixed_bytes(one + PlanCudaPattern(model_->config(), kMany).total_bytes() + 16 * 256);
    const uint64_t others =
        PlanCudaPrefill(model_->config(), model_->chunk_tokens(), 2 * kMany, 1, {}, kMany).total_bytes();
    model.set_group_bytes_per_prompt_token((others - many) / kMany + 1);
    if (checkpoint_layers_ > 0) model.set_group_bytes_per_token(2 * HiddenRowBytes());
    return model;
  }

  absl::StatusOr<MemoryPlan> Plan(const kernels::PatternPolicy& policy, kernels::DType /*wire*/,
                                  int64_t local_tokens, int64_t max_rank_tokens, int64_t num_tokens,
                                  int world_size, int64_t held_tokens, v1::Strategy strategy) const override {
    if (world_size > 1) {
      HW_RETURN_IF_ERROR(CheckShared(model_->config(), policy, num_tokens, world_size, strategy));
    }
    MemoryPlan plan;
    HW_ASSIGN_OR_RETURN(
        const CudaPrefillPlan pass,
        PlanCudaRank(model_->config(), model_->chunk_tokens(), policy.parameters(),
                     {num_tokens, local_tokens, max_rank_tokens, world_size, checkpoint_layers_}));
    plan.device = pass.total_bytes();
    HW_RETURN_IF_ERROR(CheckMemoryPlan(plan, budget_bytes_, resident_bytes()));
    // Host memory.
    const int64_t kept = pass.checkpoints > 0 ? 2 * (local_tokens + max_rank_tokens) : 0;
    plan.checkpoint = static_cast<uint64_t>(std::max(kept, held_tokens)) * HiddenRowBytes();
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
    return RunPass(prompts, PassContext(contexts.empty() ? nullptr : contexts[0].metrics));
  }

  // The loop allocates what the plan says and gives it back at its end.
  absl::Status Reserve(const PrefillJob& /*job*/) override { return absl::OkStatus(); }

  absl::StatusOr<PrefillResult> Run(const PrefillJob& job, const PrefillContext& context) override {
    const CudaPrefillPrompt prompt{&job, context.sender, context.control, context.progress, {}};
    CudaPrefillContext pass = PassContext(context.metrics);
    pass.checkpoints = context.checkpoints;
    pass.checkpoint_layers = context.checkpoint_layers;
    if (job.world_size() == 1) return std::move(RunPass({&prompt, 1}, pass)[0]);
    absl::StatusOr<std::unique_ptr<DeviceGroup>> devices = Join(*context.group, context.control);
    if (!devices.ok()) {
      context.collectives->Abort();
      if (context.metrics != nullptr) context.metrics->collective_aborts.Increment();
      return CollectiveError(devices.status(), *context.control);
    }
    const JobControl::CancelHook hook(context.control, [&] { (*devices)->Abort(); });
    pass.collectives = context.collectives;
    pass.devices = devices->get();
    pass.measure_link = context.measure_link;
    absl::StatusOr<PrefillResult> result = std::move(RunPass({&prompt, 1}, pass)[0]);
    if (!result.ok()) context.collectives->Abort();  // whatever refused the pass, the others need not wait
    return result;
  }

 private:
  CudaPrefillContext PassContext(WorkerMetrics* metrics) {
    return {model_.get(), egress_.get(), metrics, options_.measure_recall, &speed_, nullptr, nullptr};
  }

  absl::StatusOr<std::unique_ptr<DeviceGroup>> Join(const GroupSpec& spec, JobControl* control) const {
    NcclOptions options;
    options.rank = spec.rank;
    options.world_size = spec.world_size;
    options.device = model_->device();
    options.group_name = absl::StrCat(spec.name, "/gpus");
    options.connect_timeout = spec.connect_timeout;
    options.timeout = spec.device_timeout;
    HW_ASSIGN_OR_RETURN(std::unique_ptr<NcclGroup> group, NcclGroup::Create(options));
    const std::unique_ptr<RendezvousClient> rendezvous =
        RendezvousClient::Dial(spec.rendezvous_address, spec.transport.get());
    const JobControl::CancelHook hook(control, [&] {
      rendezvous->Abort();
      group->Abort();
    });
    const JobControl::Waiting waiting(control);
    HW_RETURN_IF_ERROR(group->Connect(rendezvous.get()));
    return std::unique_ptr<DeviceGroup>(std::move(group));
  }

  std::vector<absl::StatusOr<PrefillResult>> RunPass(absl::Span<const CudaPrefillPrompt> prompts,
                                                     const CudaPrefillContext& context) {
    if (broken_) {
      return std::vector<absl::StatusOr<PrefillResult>>(
          prompts.size(), MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST,
                                    "this worker's GPU has failed, and its process ends"));
    }
    auto results = RunCudaPrefill(prompts, context);
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
  static PackLimits LimitsFor(const CudaModel& model, uint64_t budget_bytes,
                              const std::vector<v1::PolicyLimit>& policies,
                              const std::string& default_policy) {
    const uint64_t resident = model.weight_bytes() + model.scratch_bytes();
    for (int64_t tokens = kPackedTokens; tokens >= kLeastPackedTokens; tokens /= 2) {
      const CudaPrefillPlan plan =
          PlanCudaPrefill(model.config(), model.chunk_tokens(), tokens, kPackedPrompts);
      if (resident + plan.total_bytes() > budget_bytes) continue;
      PackLimits limits{kPackedPrompts, tokens, true, {}};
      for (const v1::PolicyLimit& policy : policies) {
        const auto below = static_cast<int64_t>(policy.dense_below_tokens());
        limits.dense_below[policy.name()] = below;
        if (policy.name() == default_policy) limits.dense_below[""] = below;
      }
      return limits;
    }
    return {};
  }

  // The longest prompt of each policy: bytes grow with tokens.
  std::vector<v1::PolicyLimit> LimitsOfPolicies() const {
    const uint64_t room = budget_bytes_ - std::min(budget_bytes_, resident_bytes());
    std::vector<v1::PolicyLimit> limits;
    for (const std::string& name : options_.served) {
      const kernels::PolicyParameters parameters = DefaultParameters(name, options_.tables);
      int64_t fits = 0, too_long = model_->config().max_position + 1;
      while (too_long - fits > 1) {
        const int64_t middle = fits + (too_long - fits) / 2;
        const absl::StatusOr<CudaPrefillPlan> pass =
            PlanCudaRank(model_->config(), model_->chunk_tokens(), parameters, {middle, middle, middle});
        (pass.ok() && pass->total_bytes() <= room ? fits : too_long) = middle;
      }
      v1::PolicyLimit& limit = limits.emplace_back();
      limit.set_name(name);
      // 0 would be no limit at all.
      limit.set_max_tokens(static_cast<uint64_t>(std::max<int64_t>(1, fits)));
      limit.set_dense_below_tokens(static_cast<uint64_t>(kernels::DenseBelowTokens(parameters)));
      if (!MayShare(model_->config(), parameters)) limit.set_max_world_size(1);
    }
    return limits;
  }

  uint64_t HiddenRowBytes() const {
    return static_cast<uint64_t>(model_->config().hidden_size) * sizeof(float);
  }
  uint64_t resident_bytes() const { return model_->weight_bytes() + model_->scratch_bytes(); }
  uint64_t DenseBytes(int64_t num_tokens) const {
    return PlanCudaPrefill(model_->config(), model_->chunk_tokens(), num_tokens).total_bytes();
  }
  const std::unique_ptr<CudaModel> model_;
  const std::unique_ptr<CudaEgressMemory> egress_;
  const uint64_t budget_bytes_;
  const uint32_t max_gpus_;
  const int checkpoint_layers_;
  const PolicyOptions options_;
  const std::vector<v1::PolicyLimit> policy_limits_;
  const PackLimits limits_;
  ComputeSpeed speed_;  // of the passes so far
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
  PolicyOptions policies{
      options.default_policy.empty() ? "headwater" : options.default_policy, {}, options.measure_recall, {}};
  const ModelConfig& config = (*loaded)->config();
  HW_ASSIGN_OR_RETURN(policies.tables,
                      ReadPolicyTables(options.share_clusters, options.headwater_calibration, config));
  policies.served = ServedPolicies(config, policies.tables);
  HW_RETURN_IF_ERROR(CheckDefaultPolicy(policies.default_policy, policies.served));
  return std::make_unique<Backend>(*std::move(loaded), std::move(egress), budget, std::move(policies),
                                   static_cast<uint32_t>(options.max_gpus),
                                   static_cast<int>(options.checkpoint_layers));
}

}  // namespace headwater
