// A checkpoint on the CPU, with the worker's own backend; several ranks are threads with a backend each that
// talk over TCP, as workers on one host do.
#include <algorithm>
#include <fstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include <sys/resource.h>

#include "base/rpc/server.h"
#include "base/status_macros.h"
#include "bench/prefill_device.h"
#include "kernels/ops/linear.h"
#include "worker/cpu_backend.h"
#include "worker/gloo_collectives.h"
#include "worker/rendezvous.h"

namespace headwater {
namespace {

// Of an operation: a rank may be a layer of a long prompt behind, on a core that all share.
constexpr absl::Duration kGroupTimeout = absl::Minutes(10);

std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (absl::StartsWith(line, "model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

struct Rank {
  std::unique_ptr<PrefillBackend> backend;
  std::unique_ptr<Collectives> collectives;  // of several ranks
};

class CpuDevice final : public PrefillDevice {
 public:
  CpuDevice(std::vector<Rank> ranks, kernels::DType compute, int64_t threads)
      : ranks_(std::move(ranks)), compute_(compute), threads_(threads) {}

  const ModelConfig& config() const override { return ranks_[0].backend->config(); }
  std::string name() const override {
    return absl::StrCat(CpuName(), ", ", threads_, threads_ == 1 ? " thread" : " threads",
                        ranks_.size() > 1 ? " a rank" : "");
  }
  std::string linear() const override { return kernels::NameOf(compute_); }
  v1::KvDtype kv_dtype() const override {
    return compute_ == kernels::DType::kF32 ? v1::KV_DTYPE_F32 : v1::KV_DTYPE_BF16;
  }

  int num_ranks() const override { return static_cast<int>(ranks_.size()); }

  absl::StatusOr<uint64_t> Plan(PrefillJob* job) const override {
    const int64_t most = MostTokens(job->partition);
    const PrefillBackend& backend = *ranks_[0].backend;
    HW_ASSIGN_OR_RETURN(
        job->plan, backend.Plan(*job->policy, compute_, most, most, static_cast<int64_t>(job->tokens.size()),
                                job->world_size(), 0, job->strategy));
    return job->plan.total_bytes() + backend.memory_model().weight_bytes();
  }
  absl::Status Reserve(const PrefillJob& job) override {
    for (const Rank& rank : ranks_) HW_RETURN_IF_ERROR(rank.backend->Reserve(job));
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<PrefillResult>> Run(const PrefillJob& job, int /*first_rank*/,
                                                 absl::Span<KvSender* const> senders,
                                                 JobControl* control) override {
    return RunRanks(num_ranks(), [&](int number) {
      const auto at = static_cast<size_t>(number);
      kernels::SetNumThreads(static_cast<int>(threads_));
      PrefillJob own = job;
      own.rank = number;
      PrefillContext context;
      context.collectives = ranks_[at].collectives.get();
      context.sender = senders[at];
      context.control = control;
      return ranks_[at].backend->Run(own, context);
    });
  }

  absl::StatusOr<ComputeSpeed> MeasureSpeed() override { return ranks_[0].backend->MeasureSpeed(); }

  absl::StatusOr<std::optional<LinearRate>> MeasureLinear() override { return std::optional<LinearRate>(); }

  absl::StatusOr<uint64_t> TakePeakBytes() override {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
  }

 private:
  const std::vector<Rank> ranks_;
  const kernels::DType compute_;
  const int64_t threads_;  // of each rank
};

absl::Status FormGroup(std::vector<Rank>* ranks) {
  const auto service = MakeRendezvousService({});
  HW_ASSIGN_OR_RETURN(const RunningServer server, StartServer("127.0.0.1:0", {service.get()}));
  std::vector<absl::Status> statuses(ranks->size());
  std::vector<std::thread> threads;
  for (size_t number = 0; number < ranks->size(); ++number) {
    threads.emplace_back([&, number] {
      GlooOptions options;
      options.rank = static_cast<int>(number);
      options.world_size = static_cast<int>(ranks->size());
      options.group_name = "bench";
      options.timeout = kGroupTimeout;
      absl::StatusOr<std::unique_ptr<GlooCollectives>> group = GlooCollectives::Create(options);
      absl::Status& status = statuses[number];
      status = group.status();
      if (!status.ok()) return;
      status = (*group)->Connect(RendezvousClient::Dial(server.address, nullptr).get());
      (*ranks)[number].collectives = *std::move(group);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) HW_RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillDevice>> OpenCpu(const PrefillBenchOptions& options) {
  WorkerOptions worker;
  worker.model = options.model;
  worker.compute = options.linear;
  worker.threads = options.threads > 0
                       ? options.threads
                       : std::max<int64_t>(1, std::thread::hardware_concurrency() / options.gpus);
  worker.kv_channels = options.kv_channels;
  kernels::DType compute = kernels::PreferredComputeType();
  if (options.linear != "auto") {
    compute = options.linear == "f32" ? kernels::DType::kF32 : kernels::DType::kBF16;
  }
  std::vector<Rank> ranks(static_cast<size_t>(options.gpus));
  for (Rank& rank : ranks) {
    HW_ASSIGN_OR_RETURN(rank.backend, CpuBackend::Load(worker));
  }
  if (ranks.size() > 1) HW_RETURN_IF_ERROR(FormGroup(&ranks));
  return std::make_unique<CpuDevice>(std::move(ranks), compute, worker.threads);
}

}  // namespace headwater
