// GPUs with a checkpoint, or with a preset's shape and random weights.
#include <algorithm>
#include <random>
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
#include "bench/prefill_device.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/quantize.h"
#include "model/cuda/cuda_model.h"
#include "model/cuda/device_buffer.h"
#include "model/kernel_status.h"
#include "model/presets.h"
#include "worker/backend.h"
#include "worker/cuda/cuda_checkpoints.h"
#include "worker/cuda/cuda_egress.h"
#include "worker/cuda/cuda_prefill.h"
#include "worker/cuda/cuda_sequences.h"
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

struct LinearShape {
  int64_t in, out;
  kernels::DType y;
  bool accumulate;
};

// Numbers of ordinary size: a device that multiplies zeros draws less power and is faster.
absl::Status FillWithNumbers(const DeviceBuffer& buffer) {
  std::mt19937 random(kSeed);
  std::vector<uint16_t> values(1 << 20);
  for (uint16_t& value : values) value = static_cast<uint16_t>(0x3c00 | (random() & 0x83ff));
  for (uint64_t at = 0; at < buffer.bytes(); at += values.size() * 2) {
    HW_RETURN_IF_ERROR(FromCuda(
        cudaMemcpy(buffer.data() + at, values.data(),
                   std::min<uint64_t>(values.size() * 2, buffer.bytes() - at), cudaMemcpyHostToDevice),
        "inputs"));
  }
  return absl::OkStatus();
}

// bf16 [rows, width] becomes e4m3 with a scale a row.
absl::Status Quantize(int64_t rows, int64_t width, DeviceBuffer* x, DeviceBuffer* scale) {
  HW_ASSIGN_OR_RETURN(DeviceBuffer out,
                      DeviceBuffer::Allocate(static_cast<uint64_t>(rows * width), "operands in fp8"));
  HW_ASSIGN_OR_RETURN(*scale, DeviceBuffer::Allocate(static_cast<uint64_t>(rows) * sizeof(float), "scales"));
  HW_RETURN_IF_ERROR(
      FromKernels(kernels::CudaQuantizeRows(
                      {x->data(), out.data(), reinterpret_cast<float*>(scale->data()), rows, width}, nullptr),
                  "operands in fp8"));
  *x = std::move(out);
  return absl::OkStatus();
}

