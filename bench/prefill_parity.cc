// Holds one device's prefill of a prompt against the CPU's in f32: K and V of every layer, the last token's
// logits; then, with --gpus over 1, several GPUs' against one's, in every partition and strategy. Prints one
// JSON object a prefill; status 1 where a difference is over its tolerance. tools/prefill_parity.py holds the
// logits against transformers, too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

#include "base/flags.h"
#include "base/status_macros.h"
#include "bench/prefill_device.h"
#include "bench/prefill_job.h"
#include "kernels/dtype.h"
#include "kvtransfer/discarding_sender.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/token_ids.h"

namespace headwater {
namespace {

struct ParityOptions {
  PrefillBenchOptions device;
  std::string tokens;
  std::string logits;
  double tolerance = 2e-2;
  double gpus_tolerance = 1e-3;
  bool same_top = true;
  bool cpu = true;
};

// Keeps the cache as f32.
class KeepingSender final : public DiscardingSender {
 public:
  explicit KeepingSender(const KvGeometry& geometry)
      : geometry_(geometry),
        is_f32_(geometry.layout().dtype() == v1::KV_DTYPE_F32),
        values_(geometry.total_bytes() / geometry.element_bytes()) {}

  absl::Status Submit(const KvBlockId& block, const void* data, std::function<void()> done) override {
    const uint64_t size = geometry_.element_bytes();
    kernels::Convert(data, is_f32_ ? kernels::DType::kF32 : kernels::DType::kBF16,
                     values_.data() + geometry_.OffsetOf(block) / size, kernels::DType::kF32,
                     geometry_.BytesOf(block) / size);
    done();
    return absl::OkStatus();
  }

  absl::Span<const float> Tensor(uint32_t layer, KvKind kind) const {
    const uint64_t count = geometry_.tensor_bytes() / geometry_.element_bytes();
    return {values_.data() + (2 * layer + static_cast<uint64_t>(kind)) * count, count};
  }

 private:
  const KvGeometry geometry_;
  const bool is_f32_;
  std::vector<float> values_;
};

struct Outcome {
  std::unique_ptr<KeepingSender> kv;
  std::vector<float> logits;
  int32_t top = 0;
  int num_layers = 0;
};

absl::StatusOr<Outcome> Compute(const PrefillBenchOptions& options, PrefillDevice* device,
                                const std::vector<uint32_t>& tokens) {
  const ModelConfig& config = device->config();
  if (static_cast<int64_t>(tokens.size()) > config.max_position) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--tokens: ", tokens.size(), " tokens are over the model's maximum of ", config.max_position));
  }
  for (const uint32_t token : tokens) {
    if (token >= static_cast<uint32_t>(config.vocab_size)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--tokens: token id ", token, " is not below the vocabulary's ", config.vocab_size));
    }
  }
  HW_ASSIGN_OR_RETURN(PrefillJob job,
                      MakeBenchJob(config, {tokens.begin(), tokens.end()}, device->kv_dtype(), {}));
  job.top_logprobs = config.vocab_size;  // all of them
  HW_RETURN_IF_ERROR(DealOut(options, *device, &job));
  HW_RETURN_IF_ERROR(device->Plan(&job).status());
  HW_RETURN_IF_ERROR(device->Reserve(job));
  Outcome outcome;
  outcome.kv = std::make_unique<KeepingSender>(*job.geometry);
  outcome.num_layers = config.num_layers;
  JobControl control;
  // Ranks have blocks of their own.
  const std::vector<KvSender*> senders(job.partition.size(), outcome.kv.get());
  HW_ASSIGN_OR_RETURN(const std::vector<PrefillResult> results, device->Run(job, 0, senders, &control));
  outcome.logits.resize(static_cast<size_t>(config.vocab_size));
  for (const PrefillResult& result : results) {
    if (result.top.empty()) continue;  // another rank has the last token
    for (const TokenScore& score : result.top) outcome.logits[static_cast<size_t>(score.token)] = score.logit;
    outcome.top = result.top.front().token;
  }
  return outcome;
}

// ||a - b|| / ||b||, to four digits; a huge number where it is not finite, which JSON cannot say.
double RelativeError(absl::Span<const float> a, absl::Span<const float> b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double delta = static_cast<double>(a[i]) - b[i];
    difference += delta * delta;
    norm += static_cast<double>(b[i]) * b[i];
  }
  const double error = std::sqrt(difference / norm);
  if (!std::isfinite(error)) return std::numeric_limits<double>::max();
  return std::strtod(absl::StrFormat("%.4g", error).c_str(), nullptr);
}

