#include "worker/options.h"

#include <algorithm>
#include <filesystem>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include <sched.h>
#include <unistd.h>

#include "base/config/config.h"
#include "base/flags.h"
#include "base/rpc/transport_flags.h"
#include "base/status_macros.h"
#include "headwater/v1/config.pb.h"

namespace headwater {
namespace {

constexpr size_t kMaxNameLength = 64;
// Of one process.
constexpr absl::string_view kOwnFlags[] = {"worker_id", "listen", "advertise", "collective_host",
                                           "metrics",   "health", "device"};

absl::Status CheckName(const FlagSet& flags, absl::string_view flag, const std::string& value) {
  const bool ok =
      !value.empty() && value.size() <= kMaxNameLength && std::all_of(value.begin(), value.end(), [](char c) {
        return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
      });
  if (ok) return absl::OkStatus();
  return flags.Refuse(flag, absl::StrCat("'", value, "' is not 1 to 64 characters of [A-Za-z0-9._-]"));
}

absl::Status CheckAddress(const FlagSet& flags, absl::string_view flag, const std::string& value) {
  const size_t colon = value.rfind(':');
  uint32_t port = 0;
  if (colon != std::string::npos && colon > 0 &&
      absl::SimpleAtoi(absl::string_view(value).substr(colon + 1), &port) && port <= 65535) {
    return absl::OkStatus();
  }
  return flags.Refuse(flag, absl::StrCat("'", value, "' is not HOST:PORT"));
}

// Host names may hold characters that a name may not.
std::string DefaultWorkerId() {
  char host[256] = "worker";
  if (gethostname(host, sizeof(host) - 1) != 0) host[0] = 'w';
  std::string id = std::string(host).substr(0, kMaxNameLength - 12);
  for (char& c : id) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_') c = '-';
  }
  return absl::StrCat(id, "-", getpid());
}

// The directory's last part, with what a name may not hold replaced.
std::string DefaultModelName(const std::string& directory) {
  std::string path = directory;
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  std::string name = path.substr(path.rfind('/') + 1).substr(0, kMaxNameLength);
  for (char& c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_') c = '-';
  }
  return name.empty() ? "model" : name;
}

int64_t UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

absl::Status CheckDevice(const FlagSet& flags, const std::string& device) {
  if (device == "cpu") return absl::OkStatus();
  int32_t number = -1;
  absl::string_view rest = device;
  if (absl::ConsumePrefix(&rest, "cuda:") && absl::SimpleAtoi(rest, &number) && number >= 0)
    return absl::OkStatus();
  return flags.Refuse("device", absl::StrCat("'", device, "' is not cpu or cuda:N"));
}

// From 0 to 1e6.
void GigabytesPerSecond(absl::string_view name, double* value, absl::string_view help, FlagSet* flags) {
  constexpr double kMost = 1e6;
  const auto take = [value](absl::string_view text) {
    double rate = 0;
    if (!absl::SimpleAtod(text, &rate) || !(rate >= 0 && rate <= kMost)) {
      return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a number from 0 to ", kMost));
    }
    *value = rate;
    return absl::OkStatus();
  };
  flags->Custom(name, "0", help, take, FlagKind::kReal);
}

void Declare(WorkerOptions* o, FlagSet* flags) {
  constexpr int64_t kMostThreads = 4096;
  const absl::Duration most = absl::Hours(24);
  flags->String("model", &o->model,
                "checkpoint directory (Hugging Face: config.json, safetensors); required");
  flags->String("model_name", &o->model_name, "name that requests ask for; empty: the last part of --model");
  flags->String("coordinator", &o->coordinator, "HOST:PORT of the coordinator");
  DeclareHealth(&o->health, flags);
  DeclareServerTransport(&o->transport, flags);
  flags->String("worker_id", &o->worker_id, "this worker's name; empty: host name and process id");
  flags->String("listen", &o->listen, "HOST:PORT to serve health and rendezvous on; port 0 takes a free one");
  flags->String("advertise", &o->advertise,
                "HOST:PORT under which other workers reach this one; empty: the one it listens on");
  flags->String("collective_host", &o->collective_host,
                "address that this worker's connections to other workers bind to; empty: --advertise's host");
  flags->String("metrics", &o->metrics, "ADDRESS:PORT of /metrics, by HTTP in plaintext; empty: none");
  flags->String("device", &o->device, "what computes: cpu, or cuda:N for GPU N");
  flags->Choice(
      "compute", &o->compute, {"auto", "f32", "bf16"},
      "type of linear layers and attention; auto: bf16 where the CPU has it, else f32; a GPU: bf16");
  flags->Choice(
      "linear", &o->linear, {"bf16", "fp8"},
      "operands of a GPU's linear layers; fp8: twice the rate, half the memory of weights, KV a few "
      "per cent off");
  flags->Int("threads", &o->threads, 0, kMostThreads, "compute threads; 0: all cores");
  flags->Bytes("memory_budget", &o->memory_budget_bytes, "80 % of the free memory; of a GPU's 90 %",
               "memory for weights and prefills together, e.g. 16GiB");
  flags->Int("kv_channels", &o->kv_channels, 0, 64,
             "connections to a decode node for each prompt that is not packed; 0: 2, on a GPU 8");
  flags->Int("egress_buffers", &o->egress_buffers, 1, 64,
             "layers whose KV may wait for its acknowledgement, on the CPU; a GPU has a ring of 256 MiB");
  flags->Int("checkpoint_layers", &o->checkpoint_layers, 0, 1024,
             "a group keeps what goes into every so many layers, on two ranks each, so that a prompt goes on "
             "there when one is lost; fewer than egress_buffers: a slow decode node may leave the ranks "
             "without a common one; 0: never, it starts anew");
  flags->Int(
      "max_gpus", &o->max_gpus, 1, 64,
      "most GPUs, this one among them, that may share a prompt; prompts under the policies a_shape and "
      "vertical_slash are not shared");
  flags->Bool("measure_rates", &o->measure_rates,
              "measure at the start how fast this worker computes, for the planner's cost model, which takes "
              "a second or so; off: it plans as if nothing were known");
  GigabytesPerSecond(
      "link_gbytes_per_s", &o->link_gbytes_per_s,
      "what this worker gets from others of a group, in 1e9 bytes a second, for the cost model; "
      "0: 1 on a CPU, 100 on a GPU, and what its groups measure from then on",
      flags);
  GigabytesPerSecond("egress_gbytes_per_s", &o->egress_gbytes_per_s,
                     "what this worker sends to a decode node, likewise; 0: 0.75 on a CPU, 7.2 on a GPU, and "
                     "what its streams carry from then on",
                     flags);
  flags->Duration("collective_timeout", &o->collective_timeout, absl::Milliseconds(100), most,
                  "how long a peer may stay away, besides the time that a slow machine needs");
  flags->Duration("kv_stall_timeout", &o->kv_stall_timeout, absl::Milliseconds(100), most,
                  "how long a decode node may acknowledge nothing");
  flags->Duration("drain_timeout", &o->drain_timeout, absl::ZeroDuration(), most,
                  "how long SIGTERM waits for the running prefill");
  flags->String("default_policy", &o->default_policy,
                "policy of requests that name none; empty: headwater on a GPU, dense on a CPU");
  flags->String("share_clusters", &o->share_clusters,
                "cluster file of `python -m headwater.cluster`, for policy share on a GPU; empty: none");
  flags->String("headwater_calibration", &o->headwater_calibration,
                "calibration file for policy headwater on a GPU: a threshold for each layer and KV head; "
                "empty: none");
  flags->Bool(
      "measure_recall", &o->measure_recall,
      "measure recall on sampled queries of prompts from 32768 tokens on, on a GPU, where it takes at "
      "most 2 % of attention's time");
  flags->Choice("log_format", &o->log_format, {"text", "json"}, "log lines as text or JSON");
}

}  // namespace

