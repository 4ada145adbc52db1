#include "bench/prefill_options.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

#include "base/flags.h"
#include "base/status_macros.h"
#include "model/presets.h"
#include "worker/calibration.h"

namespace headwater {
namespace {

constexpr char kUsage[] =
    "headwater bench prefill [flags]\n\n"
    "Times whole prefills on one device, or on several GPUs that share each prompt, a shape with random\n"
    "weights or a checkpoint, and shows each prompt length beside its floor: the matrix products of its\n"
    "linear layers alone on one device, in this process, and attention's FLOP at --attention_tflops, dealt\n"
    "evenly.";
constexpr int64_t kMostTokens = int64_t{1} << 24;

absl::Status Bad(absl::string_view flag, absl::string_view value, absl::string_view wanted) {
  return absl::InvalidArgumentError(absl::StrCat("--", flag, ": '", value, "' is not ", wanted));
}

absl::StatusOr<int64_t> ParseLength(absl::string_view text) {
  absl::string_view number = absl::StripAsciiWhitespace(text);
  int64_t factor = 1;
  if (absl::ConsumeSuffix(&number, "K")) {
    factor = 1 << 10;
  } else if (absl::ConsumeSuffix(&number, "M")) {
    factor = 1 << 20;
  }
  int64_t length = 0;
  const bool is_number = !number.empty() && absl::ascii_isdigit(number[0]);
  if (!is_number || !absl::SimpleAtoi(number, &length) || length < 1 || length > kMostTokens / factor) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a number of tokens from 1 to ",
                                                   kMostTokens, " (such as 8192, 64K or 1M)"));
  }
  return length * factor;
}

constexpr const char* kBounds[] = {"min_recall", "max_density", "time_budget"};

// One bound; ranges are those of requests.
void DeclareQuality(FlagSet* flags, PrefillBenchOptions* o) {
  const auto take = [o](const v1::Quality& quality) -> absl::Status {
    HW_ASSIGN_OR_RETURN(o->quality, ReadQuality(quality));
    return absl::OkStatus();
  };
  const auto number = [take](void (v1::Quality::*set)(double)) {
    return [take, set](absl::string_view text) {
      double value = 0;
      if (!absl::SimpleAtod(text, &value)) {
        return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a number"));
      }
      v1::Quality quality;
      (quality.*set)(value);
      return take(quality);
    };
  };
  flags->Custom(kBounds[0], "", "quality contract of policy headwater, on a GPU: least recall",
                number(&v1::Quality::set_min_recall));
  flags->Custom(kBounds[1], "", "the same: most density", number(&v1::Quality::set_max_density));
  flags->Custom(
      kBounds[2], "", "the same: time for the computation, such as 1.5s", [take](absl::string_view text) {
        absl::Duration budget;
        if (!absl::ParseDuration(text, &budget)) {
          return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a duration such as 1.5s"));
        }
        v1::Quality quality;
        const int64_t seconds = absl::IDivDuration(budget, absl::Seconds(1), &budget);
        quality.mutable_time_budget()->set_seconds(seconds);
        quality.mutable_time_budget()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(budget)));
        return take(quality);
      });
}

void DeclareRate(FlagSet* flags, const char* name, double* rate, const char* what) {
  flags->Custom(name, "", what, [rate](absl::string_view text) {
    return absl::SimpleAtod(text, rate) && *rate > 0 && *rate < 1e6
               ? absl::OkStatus()
               : absl::InvalidArgumentError(
                     absl::StrCat("'", text, "' is not a number over 0, under 1000000"));
  });
}