// Seconds of one product of `rows` rows: the median of rounds.
absl::StatusOr<double> TimeLinear(kernels::CudaLinear* linear, LinearType type, const LinearShape& shape,
                                  int64_t rows) {
  const auto bytes = [](int64_t a, int64_t b, int64_t size) { return static_cast<uint64_t>(a * b * size); };
  HW_ASSIGN_OR_RETURN(DeviceBuffer x, DeviceBuffer::Allocate(bytes(rows, shape.in, 2), "x"));
  HW_ASSIGN_OR_RETURN(DeviceBuffer w, DeviceBuffer::Allocate(bytes(shape.out, shape.in, 2), "weight"));
  HW_ASSIGN_OR_RETURN(const DeviceBuffer y, DeviceBuffer::Allocate(bytes(rows, shape.out, 4), "y"));
  for (const DeviceBuffer* buffer : {&x, &w}) HW_RETURN_IF_ERROR(FillWithNumbers(*buffer));
  HW_RETURN_IF_ERROR(FromCuda(cudaMemset(y.data(), 0, y.bytes()), "outputs"));
  DeviceBuffer x_scale, w_scale;
  if (type == LinearType::kFP8) {
    HW_RETURN_IF_ERROR(Quantize(rows, shape.in, &x, &x_scale));
    HW_RETURN_IF_ERROR(Quantize(shape.out, shape.in, &w, &w_scale));
  }
  const auto run = [&](int times) -> absl::Status {
    for (int i = 0; i < times; ++i) {
      HW_RETURN_IF_ERROR(
          FromKernels(linear->Run({x.data(), w.data(), nullptr, y.data(), shape.y, shape.accumulate, rows,
                                   shape.in, shape.out, reinterpret_cast<const float*>(x_scale.data()),
                                   reinterpret_cast<const float*>(w_scale.data())},
                                  nullptr),
                      "linear"));
    }
    return FromCuda(cudaDeviceSynchronize(), "linear");
  };
  constexpr int kTimes = 5;
  HW_RETURN_IF_ERROR(run(3));
  std::vector<double> rounds(7);
  for (double& round : rounds) {
    const absl::Time start = absl::Now();
    HW_RETURN_IF_ERROR(run(kTimes));
    round = absl::ToDoubleSeconds(absl::Now() - start) / kTimes;
  }
  std::sort(rounds.begin(), rounds.end());
  return rounds[rounds.size() / 2];
}

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
  GpuDevice(std::vector<Rank> ranks, std::string name, bool measure_recall, int checkpoint_layers)
      : ranks_(std::move(ranks)),
        name_(std::move(name)),
        measure_recall_(measure_recall),
        checkpoint_layers_(checkpoint_layers) {}

  const ModelConfig& config() const override { return model().config(); }
  std::string name() const override { return name_; }
  std::string linear() const override { return NameOf(model().linear()); }
  v1::KvDtype kv_dtype() const override { return v1::KV_DTYPE_BF16; }
  int num_ranks() const override { return static_cast<int>(ranks_.size()); }

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
    return bytes * ranks_.size();
  }
  // The loop allocates what the plan says and gives it back at its end.
  absl::Status Reserve(const PrefillJob& /*job*/) override { return absl::OkStatus(); }

  absl::StatusOr<std::vector<PrefillResult>> Run(const PrefillJob& job, absl::Span<KvSender* const> senders,
                                                 JobControl* control) override {
    std::vector<absl::StatusOr<PrefillResult>> ended(ranks_.size());
    std::vector<std::thread> threads;
    for (size_t rank = 1; rank < ranks_.size(); ++rank) {
      threads.emplace_back([&, rank] { ended[rank] = RunRank(rank, job, senders[rank], control); });
    }
    ended[0] = RunRank(0, job, senders[0], control);
    for (std::thread& thread : threads) thread.join();
    std::vector<PrefillResult> results;
    absl::Status lost;  // what a rank ends with that another one left
    for (absl::StatusOr<PrefillResult>& result : ended) {
      if (result.ok()) {
        results.push_back(*std::move(result));
      } else if (absl::IsUnavailable(result.status())) {
        lost.Update(result.status());
      } else {
        return result.status();
      }
    }
    if (!lost.ok()) return lost;
    return results;
  }

  absl::StatusOr<std::optional<LinearRate>> MeasureLinear() override {
    const ModelConfig& c = config();
    const int64_t hidden = c.hidden_size, inner = c.intermediate_size, rows = model().chunk_tokens();
    const int64_t q = int64_t{c.num_q_heads} * c.head_dim, kv = int64_t{c.num_kv_heads} * c.head_dim;
    const LinearType type = model().linear();
    std::unique_ptr<kernels::CudaLinear> linear;
    HW_RETURN_IF_ERROR(FromKernels(kernels::CudaLinear::Create({}, &linear), "cuBLASLt"));
    LinearRate rate;
    HW_ASSIGN_OR_RETURN(
        rate.projection_s,
        TimeLinear(linear.get(), type, {hidden, q + 2 * kv, kernels::DType::kBF16, false}, rows));
    for (const LinearShape& shape : {LinearShape{q, hidden, kernels::DType::kF32, true},
                                     LinearShape{hidden, 2 * inner, kernels::DType::kBF16, false},
                                     LinearShape{inner, hidden, kernels::DType::kF32, true}}) {
      HW_ASSIGN_OR_RETURN(const double seconds, TimeLinear(linear.get(), type, shape, rows));
      rate.rest_s += seconds;
    }
    rate.projection_s /= static_cast<double>(rows);
    rate.rest_s /= static_cast<double>(rows);
    return std::optional<LinearRate>(rate);
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

  absl::StatusOr<PrefillResult> RunRank(size_t number, const PrefillJob& job, KvSender* sender,
                                        JobControl* control) {
    Rank& rank = ranks_[number];
    PrefillJob own = job;
    own.rank = static_cast<int>(number);
    const CudaPrefillPrompt prompt{&own, sender, control, {}};
    CudaPrefillContext context{rank.model.get(), rank.egress.get(), nullptr, measure_recall_, nullptr};
    context.collectives = rank.collectives.get();
    context.devices = rank.devices.get();
    context.checkpoints = rank.checkpoints.get();
    context.checkpoint_layers = checkpoint_layers_;
    if (ranks_.size() == 1) context.speed = &speed_;
    return std::move(RunCudaPrefill({&prompt, 1}, context)[0]);
  }

  std::vector<Rank> ranks_;
  const std::string name_;
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

// Ranks of one process: their host side goes through memory.
absl::Status FormGroup(int first_device, std::vector<Rank>* ranks) {
  const int world = static_cast<int>(ranks->size());
  const auto service = MakeRendezvousService({});
  HW_ASSIGN_OR_RETURN(const RunningServer server, StartServer("127.0.0.1:0", {service.get()}));
  std::vector<std::unique_ptr<Collectives>> collectives = MakeInProcessGroup(world, kGroupTimeout);
  std::vector<absl::Status> statuses(ranks->size());
  std::vector<std::thread> threads;
  for (int number = 0; number < world; ++number) {
    threads.emplace_back([&, number] {
      Rank& rank = (*ranks)[static_cast<size_t>(number)];
      rank.collectives = std::move(collectives[static_cast<size_t>(number)]);
      NcclOptions options;
      options.rank = number;
      options.world_size = world;
      options.device = first_device + number;
      options.group_name = "bench";
      options.timeout = kGroupTimeout;
      absl::StatusOr<std::unique_ptr<NcclGroup>> group = NcclGroup::Create(options);
      absl::Status& status = statuses[static_cast<size_t>(number)];
      status = group.status();
      if (!status.ok()) return;
      const auto rendezvous = RendezvousClient::Dial(server.address, nullptr);
      status = (*group)->Connect(rendezvous.get());
      rank.devices = *std::move(group);
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
  if (options.gpu + options.gpus > count) {
    return absl::InvalidArgumentError(
        absl::StrCat(flag, options.gpus > 1 ? absl::StrCat(" --gpus=", options.gpus) : "",
                     ": this machine has ", count, " GPUs"));
  }
  cudaDeviceProp properties{};
  HW_RETURN_IF_ERROR(FromCuda(cudaGetDeviceProperties(&properties, options.gpu), flag));
  std::vector<Rank> ranks(static_cast<size_t>(options.gpus));
  for (size_t i = 0; i < ranks.size(); ++i) {
    HW_ASSIGN_OR_RETURN(ranks[i], OpenRank(options, options.gpu + static_cast<int>(i)));
  }
  if (ranks.size() > 1) HW_RETURN_IF_ERROR(FormGroup(options.gpu, &ranks));
  HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(options.gpu), flag));
  return std::make_unique<GpuDevice>(std::move(ranks), properties.name, options.measure_recall,
                                     static_cast<int>(options.checkpoint_layers));
}

}  // namespace headwater