absl::Status WriteLogits(const std::string& path, const std::vector<float>& logits) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(logits.data()),
             static_cast<std::streamsize>(logits.size() * sizeof(float)));
  return file.flush() ? absl::OkStatus()
                      : absl::InvalidArgumentError(absl::StrCat("--logits: ", path, " cannot be written"));
}

absl::StatusOr<std::unique_ptr<PrefillDevice>> Open(const PrefillBenchOptions& options) {
  if (options.device == "cpu") return OpenCpu(options);
#ifdef HW_WITH_CUDA
  return OpenGpu(options);
#else
  return absl::InvalidArgumentError(
      absl::StrCat("--device=", options.device, ": this build has no code for GPUs"));
#endif
}

// Differences of `got` and whether they are within the tolerance, into `row`.
bool Compare(const Outcome& got, const Outcome& wanted, double tolerance, bool same_top,
             nlohmann::ordered_json* row) {
  double most = 0;
  for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
    auto& errors = (*row)[kind == KvKind::kK ? "k_errors" : "v_errors"] = nlohmann::ordered_json::array();
    for (int layer = 0; layer < got.num_layers; ++layer) {
      const auto at = static_cast<uint32_t>(layer);
      const double error = RelativeError(got.kv->Tensor(at, kind), wanted.kv->Tensor(at, kind));
      errors.push_back(error);
      most = std::max(most, error);
    }
  }
  const bool ok = most <= tolerance && (!same_top || got.top == wanted.top);
  (*row)["kv_error"] = most;
  (*row)["logits_error"] = RelativeError(got.logits, wanted.logits);
  (*row)["top"] = got.top;
  (*row)["reference_top"] = wanted.top;
  (*row)["tolerance"] = tolerance;
  (*row)["ok"] = ok;
  std::printf("%s\n", row->dump().c_str());
  return ok;
}

// Of several GPUs against one.
absl::StatusOr<bool> CompareSharings(const ParityOptions& options, const std::vector<uint32_t>& tokens,
                                     const Outcome& one) {
  PrefillBenchOptions shared = options.device;
  HW_ASSIGN_OR_RETURN(const auto device, Open(shared));
  bool ok = true;
  for (const char* partition : {"contiguous", "zigzag", "striped"}) {
    for (const char* strategy : {"allgather", "ring"}) {
      shared.partition = partition;
      shared.strategy = strategy;
      HW_ASSIGN_OR_RETURN(const Outcome got, Compute(shared, device.get(), tokens));
      nlohmann::ordered_json row = {{"model", shared.model_name()}, {"tokens", tokens.size()},
                                    {"device", device->name()},     {"linear", device->linear()},
                                    {"gpus", shared.gpus},          {"partition", partition},
                                    {"strategy", strategy},         {"reference", "one GPU"}};
      ok &= Compare(got, one, options.gpus_tolerance, options.same_top, &row);
    }
  }
  return ok;
}

// Of one device against the CPU, of which `row` has what was computed.
absl::StatusOr<bool> CompareWithCpu(const ParityOptions& options, const std::vector<uint32_t>& tokens,
                                    const Outcome& got, nlohmann::ordered_json row) {
  PrefillBenchOptions reference = options.device;
  reference.device = "cpu";
  reference.linear = "f32";
  reference.gpus = 1;
  HW_ASSIGN_OR_RETURN(const auto cpu, Open(reference));
  HW_ASSIGN_OR_RETURN(const Outcome wanted, Compute(reference, cpu.get(), tokens));
  row["gpus"] = 1;
  row["reference"] = "CPU, f32";
  const bool ok = Compare(got, wanted, options.tolerance, options.same_top, &row);
  if (!options.logits.empty()) {
    HW_RETURN_IF_ERROR(WriteLogits(options.logits + ".device.f32", got.logits));
    HW_RETURN_IF_ERROR(WriteLogits(options.logits + ".reference.f32", wanted.logits));
  }
  return ok;
}