FlagSet Declare(PrefillBenchOptions* o) {
  constexpr int64_t kMostChunk = 1 << 20;
  FlagSet flags(kUsage);
  flags.Choice("preset", &o->preset, PresetNames(), "shape with random weights");
  flags.String("model", &o->model, "checkpoint directory, in place of --preset");
  flags.Custom("tokens", "8192", "prompt lengths: 8192,64K,1M, or 8K..1M doubling",
               [o](absl::string_view text) -> absl::Status {
                 HW_ASSIGN_OR_RETURN(o->tokens, ParseLengths(text));
                 return absl::OkStatus();
               });
  flags.String(
      "prompts", &o->prompts,
      "file of prompts, a JSON object a line: {\"name\", \"tokens\": [ids]}, or \"tokens_u16_b64\", base64 "
      "of little-endian uint16; in place of --tokens, with --model");
  flags.String("device", &o->device, "what computes: cuda:N for GPU N, or cpu (with --model)");
  flags.Int("gpus", &o->gpus, 1, 64, "GPUs from --device on that share each prompt");
  flags.Choice("partition", &o->partition, {"contiguous", "zigzag", "striped"},
               "which tokens each of several GPUs computes");
  flags.Choice("strategy", &o->strategy, {"allgather", "ring"}, "how several GPUs get each other's K and V");
  flags.Int("checkpoint_layers", &o->checkpoint_layers, 0, 1024,
            "several GPUs keep what goes into every so many layers, as workers do; 0: none");
  flags.Bool("emulate", &o->emulate,
             "one GPU takes the shares of --gpus GPUs in turn, for want of the others: an exchange takes its "
             "bytes at --link_gbytes_per_s, the first token the slowest rank's time; rows say so");
  DeclareRate(&flags, "link_gbytes_per_s", &o->link_gbytes_per_s,
              "what a GPU receives from the others, for the prediction and --emulate; default: as workers");
  DeclareRate(&flags, "egress_gbytes_per_s", &o->egress_gbytes_per_s,
              "what a rank's KV streams carry, for the prediction; default: as workers");
  flags.Choice("linear", &o->linear, {"auto", "bf16", "fp8", "f32"},
               "type of linear layers; auto: bf16, or f32 on a CPU without bf16");
  flags.String("policy", &o->policy.name, "which key blocks attention takes");
  flags.Custom("density", "", "forces the policy to this share of the pairs; else it takes what it finds",
               [o](absl::string_view text) {
                 double& density = o->policy.density;
                 return absl::SimpleAtod(text, &density) && density > 0 && density <= 1
                            ? absl::OkStatus()
                            : absl::InvalidArgumentError(
                                  absl::StrCat("'", text, "' is not a number over 0, at most 1"));
               });
  flags.Custom("policy_parameters", "", "parameters of the policy: name=value,...",
               [o](absl::string_view text) { return ParseParameters(text, &o->policy.parameters); });
  flags.String("headwater_calibration", &o->headwater_calibration,
               "thresholds of policy headwater: a file of python -m headwater.calibrate");
  flags.String("share_clusters", &o->share_clusters,
               "clusters of policy share: a file of python -m headwater.cluster");
  DeclareQuality(&flags, o);
  flags.Bool(
      "measure_recall", &o->measure_recall,
      "measure recall without a quality, too, as a worker does by default: on a GPU, from 32768 tokens on");
  flags.Choice("sink", &o->sink, {"none", "verify", "memory"},
               "none: KV blocks are dropped once they are off the device; verify: they go over loopback to a "
               "receiver that checks each; memory: and keeps them in --kv_dir, whose pages are there before "
               "a run begins");
  flags.String("kv_dir", &o->kv_dir, "empty or new directory for --sink=memory; a tmpfs is fine");
  flags.Int("kv_channels", &o->kv_channels, 1, 64, "connections to that receiver");
  flags.Int("chunk_tokens", &o->chunk_tokens, 128, kMostChunk,
            "tokens that a linear layer takes at once on a GPU; a multiple of 128");
  flags.Int("threads", &o->threads, 0, 4096, "threads of a CPU; 0: all cores");
  flags.Int("warm_up", &o->warm_up, 0, 100, "runs of each length that do not count");
  flags.Int("repeat", &o->repeat, 1, 1000, "timed runs of each length; the median counts");
  DeclareRate(&flags, "attention_tflops", &o->attention_tflops,
              "rate of dense attention that the floor takes, such as cuDNN's on this device; without it the "
              "floor is of linear layers only");
  flags.Bool("json", &o->json, "write one JSON object for each length in place of the table");
  flags.String("output", &o->output, "file that the JSON objects are appended to, too");
  flags.String("commit", &o->commit, "commit that the JSON objects name");
  return flags;
}

