// Times a whole prefill on one GPU: a checkpoint, or a preset's shape with random weights; KV blocks dropped
// as soon as they are handed over, or streamed over loopback to a receiver that checks them. Prints one JSON
// line a prompt length, with the floor of its linear layers measured in the same process.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "nlohmann/json.hpp"

#include "base/rpc/server.h"
#include "base/status_macros.h"
#include "bench/prefill_job.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/quantize.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/store.h"
#include "model/cuda/cuda_model.h"
#include "model/cuda/device_buffer.h"
#include "model/kernel_status.h"
#include "model/presets.h"
#include "worker/cuda/cuda_prefill.h"

ABSL_FLAG(std::string, preset, "llama-3-8b", "shape with random weights");
ABSL_FLAG(std::string, model, "", "checkpoint directory, in place of --preset");
ABSL_FLAG(std::vector<std::string>, tokens, std::vector<std::string>({"8192"}), "prompt lengths");
ABSL_FLAG(int, repeat, 3, "timed runs, after one that warms up; the median counts");
ABSL_FLAG(std::string, sink, "none",
          "none, or verify: KV goes over loopback to a receiver that checks every block");
ABSL_FLAG(int, kv_channels, 8, "connections to the receiver");
ABSL_FLAG(double, density, 0, "over 0: policy probe at this forced density; else dense");
ABSL_FLAG(int, chunk_tokens, 8192, "tokens that a linear layer takes at once");
ABSL_FLAG(std::string, linear, "bf16", "bf16 or fp8: operands of linear layers");

