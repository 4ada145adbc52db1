// GPUs with a checkpoint, or with a preset's shape and random weights.
#include <algorithm>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"

#include "base/rpc/server.h"
#include "base/status_macros.h"
#include "bench/emulated_group.h"
#include "bench/gpu_linear.h"
#include "bench/prefill_device.h"
#include "bench/prefill_job.h"
#include "model/cuda/cuda_model.h"
#include "model/cuda/device_buffer.h"
#include "model/kernel_status.h"
#include "model/presets.h"
#include "worker/backend.h"
#include "worker/calibration.h"
#include "worker/cuda/cuda_checkpoints.h"
#include "worker/cuda/cuda_egress.h"
#include "worker/cuda/cuda_prefill.h"
#include "worker/cuda/cuda_sequences.h"
#include "worker/cuda/inprocess_device_group.h"
#include "worker/cuda/nccl_group.h"
#include "worker/inprocess_collectives.h"
#include "worker/rendezvous.h"

namespace headwater {
namespace {

constexpr uint32_t kSeed = 20261122;
// Of an operation: a rank may be a layer of a long prompt behind.
constexpr absl::Duration kGroupTimeout = absl::Minutes(2);

// Looks at the device's memory every kPeriod from a thread of its own.
class MemoryWatch {
 public:
  explicit MemoryWatch(int device) : thread_([this, device] { Watch(device); }) {}
  ~MemoryWatch() {
    stop_.Notify();
    thread_.join();
  }

  // Most bytes in use since the last call, by whomever.
  absl::StatusOr<uint64_t> TakeMost() {
    absl::MutexLock lock(&mutex_);
    HW_RETURN_IF_ERROR(status_);
    return std::exchange(most_, 0);
  }

 private:
  static constexpr absl::Duration kPeriod = absl::Milliseconds(5);

  absl::Status Look() {
    size_t free = 0, total = 0;
    HW_RETURN_IF_ERROR(FromCuda(cudaMemGetInfo(&free, &total), "the device's memory"));
    absl::MutexLock lock(&mutex_);
    most_ = std::max<uint64_t>(most_, total - free);
    return absl::OkStatus();
  }

  void Watch(int device) {
    absl::Status status = FromCuda(cudaSetDevice(device), "cudaSetDevice");
    while (status.ok() && !stop_.WaitForNotificationWithTimeout(kPeriod)) status = Look();
    absl::MutexLock lock(&mutex_);
    status_ = std::move(status);
  }

  absl::Mutex mutex_;
  uint64_t most_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  absl::Notification stop_;
  std::thread thread_;
};

// A GPU and what it computes with.
struct Rank {
  std::unique_ptr<CudaModel> model;
  std::unique_ptr<CudaEgressMemory> egress;
  std::unique_ptr<MemoryWatch> watch;
  // Of several ranks.
  std::unique_ptr<Collectives> collectives;
  std::unique_ptr<DeviceGroup> devices;
  std::unique_ptr<CheckpointStore> checkpoints;
};

class GpuDevice final : public PrefillDevice {
 public:
  // emulated: one rank is there for all of them. device_bytes: PrefillDevice::device_bytes().
  GpuDevice(const PrefillBenchOptions& options, std::vector<Rank> ranks, std::string name,
            uint64_t device_bytes, std::optional<EmulatedLink> emulated)
      : ranks_(std::move(ranks)),
        name_(std::move(name)),
        world_size_(static_cast<int>(options.gpus)),
        device_bytes_(device_bytes),
        emulated_(emulated),
        measure_recall_(options.measure_recall),
        checkpoint_layers_(static_cast<int>(options.checkpoint_layers)) {}

  const ModelConfig& config() const override { return model().config(); }
  std::string name() const override { return name_; }
  std::string linear() const override { return NameOf(model().linear()); }
  v1::KvDtype kv_dtype() const override { return v1::KV_DTYPE_BF16; }
  int num_ranks() const override { return world_size_; }
  int ranks_at_once() const override { return static_cast<int>(ranks_.size()); }
  uint64_t device_bytes() const override { return device_bytes_; }