absl::Status CheckPrompts(const FlagSet& flags, const PrefillBenchOptions& o) {
  if (o.prompts.empty()) return absl::OkStatus();
  if (flags.IsSet("tokens")) {
    return absl::InvalidArgumentError(
        absl::StrCat("--prompts=", o.prompts, " and --tokens: give one of them"));
  }
  if (!o.model.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--prompts=", o.prompts, ": random weights have no vocabulary; --model=DIR is wanted"));
}

absl::Status CheckQuality(const FlagSet& flags, const PrefillBenchOptions& o) {
  const char* first = nullptr;
  for (const char* const bound : kBounds) {
    if (!flags.IsSet(bound)) continue;
    if (first != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("--", first, " and --", bound, ": give one of them"));
    }
    first = bound;
  }
  if (first == nullptr) return absl::OkStatus();
  if (o.policy.name != "headwater") {
    return absl::InvalidArgumentError(
        absl::StrCat("--", first, " with --policy=", o.policy.name, "; only headwater keeps a quality"));
  }
  if (o.gpu != PrefillBenchOptions::kCpu) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--", first, " with --device=cpu; a quality needs a GPU"));
}

absl::Status CheckMeasureRecall(const PrefillBenchOptions& o) {
  if (!o.measure_recall || o.gpu != PrefillBenchOptions::kCpu) return absl::OkStatus();
  return absl::InvalidArgumentError("--measure_recall with --device=cpu; recall is measured on a GPU");
}

// Of what the others would say of their own rows there is nothing.
absl::Status CheckEmulate(PrefillBenchOptions* options) {
  const PrefillBenchOptions& o = *options;
  if (!o.emulate) return absl::OkStatus();
  // Rows are to name it.
  if (o.link_gbytes_per_s == 0) options->link_gbytes_per_s = DefaultLinkRates(true).link_bytes_per_s / 1e9;
  const char* why = nullptr;
  if (o.gpus == 1) why = "one GPU has no others; --gpus=2 or more is wanted";
  if (o.quality.any()) why = "a quality depends on all ranks' recall";
  if (o.measure_recall) why = "recall is of all ranks";
  if (why == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--emulate: ", why));
}

absl::Status Check(const FlagSet& flags, PrefillBenchOptions* o) {
  if (!flags.positional().empty()) {
    return absl::InvalidArgumentError(absl::StrCat("'", flags.positional()[0], "' is not a flag"));
  }
  HW_RETURN_IF_ERROR(ParseDevice(o->device, &o->gpu));
  if (!o->model.empty() && flags.IsSet("preset")) {
    return absl::InvalidArgumentError(
        absl::StrCat("--preset=", o->preset, " and --model=", o->model, ": give one of them"));
  }
  const bool on_gpu = o->gpu != PrefillBenchOptions::kCpu;
  if (!on_gpu && o->model.empty()) {
    return absl::InvalidArgumentError(
        "--device=cpu: random weights are made on a GPU; a CPU needs --model=DIR");
  }
  HW_RETURN_IF_ERROR(CheckEmulate(o));
  if (!on_gpu && o->gpus > 1) {
    return absl::InvalidArgumentError(absl::StrCat("--gpus=", o->gpus, " with --device=cpu"));
  }
  if ((o->sink == "memory") == o->kv_dir.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--sink=", o->sink, " and --kv_dir=", o->kv_dir,
                                                   ": memory, and it alone, has a directory"));
  }
  for (const char* const flag : {"partition", "strategy", "checkpoint_layers"}) {
    if (!flags.IsSet(flag) || o->gpus > 1) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--", flag, ": one device has all tokens; --gpus=2 or more is wanted"));
  }
  if (!on_gpu && o->linear == "fp8") {
    return absl::InvalidArgumentError("--linear=fp8: a CPU computes in bf16 or f32");
  }
  if (on_gpu && o->linear == "f32") {
    return absl::InvalidArgumentError("--linear=f32: a GPU computes in bf16 or fp8");
  }
  if (o->chunk_tokens % 128 != 0) {
    return Bad("chunk_tokens", absl::StrCat(o->chunk_tokens), "a multiple of 128");
  }
  if (o->policy.density > 0 && o->policy.parameters.count("density") > 0) {
    return absl::InvalidArgumentError("--density and --policy_parameters with density: give one of them");
  }
  HW_RETURN_IF_ERROR(CheckPrompts(flags, *o));
  HW_RETURN_IF_ERROR(CheckQuality(flags, *o));
  HW_RETURN_IF_ERROR(CheckMeasureRecall(*o));
  return MakeBenchPolicy(o->policy).status();
}

}  // namespace