absl::Status ParseWorkerOptions(absl::Span<const std::string> arguments, WorkerOptions* options,
                                std::string* help) {
  FlagSet flags("headwater-worker --model=DIR [flags] | --version");
  Declare(options, &flags);
  Config config(v1::WorkerConfig::default_instance(), kOwnFlags, &flags);
  HW_RETURN_IF_ERROR(config.Read(arguments, ProcessEnvironment()));
  if (flags.help_requested()) {
    *help = flags.Help();
    return absl::OkStatus();
  }
  if (!flags.positional().empty()) {
    return absl::InvalidArgumentError(absl::StrCat("'", flags.positional()[0], "' is not a flag"));
  }
  if (options->model.empty()) return flags.Refuse("model", "a checkpoint directory is required");
  if (options->worker_id.empty()) options->worker_id = DefaultWorkerId();
  if (options->model_name.empty()) options->model_name = DefaultModelName(options->model);
  if (options->threads == 0) options->threads = UsableCores();
  if (options->kv_channels == 0) options->kv_channels = options->device == "cpu" ? 2 : 8;
  HW_RETURN_IF_ERROR(CheckName(flags, "worker_id", options->worker_id));
  HW_RETURN_IF_ERROR(CheckName(flags, "model_name", options->model_name));
  HW_RETURN_IF_ERROR(CheckAddress(flags, "coordinator", options->coordinator));
  HW_RETURN_IF_ERROR(CheckAddress(flags, "listen", options->listen));
  if (!options->advertise.empty()) HW_RETURN_IF_ERROR(CheckAddress(flags, "advertise", options->advertise));
  if (!options->metrics.empty()) HW_RETURN_IF_ERROR(CheckAddress(flags, "metrics", options->metrics));
  HW_RETURN_IF_ERROR(CheckDevice(flags, options->device));
  if (options->device == "cpu" && options->linear != "bf16") {
    return flags.Refuse(
        "linear", absl::StrCat("'", options->linear, "': only a GPU has it; --device=cpu goes by --compute"));
  }
  options->config = config.Summary();
  if (config.print_requested()) *help = config.Print();
  return absl::OkStatus();
}

}  // namespace headwater