  absl::StatusOr<uint64_t> Plan(PrefillJob* job) const override {
    const auto tokens = static_cast<int64_t>(job->tokens.size());
    const int64_t most = MostTokens(job->partition);
    HW_ASSIGN_OR_RETURN(const CudaPrefillPlan pass,
                        PlanCudaRank(config(), model().chunk_tokens(), job->policy->parameters(),
                                     {tokens, most, most, job->world_size(), checkpoint_layers_}));
    return pass.total_bytes() + model().weight_bytes() + model().scratch_bytes();
  }
  uint64_t PlannedHostBytes(const PrefillJob& job) const override {
    uint64_t bytes = CudaEgressMemory::kSlots * CudaEgressMemory::kSlotBytes;
    const bool checkpoints =
        checkpoint_layers_ > 0 && static_cast<int64_t>(job.tokens.size()) >= kLeastCheckpointTokens;
    if (checkpoints) bytes += CheckpointHostBytes(job.partition, config().hidden_size);
    return bytes * static_cast<uint64_t>(world_size_);
  }
  // The loop allocates what the plan says and gives it back at its end.
  absl::Status Reserve(const PrefillJob& /*job*/) override { return absl::OkStatus(); }

  absl::StatusOr<std::vector<PrefillResult>> Run(const PrefillJob& job, int first_rank,
                                                 absl::Span<KvSender* const> senders,
                                                 JobControl* control) override {
    return RunRanks(ranks_at_once(), [&](int index) {
      const auto at = static_cast<size_t>(index);
      return RunRank(at, first_rank + index, job, senders[at], control);
    });
  }

  absl::StatusOr<std::optional<LinearRate>> MeasureLinear() override {
    HW_ASSIGN_OR_RETURN(const LinearRate rate,
                        MeasureGpuLinear(config(), model().linear(), model().chunk_tokens()));
    return std::optional<LinearRate>(rate);
  }

  absl::StatusOr<ComputeSpeed> MeasureSpeed() override {
    constexpr int64_t kTokens = 8192;  // as cuda_backend.cc
    const int64_t tokens = std::min(kTokens, config().max_position);
    HW_ASSIGN_OR_RETURN(const PrefillJob job,
                        MakeBenchJob(config(), RandomPrompt(config(), tokens), kv_dtype(), {}));
    PrefillResult last;
    const absl::Time start = absl::Now();
    for (int round = 0; round < 2 || absl::Now() - start < kSettleTime; ++round) {
      DiscardingSender sender;
      JobControl control;
      const CudaPrefillPrompt prompt{&job, &sender, &control, {}};
      HW_ASSIGN_OR_RETURN(
          last, std::move(RunCudaPrefill({&prompt, 1}, {ranks_[0].model.get(), ranks_[0].egress.get()})[0]));
    }
    return SpeedOf(config(), tokens, last);
  }

  absl::StatusOr<uint64_t> TakePeakBytes() override {
    uint64_t most = 0;
    for (const Rank& rank : ranks_) {
      HW_ASSIGN_OR_RETURN(const uint64_t bytes, rank.watch->TakeMost());
      most = std::max(most, bytes);
    }
    return most;
  }

 private:
  const CudaModel& model() const { return *ranks_[0].model; }

  // rank: its number in the group; index: among those that run at once.
  absl::StatusOr<PrefillResult> RunRank(size_t index, int rank, const PrefillJob& job, KvSender* sender,
                                        JobControl* control) {
    Rank& own = ranks_[index];
    if (emulated_.has_value()) {
      own.collectives = MakeEmulatedCollectives(rank, world_size_);
      HW_ASSIGN_OR_RETURN(own.devices, MakeEmulatedDeviceGroup(rank, world_size_, *emulated_));
    }
    PrefillJob share = job;
    share.rank = rank;
    const CudaPrefillPrompt prompt{&share, sender, control, {}};
    CudaPrefillContext context{own.model.get(), own.egress.get(), nullptr, measure_recall_, nullptr};
    context.collectives = own.collectives.get();
    context.devices = own.devices.get();
    context.checkpoints = own.checkpoints.get();
    context.checkpoint_layers = checkpoint_layers_;
    if (world_size_ == 1) context.speed = &speed_;
    return std::move(RunCudaPrefill({&prompt, 1}, context)[0]);
  }

  std::vector<Rank> ranks_;
  const std::string name_;
  const int world_size_;
  const uint64_t device_bytes_;
  const std::optional<EmulatedLink> emulated_;
  const bool measure_recall_;
  const int checkpoint_layers_;
  ComputeSpeed speed_;  // of the runs so far, as a worker keeps it
};

absl::StatusOr<Rank> OpenRank(const PrefillBenchOptions& options, int device) {
  HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(device), absl::StrCat("cuda:", device)));
  CudaModelOptions model_options;
  model_options.directory = options.model;
  model_options.device = device;
  model_options.chunk_tokens = options.chunk_tokens;
  model_options.linear = options.linear == "fp8" ? LinearType::kFP8 : LinearType::kBF16;
  Rank rank;
  if (options.model.empty()) {
    HW_ASSIGN_OR_RETURN(const ModelConfig config, PresetConfig(options.preset, options.longest()));
    HW_ASSIGN_OR_RETURN(rank.model, CudaModel::Random(config, model_options, kSeed));
  } else {
    absl::StatusOr<std::unique_ptr<CudaModel>> loaded = CudaModel::Load(model_options);
    if (!loaded.ok()) return FlagError("model", options.model, loaded.status());
    rank.model = *std::move(loaded);
  }
  HW_ASSIGN_OR_RETURN(rank.egress, CudaEgressMemory::Allocate());
  rank.watch = std::make_unique<MemoryWatch>(device);
  rank.checkpoints = std::make_unique<CheckpointStore>();
  return rank;
}

