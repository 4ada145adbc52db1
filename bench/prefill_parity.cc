// Holds one device's prefill of a prompt against the CPU's in f32: K and V of every layer, the last token's
// logits; then, with --ranks over 1, several ranks' (GPUs, or endpoints of a CPU group over TCP) against
// one's, in every partition and strategy, sparse against allgather bit by bit. Prints one JSON object a
// prefill; status 1 where a difference is over its tolerance. tools/prefill_parity.py holds the logits
// against transformers, too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"
#include <signal.h>

#include "base/flags.h"
#include "base/status_macros.h"
#include "bench/prefill_device.h"
#include "bench/prefill_job.h"
#include "kernels/attention/block_index.h"
#include "kernels/dtype.h"
#include "kvtransfer/discarding_sender.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/token_ids.h"

namespace headwater {
namespace {

constexpr int64_t kMostRanks = 64;

struct ParityOptions {
  PrefillBenchOptions device;
  std::string tokens;
  std::string logits;
  double tolerance = 2e-2;
  double ranks_tolerance = 1e-3;
  std::vector<int64_t> ranks = {1};
  std::string partition = "all";
  bool cpu = true;         // it is to compute the prompt
  bool cpu_policy = true;  // it has the policy, too

  bool on_cpu() const { return device.gpu == PrefillBenchOptions::kCpu; }
  bool shares() const { return *std::max_element(ranks.begin(), ranks.end()) > 1; }
  // Whether one rank of the device is held against the CPU in f32: not against itself.
  bool has_reference() const { return cpu && cpu_policy && !(on_cpu() && device.linear == "f32"); }
  bool same_top = true;
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

