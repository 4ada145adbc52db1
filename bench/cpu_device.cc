// A checkpoint on the CPU, with the worker's own backend.
#include <fstream>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include <sys/resource.h>

#include "base/status_macros.h"
#include "bench/prefill_device.h"
#include "worker/cpu_backend.h"

namespace headwater {
namespace {

std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (absl::StartsWith(line, "model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

class CpuDevice final : public PrefillDevice {
 public:
  CpuDevice(std::unique_ptr<PrefillBackend> backend, kernels::DType compute, int64_t threads)
      : backend_(std::move(backend)), compute_(compute), threads_(threads) {}

  const ModelConfig& config() const override { return backend_->config(); }
  std::string name() const override { return absl::StrCat(CpuName(), ", ", threads_, " threads"); }
  std::string linear() const override { return kernels::NameOf(compute_); }
  v1::KvDtype kv_dtype() const override {
    return compute_ == kernels::DType::kF32 ? v1::KV_DTYPE_F32 : v1::KV_DTYPE_BF16;
  }

  absl::StatusOr<uint64_t> Plan(PrefillJob* job) const override {
    const auto tokens = static_cast<int64_t>(job->tokens.size());
    HW_ASSIGN_OR_RETURN(
        job->plan, backend_->Plan(*job->policy, compute_, tokens, tokens, tokens, 1, 0, v1::STRATEGY_RING));
    return job->plan.total_bytes() + backend_->memory_model().weight_bytes();
  }
  absl::Status Reserve(const PrefillJob& job) override { return backend_->Reserve(job); }
  absl::StatusOr<std::vector<PrefillResult>> Run(const PrefillJob& job, int /*first_rank*/,
                                                 absl::Span<KvSender* const> senders,
                                                 JobControl* control) override {
    PrefillContext context;
    context.sender = senders[0];
    context.control = control;
    std::vector<PrefillResult> results(1);
    HW_ASSIGN_OR_RETURN(results[0], backend_->Run(job, context));
    return results;
  }

  absl::StatusOr<ComputeSpeed> MeasureSpeed() override { return backend_->MeasureSpeed(); }

  absl::StatusOr<std::optional<LinearRate>> MeasureLinear() override { return std::optional<LinearRate>(); }

  absl::StatusOr<uint64_t> TakePeakBytes() override {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
  }

 private:
  const std::unique_ptr<PrefillBackend> backend_;
  const kernels::DType compute_;
  const int64_t threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillDevice>> OpenCpu(const PrefillBenchOptions& options) {
  WorkerOptions worker;
  worker.model = options.model;
  worker.compute = options.linear;
  worker.threads = options.threads > 0 ? options.threads : std::thread::hardware_concurrency();
  worker.kv_channels = options.kv_channels;
  kernels::DType compute = kernels::PreferredComputeType();
  if (options.linear != "auto") {
    compute = options.linear == "f32" ? kernels::DType::kF32 : kernels::DType::kBF16;
  }
  HW_ASSIGN_OR_RETURN(std::unique_ptr<PrefillBackend> backend, CpuBackend::Load(worker));
  return std::make_unique<CpuDevice>(std::move(backend), compute, worker.threads);
}

}  // namespace headwater