// True: all within their tolerances.
absl::StatusOr<bool> Run(const ParityOptions& options) {
  HW_ASSIGN_OR_RETURN(const std::vector<uint32_t> tokens, ReadTokenFile(options.tokens, std::cin));
  PrefillBenchOptions single = options.device;
  single.gpus = 1;
  Outcome got;
  nlohmann::ordered_json row = {{"model", single.model_name()}, {"tokens", tokens.size()}};
  {
    HW_ASSIGN_OR_RETURN(const auto device, Open(single));
    row["device"] = device->name();
    row["linear"] = device->linear();
    HW_ASSIGN_OR_RETURN(got, Compute(single, device.get(), tokens));
  }
  bool ok = true;
  if (options.cpu) {
    HW_ASSIGN_OR_RETURN(ok, CompareWithCpu(options, tokens, got, row));
  }
  if (options.device.gpus > 1) {
    HW_ASSIGN_OR_RETURN(const bool shared_ok, CompareSharings(options, tokens, got));
    ok &= shared_ok;
  }
  return ok;
}

absl::Status Parse(absl::Span<const std::string> arguments, ParityOptions* options, std::string* help) {
  FlagSet flags(
      "prefill_parity --model=DIR --tokens=FILE [flags]\n\n"
      "Holds a device's prefill against the CPU's in f32, and several GPUs' against one's: ||a - b|| / ||b|| "
      "of K\n"
      "and V, layer by layer.");
  flags.String("model", &options->device.model, "checkpoint directory");
  flags.String("tokens", &options->tokens, "file of token ids");
  flags.String("device", &options->device.device, "cuda:N, or cpu");
  flags.Int("gpus", &options->device.gpus, 1, 64,
            "over 1: so many from --device on share the prompt, too, in every partition and strategy");
  flags.Bool("share_gpu", &options->device.share_gpu,
             "they are threads that share --device, for want of others");
  flags.Choice("linear", &options->device.linear, {"auto", "bf16", "fp8"},
               "the device's type of linear layers");
  for (auto [name, value, what] :
       {std::tuple("tolerance", &options->tolerance, "of K's and V's differences"),
        std::tuple("gpus_tolerance", &options->gpus_tolerance, "of those between several GPUs and one")}) {
    flags.Custom(name, absl::StrCat(*value), what, [value = value](absl::string_view text) {
      return absl::SimpleAtod(text, value) && *value > 0
                 ? absl::OkStatus()
                 : absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a number over 0"));
    });
  }
  flags.Bool("same_top", &options->same_top, "whether the best next token must be the same");
  flags.Bool("cpu", &options->cpu,
             "whether the CPU computes the prompt; else several GPUs are held against one alone");
  flags.String("logits", &options->logits,
               "prefix of files for the logits: raw f32 in .device.f32, .reference.f32");
  HW_RETURN_IF_ERROR(flags.Parse(arguments));
  if (flags.help_requested()) {
    *help = flags.Help();
    return absl::OkStatus();
  }
  if (options->device.model.empty()) return absl::InvalidArgumentError("--model: a directory is required");
  if (options->tokens.empty()) return absl::InvalidArgumentError("--tokens: a file is required");
  HW_RETURN_IF_ERROR(ParseDevice(options->device.device, &options->device.gpu));
  if (!options->cpu && (options->device.gpus == 1 || !options->logits.empty())) {
    return absl::InvalidArgumentError("--nocpu: wants --gpus=2 or more, and has no --logits to write");
  }
  if (options->device.gpus == 1 || options->device.gpu != PrefillBenchOptions::kCpu) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--gpus=", options->device.gpus, " with --device=cpu"));
}

int Main(int argc, char** argv) {
  ParityOptions options;
  std::string help;
  absl::Status status = Parse(std::vector<std::string>(argv + 1, argv + argc), &options, &help);
  if (!help.empty()) {
    std::fputs(help.c_str(), stdout);
    return kExitOk;
  }
  if (status.ok()) {
    const auto ok = Run(options);
    if (ok.ok()) return *ok ? kExitOk : kExitOther;
    status = ok.status();
  }
  std::fprintf(stderr, "prefill_parity: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) || absl::IsNotFound(status) ? kExitUsage : kExitOther;
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) { return headwater::Main(argc, argv); }
