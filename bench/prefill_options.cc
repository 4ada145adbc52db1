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

namespace headwater {
namespace {

constexpr char kUsage[] =
    "headwater bench prefill [flags]\n\n"
    "Times whole prefills on one device, a shape with random weights or a checkpoint, and shows each prompt\n"
    "length beside its floor: the matrix products of its linear layers alone on this device, in this\n"
    "process, and attention's FLOP at --attention_tflops.";
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
  flags.String("device", &o->device, "what computes: cuda:N for GPU N, or cpu (with --model)");
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
  flags.Choice("sink", &o->sink, {"none", "verify"},
               "none: KV blocks are dropped once they are off the device; verify: they go over loopback to a "
               "receiver that checks each");
  flags.Int("kv_channels", &o->kv_channels, 1, 64, "connections to that receiver");
  flags.Int("chunk_tokens", &o->chunk_tokens, 128, kMostChunk,
            "tokens that a linear layer takes at once on a GPU; a multiple of 128");
  flags.Int("threads", &o->threads, 0, 4096, "threads of a CPU; 0: all cores");
  flags.Int("warm_up", &o->warm_up, 0, 100, "runs of each length that do not count");
  flags.Int("repeat", &o->repeat, 1, 1000, "timed runs of each length; the median counts");
  flags.Custom("attention_tflops", "",
               "rate of dense attention that the floor takes, such as cuDNN's on this device; without it the "
               "floor is of linear layers only",
               [o](absl::string_view text) {
                 double& rate = o->attention_tflops;
                 return absl::SimpleAtod(text, &rate) && rate > 0 && rate < 1e6
                            ? absl::OkStatus()
                            : absl::InvalidArgumentError(
                                  absl::StrCat("'", text, "' is not a number over 0, under 1000000"));
               });
  flags.Bool("json", &o->json, "write one JSON object for each length in place of the table");
  flags.String("output", &o->output, "file that the JSON objects are appended to, too");
  flags.String("commit", &o->commit, "commit that the JSON objects name");
  return flags;
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
  if (!on_gpu && o->linear == "fp8") {
    return absl::InvalidArgumentError("--linear=fp8: a CPU computes in bf16 or f32");
  }
  if (on_gpu && o->linear == "f32") {
    return absl::InvalidArgumentError("--linear=f32: a GPU computes in bf16 or fp8");
  }
  if (o->chunk_tokens % 128 != 0) {
    return Bad("chunk_tokens", absl::StrCat(o->chunk_tokens), "a multiple of 128");
  }
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