absl::StatusOr<std::unique_ptr<DeviceGroup>> JoinNccl(int rank, int world, int device,
                                                      const std::string& rendezvous_address) {
  NcclOptions options;
  options.rank = rank;
  options.world_size = world;
  options.device = device;
  options.group_name = "bench";
  options.timeout = kGroupTimeout;
  HW_ASSIGN_OR_RETURN(std::unique_ptr<NcclGroup> group, NcclGroup::Create(options));
  const auto rendezvous = RendezvousClient::Dial(rendezvous_address, nullptr);
  HW_RETURN_IF_ERROR(group->Connect(rendezvous.get()));
  return group;
}

// Ranks of one process: their host side goes through memory.
absl::Status FormGroup(const PrefillBenchOptions& options, std::vector<Rank>* ranks) {
  const int world = static_cast<int>(ranks->size());
  std::vector<std::unique_ptr<Collectives>> collectives = MakeInProcessGroup(world, kGroupTimeout);
  for (size_t i = 0; i < ranks->size(); ++i) (*ranks)[i].collectives = std::move(collectives[i]);
  if (options.share_gpu) {
    std::vector<std::unique_ptr<DeviceGroup>> devices = MakeInProcessDeviceGroup(world, kGroupTimeout);
    for (size_t i = 0; i < ranks->size(); ++i) (*ranks)[i].devices = std::move(devices[i]);
    return absl::OkStatus();
  }
  const auto service = MakeRendezvousService({});
  HW_ASSIGN_OR_RETURN(const RunningServer server, StartServer("127.0.0.1:0", {service.get()}));
  std::vector<absl::Status> statuses(ranks->size());
  std::vector<std::thread> threads;
  for (int number = 0; number < world; ++number) {
    threads.emplace_back([&, number] {
      const auto at = static_cast<size_t>(number);
      auto joined = JoinNccl(number, world, options.gpu + number, server.address);
      statuses[at] = joined.status();
      if (joined.ok()) (*ranks)[at].devices = *std::move(joined);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) HW_RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillDevice>> OpenGpu(const PrefillBenchOptions& options) {
  const std::string flag = absl::StrCat("--device=", options.device);
  int count = 0;
  HW_RETURN_IF_ERROR(FromCuda(cudaGetDeviceCount(&count), flag));
  const int64_t wanted = options.emulate || options.share_gpu ? 1 : options.gpus;
  if (options.gpu + wanted > count) {
    return absl::InvalidArgumentError(
        absl::StrCat(flag, options.gpus > 1 ? absl::StrCat(" --gpus=", options.gpus) : "",
                     ": this machine has ", count, " GPUs"));
  }
  cudaDeviceProp properties{};
  HW_RETURN_IF_ERROR(FromCuda(cudaGetDeviceProperties(&properties, options.gpu), flag));
  size_t free = 0, total = 0;
  HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(options.gpu), flag));
  HW_RETURN_IF_ERROR(FromCuda(cudaMemGetInfo(&free, &total), flag));
  std::vector<Rank> ranks(static_cast<size_t>(options.emulate ? 1 : options.gpus));
  for (size_t i = 0; i < ranks.size(); ++i) {
    HW_ASSIGN_OR_RETURN(ranks[i],
                        OpenRank(options, options.gpu + (options.share_gpu ? 0 : static_cast<int>(i))));
  }
  if (ranks.size() > 1) HW_RETURN_IF_ERROR(FormGroup(options, &ranks));
  HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(options.gpu), flag));
  std::optional<EmulatedLink> emulated;
  if (options.emulate) {
    emulated = EmulatedLink{1e9 * options.link_gbytes_per_s, DefaultLinkRates(true).exchange_step_s};
  }
  return std::make_unique<GpuDevice>(options, std::move(ranks), properties.name, free, emulated);
}

}  // namespace headwater