int64_t PrefillBenchOptions::longest() const { return *std::max_element(tokens.begin(), tokens.end()); }

std::string PrefillBenchOptions::model_name() const {
  if (model.empty()) return preset;
  const std::vector<std::string> parts = absl::StrSplit(model, '/', absl::SkipEmpty());
  return parts.empty() ? model : parts.back();
}

absl::Status ParseDevice(const std::string& text, int* gpu) {
  absl::string_view rest = text;
  *gpu = PrefillBenchOptions::kCpu;
  if (text == "cpu") return absl::OkStatus();
  if (absl::ConsumePrefix(&rest, "cuda:") && absl::SimpleAtoi(rest, gpu) && *gpu >= 0) {
    return absl::OkStatus();
  }
  return Bad("device", text, "cpu or cuda:N");
}

absl::Status ParseParameters(absl::string_view text, std::map<std::string, double>* parameters) {
  parameters->clear();
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::pair<absl::string_view, absl::string_view> pair =
        absl::StrSplit(part, absl::MaxSplits('=', 1));
    double value = 0;
    if (pair.first.empty() || !absl::SimpleAtod(pair.second, &value)) {
      return absl::InvalidArgumentError(absl::StrCat("'", part, "' is not a name and a number, name=value"));
    }
    if (!parameters->emplace(pair.first, value).second) {
      return absl::InvalidArgumentError(absl::StrCat("'", pair.first, "' is there twice"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int64_t>> ParseLengths(absl::string_view text) {
  std::vector<int64_t> lengths;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::vector<absl::string_view> ends = absl::StrSplit(part, absl::MaxSplits("..", 1));
    HW_ASSIGN_OR_RETURN(const int64_t first, ParseLength(ends.front()));
    HW_ASSIGN_OR_RETURN(const int64_t last, ParseLength(ends.back()));
    if (last < first) {
      return absl::InvalidArgumentError(absl::StrCat("'", part, "' ends before it begins"));
    }
    for (int64_t length = first; length <= last; length *= 2) lengths.push_back(length);
    if (lengths.back() != last) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", part, "' doubles ", first, " and does not come to ", last));
    }
  }
  return lengths;
}

absl::Status ParsePrefillBenchOptions(absl::Span<const std::string> arguments, PrefillBenchOptions* options,
                                      std::string* help) {
  FlagSet flags = Declare(options);
  HW_RETURN_IF_ERROR(flags.Parse(arguments));
  if (flags.help_requested()) {
    *help = flags.Help();
    return absl::OkStatus();
  }
  return Check(flags, options);
}

}  // namespace headwater