  // Bit by bit.
  bool SameAs(const KeepingSender& other) const {
    return values_.size() == other.values_.size() &&
           std::memcmp(values_.data(), other.values_.data(), values_.size() * sizeof(float)) == 0;
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
  double density = 1;
  uint64_t exchange_bytes = 0;  // of K and V, on all ranks
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
  HW_ASSIGN_OR_RETURN(PrefillJob job, MakeBenchJob(config, {tokens.begin(), tokens.end()}, device->kv_dtype(),
                                                   options.policy));
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
  uint64_t computed = 0, possible = 0;
  for (const PrefillResult& result : results) {
    computed += result.progress.pairs_computed;
    possible += result.progress.pairs_possible;
    outcome.exchange_bytes += result.exchange_bytes;
    if (result.top.empty()) continue;  // another rank has the last token
    for (const TokenScore& score : result.top) outcome.logits[static_cast<size_t>(score.token)] = score.logit;
    outcome.top = result.top.front().token;
  }
  if (possible > 0) outcome.density = static_cast<double>(computed) / static_cast<double>(possible);
  return outcome;
}

// To four digits; a huge number where it is not finite, which JSON cannot say.
double Rounded(double value) {
  if (!std::isfinite(value)) return std::numeric_limits<double>::max();
  return std::strtod(absl::StrFormat("%.4g", value).c_str(), nullptr);
}

// ||a - b|| / ||b||, rounded.
double RelativeError(absl::Span<const float> a, absl::Span<const float> b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double delta = static_cast<double>(a[i]) - b[i];
    difference += delta * delta;
    norm += static_cast<double>(b[i]) * b[i];
  }
  return Rounded(std::sqrt(difference / norm));
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
  // Strategy sparse brings what allgather's blocks are computed from.
  const auto same = row->find("equals_allgather");
  const bool ok =
      most <= tolerance && (!same_top || got.top == wanted.top) && (same == row->end() || same->get<bool>());
  (*row)["kv_error"] = most;
  (*row)["logits_error"] = RelativeError(got.logits, wanted.logits);
  (*row)["top"] = got.top;
  (*row)["reference_top"] = wanted.top;
  (*row)["tolerance"] = tolerance;
  (*row)["ok"] = ok;
  std::printf("%s\n", row->dump().c_str());
  std::fflush(stdout);
  return ok;
}

// What the rows of one device have first.
nlohmann::ordered_json MakeRow(const ParityOptions& options, const PrefillDevice& device, size_t tokens,
                               const char* reference) {
  return {{"model", options.device.model_name()},
          {"tokens", tokens},
          {"device", device.name()},
          {"linear", device.linear()},
          {"policy", options.device.policy.name},
          {"ranks", device.num_ranks()},
          {"reference", reference}};
}

// Of several ranks against one.
absl::StatusOr<bool> CompareSharings(const ParityOptions& options, int64_t ranks,
                                     const std::vector<uint32_t>& tokens, const Outcome& one) {
  PrefillBenchOptions shared = options.device;
  shared.gpus = ranks;
  HW_ASSIGN_OR_RETURN(const auto device, Open(shared));
  bool ok = true;
  for (const char* partition : {"contiguous", "zigzag", "striped"}) {
    if (options.partition != "all" && options.partition != partition) continue;
    Outcome whole;  // by strategy allgather
    for (const absl::string_view strategy : {"allgather", "sparse", "ring"}) {
      if (strategy == "sparse" && !options.on_cpu()) continue;  // GPUs have none
      shared.partition = partition;
      shared.strategy = std::string(strategy);
      HW_ASSIGN_OR_RETURN(Outcome got, Compute(shared, device.get(), tokens));
      nlohmann::ordered_json row = MakeRow(options, *device, tokens.size(), "one rank");
      row["partition"] = partition;
      row["strategy"] = strategy;
      row["density"] = Rounded(got.density);
      row["exchange_bytes"] = got.exchange_bytes;
      if (strategy == "sparse") {
        row["equals_allgather"] = got.kv->SameAs(*whole.kv) && got.logits == whole.logits;
      }
      ok &= Compare(got, one, options.ranks_tolerance, options.same_top, &row);
      if (strategy == "allgather") whole = std::move(got);
    }
  }
  return ok;
}

// True: all within their tolerances.
absl::StatusOr<bool> Run(const ParityOptions& options) {
  HW_ASSIGN_OR_RETURN(const std::vector<uint32_t> tokens, ReadTokenFile(options.tokens, std::cin));
  PrefillBenchOptions reference = options.device;
  reference.device = "cpu";
  reference.linear = "f32";
  Outcome one;
  nlohmann::ordered_json row;
  {
    HW_ASSIGN_OR_RETURN(const auto device, Open(options.device));
    row = MakeRow(options, *device, tokens.size(), "CPU, f32");
    HW_ASSIGN_OR_RETURN(one, Compute(options.device, device.get(), tokens));
  }
  bool ok = true;
  if (!options.logits.empty()) HW_RETURN_IF_ERROR(WriteLogits(options.logits + ".device.f32", one.logits));
  if (options.has_reference()) {
    HW_ASSIGN_OR_RETURN(const auto cpu, Open(reference));
    HW_ASSIGN_OR_RETURN(const Outcome wanted, Compute(reference, cpu.get(), tokens));
    ok = Compare(one, wanted, options.tolerance, options.same_top, &row);
    if (!options.logits.empty()) {
      HW_RETURN_IF_ERROR(WriteLogits(options.logits + ".reference.f32", wanted.logits));
    }
  }
  for (const int64_t ranks : options.ranks) {
    if (ranks == 1) continue;
    HW_ASSIGN_OR_RETURN(const bool shared_ok, CompareSharings(options, ranks, tokens, one));
    ok &= shared_ok;
  }
  return ok;
}

FlagSet Declare(ParityOptions* options) {
  FlagSet flags(
      "prefill_parity --model=DIR --tokens=FILE [flags]\n\n"
      "Holds a device's prefill against the CPU's in f32, and several ranks' against one's: ||a - b|| / "
      "||b|| of\n"
      "K and V, layer by layer.");
  flags.String("model", &options->device.model, "checkpoint directory");
  flags.String("tokens", &options->tokens, "file of token ids");
  flags.String("device", &options->device.device, "cuda:N, or cpu");
  flags.Custom(
      "ranks", "1",
      "over 1: so many share the prompt, too, in every partition and strategy: GPUs from --device on, "
      "or threads of a CPU that talk over TCP; 2,4,8 or 2..8 doubling",
      [options](absl::string_view text) -> absl::Status {
        HW_ASSIGN_OR_RETURN(options->ranks, ParseLengths(text));
        return *std::max_element(options->ranks.begin(), options->ranks.end()) <= kMostRanks
                   ? absl::OkStatus()
                   : absl::InvalidArgumentError(absl::StrCat("over ", kMostRanks));
      });
  flags.Bool("share_gpu", &options->device.share_gpu,
             "of GPU ranks: they are threads that share --device, for want of others");
  flags.Choice("partition", &options->partition, {"all", "contiguous", "zigzag", "striped"},
               "which tokens each of several ranks computes");
  flags.Choice("linear", &options->device.linear, {"auto", "bf16", "fp8", "f32"},
               "the device's type of linear layers; f32: of a CPU, which is its own reference");
  flags.String("policy", &options->device.policy.name,
               "which key blocks attention takes; where a CPU has it not, the reference is one GPU alone");
  flags.Custom("policy_parameters", "", "parameters of the policy: name=value,...",
               [options](absl::string_view text) {
                 return ParseParameters(text, &options->device.policy.parameters);
               });
  for (auto [name, value, what] :
       {std::tuple("tolerance", &options->tolerance, "of K's and V's differences"),
        std::tuple("ranks_tolerance", &options->ranks_tolerance, "of those between several ranks and one")}) {
    flags.Custom(name, absl::StrCat(*value), what, [value = value](absl::string_view text) {
      return absl::SimpleAtod(text, value) && *value > 0
                 ? absl::OkStatus()
                 : absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a number over 0"));
    });
  }
  flags.Bool("same_top", &options->same_top, "whether the best next token must be the same");
  flags.Bool("cpu", &options->cpu,
             "whether the CPU computes the prompt; else several ranks are held against one alone");
  flags.String("logits", &options->logits,
               "prefix of files for the logits: raw f32 in .device.f32, .reference.f32");
  return flags;
}

absl::Status Parse(absl::Span<const std::string> arguments, ParityOptions* options, std::string* help) {
  FlagSet flags = Declare(options);
  HW_RETURN_IF_ERROR(flags.Parse(arguments));
  if (flags.help_requested()) {
    *help = flags.Help();
    return absl::OkStatus();
  }
  if (options->device.model.empty()) return absl::InvalidArgumentError("--model: a directory is required");
  if (options->tokens.empty()) return absl::InvalidArgumentError("--tokens: a file is required");
  HW_RETURN_IF_ERROR(ParseDevice(options->device.device, &options->device.gpu));
  HW_ASSIGN_OR_RETURN(const auto policy, MakeBenchPolicy(options->device.policy));
  kernels::BlockIndex index;
  options->cpu_policy =
      policy->Select({0, 1, 1, 1, 0, 1}, &index).code() != kernels::StatusCode::kUnimplemented;
  if (options->on_cpu() && !options->cpu_policy) {
    return absl::InvalidArgumentError(absl::StrCat("--policy=", options->device.policy.name,
                                                   " with --device=cpu: its block lists are made on GPUs"));
  }
  if (options->device.share_gpu && (options->on_cpu() || !options->shares())) {
    return absl::InvalidArgumentError("--share_gpu: wants ranks on a GPU, --ranks=2 or more");
  }
  if (options->on_cpu() && options->device.linear == "fp8") {
    return absl::InvalidArgumentError("--linear=fp8 with --device=cpu: a CPU computes in bf16 or f32");
  }
  if (!options->on_cpu() && options->device.linear == "f32") {
    return absl::InvalidArgumentError("--linear=f32: a GPU computes in bf16 or fp8");
  }
  if (options->has_reference() || options->shares()) return absl::OkStatus();
  return absl::InvalidArgumentError("--ranks=1: there is no other prefill to compare this one with");
}

int Main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);  // for Gloo
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