namespace headwater {
namespace {

constexpr uint32_t kSeed = 20261122;
constexpr char kName[] = "bench";

struct Receiver {
  std::unique_ptr<KvStore> store;
  Metrics metrics{"bench"};
  std::unique_ptr<grpc::Service> service;
  RunningServer server;
};

absl::StatusOr<std::unique_ptr<Receiver>> StartReceiver() {
  auto receiver = std::make_unique<Receiver>();
  KvStoreOptions options;
  options.sink = KvSink::kVerify;
  options.budget_bytes = 1 << 30;
  HW_ASSIGN_OR_RETURN(receiver->store, KvStore::Open(options));
  receiver->service = MakeKvReceiver(receiver->store.get(), &receiver->metrics);
  HW_ASSIGN_OR_RETURN(receiver->server, StartServer("127.0.0.1:0", {receiver->service.get()}));
  return receiver;
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

// Seconds that a layer's linear layers take for each token, alone on the device, a chunk at a time.
absl::StatusOr<double> LinearSecondsPerToken(const ModelConfig& config, LinearType type, int64_t rows) {
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const int64_t q = int64_t{config.num_q_heads} * config.head_dim,
                kv = int64_t{config.num_kv_heads} * config.head_dim;
  const struct {
    int64_t in, out;
    kernels::DType y;
    bool accumulate;
  } shapes[] = {{hidden, q + 2 * kv, kernels::DType::kBF16, false},
                {q, hidden, kernels::DType::kF32, true},
                {hidden, 2 * inner, kernels::DType::kBF16, false},
                {inner, hidden, kernels::DType::kF32, true}};
  std::unique_ptr<kernels::CudaLinear> linear;
  HW_RETURN_IF_ERROR(FromKernels(kernels::CudaLinear::Create({}, &linear), "cuBLASLt"));
  double seconds = 0;
  for (const auto& shape : shapes) {
    const auto bytes = [](int64_t a, int64_t b, int64_t size) { return static_cast<uint64_t>(a * b * size); };
    HW_ASSIGN_OR_RETURN(DeviceBuffer x, DeviceBuffer::Allocate(bytes(rows, shape.in, 2), "x"));
    HW_ASSIGN_OR_RETURN(DeviceBuffer w, DeviceBuffer::Allocate(bytes(shape.out, shape.in, 2), "weight"));
    HW_ASSIGN_OR_RETURN(const DeviceBuffer y, DeviceBuffer::Allocate(bytes(rows, shape.out, 4), "y"));
    // Numbers of ordinary size: a device that multiplies zeros draws less power and is faster.
    std::mt19937 random(kSeed);
    std::vector<uint16_t> values(1 << 20);
    for (uint16_t& value : values) value = static_cast<uint16_t>(0x3c00 | (random() & 0x83ff));
    for (const DeviceBuffer* buffer : {&x, &w}) {
      for (uint64_t at = 0; at < buffer->bytes(); at += values.size() * 2) {
        HW_RETURN_IF_ERROR(FromCuda(
            cudaMemcpy(buffer->data() + at, values.data(),
                       std::min<uint64_t>(values.size() * 2, buffer->bytes() - at), cudaMemcpyHostToDevice),
            "inputs"));
      }
    }
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
    seconds += rounds[rounds.size() / 2];
  }
  return seconds / static_cast<double>(rows);
}

struct Sample {
  double ttft_s = 0;       // until the first token is known and every block is with the sender
  double kv_acked_s = 0;   // until every block is acknowledged
  double acked_share = 0;  // of the bytes, when the first token was known
  PrefillResult result;
};

absl::StatusOr<Sample> RunOnce(const PrefillJob& job, CudaModel* model, CudaEgressMemory* egress,
                               Receiver* receiver) {
  std::unique_ptr<KvSender> sender = std::make_unique<DiscardingSender>();
  if (receiver != nullptr) {
    v1::OpenSessionRequest open;
    open.set_session_id(kName);
    open.set_session_token(kName);
    open.set_epoch(1);
    *open.mutable_layout() = job.geometry->layout();
    HW_RETURN_IF_ERROR(receiver->store->OpenSession(open).status());
    KvSenderOptions options;
    options.address = receiver->server.address;
    options.session_id = options.session_token = kName;
    options.epoch = 1;
    options.num_channels = absl::GetFlag(FLAGS_kv_channels);
    sender = KvSender::Create(options, *job.geometry);
  }
  JobControl control;
  const CudaPrefillPrompt prompt{&job, sender.get(), &control, {}};
  Sample sample;
  const absl::Time start = absl::Now();
  HW_ASSIGN_OR_RETURN(sample.result, std::move(RunCudaPrefill({&prompt, 1}, {model, egress, nullptr})[0]));
  sample.ttft_s = absl::ToDoubleSeconds(absl::Now() - start);
  sample.acked_share =
      static_cast<double>(sender->Stats().bytes_acked) / static_cast<double>(job.geometry->total_bytes());
  HW_RETURN_IF_ERROR(sender->Finish());
  sample.kv_acked_s = absl::ToDoubleSeconds(absl::Now() - start);
  if (receiver != nullptr) receiver->store->Release(kName);
  return sample;
}

absl::Status RunLength(int64_t num_tokens, CudaModel* model, CudaEgressMemory* egress, Receiver* receiver,
                       double linear_seconds_per_token) {
  const ModelConfig& config = model->config();
  HW_ASSIGN_OR_RETURN(const PrefillJob job,
                      MakeBenchJob(config, num_tokens, v1::KV_DTYPE_BF16, absl::GetFlag(FLAGS_density)));
  std::vector<Sample> samples;
  for (int run = 0; run <= std::max(1, absl::GetFlag(FLAGS_repeat)); ++run) {
    HW_ASSIGN_OR_RETURN(Sample sample, RunOnce(job, model, egress, receiver));
    if (run > 0) samples.push_back(std::move(sample));
  }
  std::sort(samples.begin(), samples.end(),
            [](const Sample& a, const Sample& b) { return a.ttft_s < b.ttft_s; });
  const Sample& median = samples[samples.size() / 2];
  const double n = static_cast<double>(num_tokens), layers = config.num_layers;
  const double attention_flop = 2.0 * config.num_q_heads * config.head_dim * n * n * (layers - 1);
  const uint64_t device_bytes = PlanCudaPrefill(config, model->chunk_tokens(), num_tokens).total_bytes() +
                                model->weight_bytes() + model->scratch_bytes();
  nlohmann::json row;
  row["linear"] = NameOf(model->linear());
  row["tokens"] = num_tokens;
  row["ttft_s"] = median.ttft_s;
  row["kv_acked_s"] = median.kv_acked_s;
  row["kv_acked_share_at_first_token"] = median.acked_share;
  row["tokens_per_s"] = n / median.ttft_s;
  row["linear_s"] = absl::ToDoubleSeconds(median.result.linear);
  row["attention_s"] = absl::ToDoubleSeconds(median.result.attention);
  const PrefillProgress& done = median.result.progress;
  row["density"] = static_cast<double>(done.pairs_computed) / static_cast<double>(done.pairs_possible);
  row["egress_stall_s"] = absl::ToDoubleSeconds(median.result.egress_stall);
  row["linear_floor_s"] = linear_seconds_per_token * n * layers;
  row["attention_flop"] = attention_flop;
  row["planned_device_bytes"] = device_bytes;
  std::printf("%s\n", row.dump().c_str());
  std::fflush(stdout);
  return absl::OkStatus();
}

absl::Status Run() {
  std::vector<int64_t> lengths;
  for (const std::string& text : absl::GetFlag(FLAGS_tokens)) {
    int64_t length = 0;
    if (!absl::SimpleAtoi(text, &length) || length < 1) {
      return absl::InvalidArgumentError(absl::StrCat("--tokens: '", text, "' is not a positive number"));
    }
    lengths.push_back(length);
  }
  const std::string sink = absl::GetFlag(FLAGS_sink);
  if (sink != "none" && sink != "verify") {
    return absl::InvalidArgumentError(absl::StrCat("--sink: '", sink, "' is not one of none, verify"));
  }
  CudaModelOptions options;
  options.directory = absl::GetFlag(FLAGS_model);
  options.chunk_tokens = absl::GetFlag(FLAGS_chunk_tokens);
  const std::string linear_type = absl::GetFlag(FLAGS_linear);
  if (linear_type != "bf16" && linear_type != "fp8") {
    return absl::InvalidArgumentError(absl::StrCat("--linear: '", linear_type, "' is not one of bf16, fp8"));
  }
  options.linear = linear_type == "fp8" ? LinearType::kFP8 : LinearType::kBF16;
  std::unique_ptr<CudaModel> model;
  if (options.directory.empty()) {
    HW_ASSIGN_OR_RETURN(
        const ModelConfig config,
        PresetConfig(absl::GetFlag(FLAGS_preset), *std::max_element(lengths.begin(), lengths.end())));
    HW_ASSIGN_OR_RETURN(model, CudaModel::Random(config, options, kSeed));
  } else {
    HW_ASSIGN_OR_RETURN(model, CudaModel::Load(options));
  }
  HW_ASSIGN_OR_RETURN(const std::unique_ptr<CudaEgressMemory> egress, CudaEgressMemory::Allocate());
  std::unique_ptr<Receiver> receiver;
  if (sink == "verify") {
    HW_ASSIGN_OR_RETURN(receiver, StartReceiver());
  }
  HW_ASSIGN_OR_RETURN(const double linear,
                      LinearSecondsPerToken(model->config(), options.linear, options.chunk_tokens));
  for (const int64_t length : lengths) {
    HW_RETURN_IF_ERROR(RunLength(length, model.get(), egress.get(), receiver.get(), linear));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = headwater::Run();
  if (!status.ok()) std::fprintf(stderr, "gpu_prefill: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
