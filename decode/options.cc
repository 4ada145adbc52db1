#include "decode/options.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include <sys/statvfs.h>

#include "base/config/config.h"
#include "base/flags.h"
#include "base/rpc/transport_flags.h"
#include "base/status_macros.h"
#include "headwater/v1/config.pb.h"

namespace headwater {
namespace {

constexpr size_t kMaxNameLength = 64;
// Of one process.
constexpr absl::string_view kOwnFlags[] = {"decode_node", "listen", "advertise", "advertise_kv",
                                           "metrics",     "health", "kv_dir"};

bool IsName(absl::string_view text) {
  return !text.empty() && text.size() <= kMaxNameLength && std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
}

absl::Status CheckName(const FlagSet& flags, absl::string_view flag, const std::string& value) {
  if (IsName(value)) return absl::OkStatus();
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

bool IsWildcard(const std::string& address) {
  return absl::StartsWith(address, "0.0.0.0:") || absl::StartsWith(address, "[::]:");
}

void Declare(DecodeOptions* o, FlagSet* flags) {
  constexpr int64_t kMostThreads = 4096;
  constexpr int64_t kMostGenerations = 65536;
  flags->String("model", &o->model,
                "checkpoint directory (Hugging Face: config.json, safetensors); required");
  flags->String("coordinator", &o->coordinator, "HOST:PORT of the coordinator");
  DeclareHealth(&o->health, flags);
  DeclareServerTransport(&o->transport, flags);
  flags->String("decode_node", &o->decode_node, "this node's name; requests ask for it by that name");
  flags->String("pool", &o->pool, "pool that this node belongs to");
  flags->String("listen", &o->listen, "HOST:PORT to serve on; port 0 takes a free one");
  flags->String("advertise", &o->advertise,
                "HOST:PORT under which clients reach this node; empty: the one it listens on");
  flags->String("advertise_kv", &o->advertise_kv,
                "HOST:PORT under which workers reach this node; empty: as --advertise");
  flags->String("metrics", &o->metrics, "ADDRESS:PORT of /metrics, by HTTP in plaintext; empty: none");
  flags->Choice("compute", &o->compute, {"auto", "f32", "bf16"},
                "type of the linear layers; auto: bf16 where this CPU multiplies it, else f32");
  flags->Int("threads", &o->threads, 0, kMostThreads, "threads that compute; 0: all CPUs of the process");
  flags->Choice(
      "sink", &o->sink, {"memory", "verify"},
      "memory: keep caches, to generate from. verify: check every block and the digest, then drop it; "
      "caches may have any size, an acknowledged block is one that was checked, nothing survives this "
      "process, Generate is refused. Such a node needs a --pool of its own: it seems to have most room");
  flags->String(
      "kv_dir", &o->kv_dir,
      "directory of the KV caches, one process at a time; empty: headwater-kv-NODE in $TMPDIR or /tmp; "
      "--sink=verify has none");
  flags->Bytes(
      "kv_budget", &o->kv_budget_bytes, "",
      "bytes of KV caches to hold, generated tokens included (an eighth is theirs); default: a quarter of "
      "the free memory or of the space in --kv_dir, whichever is less. With --sink=verify: bytes of "
      "checksums, 8 a block and 16 KiB a cache; default: 1 GiB");
  flags->Duration("kv_lease", &o->kv_lease, absl::Seconds(1), absl::Hours(24 * 7),
                  "an unused cache is freed after this long");
  flags->Int("max_generations", &o->max_generations, 1, kMostGenerations,
             "Generate calls at a time; more are refused");
  flags->Choice("log_format", &o->log_format, {"text", "json"}, "form of the log lines");
  flags->Duration("drain_timeout", &o->drain_timeout, absl::ZeroDuration(), absl::Hours(24),
                  "time that running generations get after SIGTERM");
}

}  // namespace

absl::Status ParseDecodeOptions(absl::Span<const std::string> arguments, DecodeOptions* options,
                                std::string* help) {
  FlagSet flags("headwater-decode --model=DIR [flags] | --version");
  Declare(options, &flags);
  Config config(v1::DecodeConfig::default_instance(), kOwnFlags, &flags);
  HW_RETURN_IF_ERROR(config.Read(arguments, ProcessEnvironment()));
  if (flags.help_requested()) {
    *help = flags.Help();
    return absl::OkStatus();
  }
  if (!flags.positional().empty()) {
    return absl::InvalidArgumentError(absl::StrCat("unexpected argument '", flags.positional()[0], "'"));
  }
  if (options->model.empty()) {
    return flags.Refuse("model", "the directory of a Hugging Face checkpoint is required");
  }
  if (flags.IsSet("kv_budget") && options->kv_budget_bytes == 0) {
    return flags.Refuse("kv_budget", "'0' is not a positive number of bytes");
  }
  HW_RETURN_IF_ERROR(CheckName(flags, "decode_node", options->decode_node));
  HW_RETURN_IF_ERROR(CheckName(flags, "pool", options->pool));
  HW_RETURN_IF_ERROR(CheckAddress(flags, "coordinator", options->coordinator));
  HW_RETURN_IF_ERROR(CheckAddress(flags, "listen", options->listen));
  if (!options->advertise.empty()) HW_RETURN_IF_ERROR(CheckAddress(flags, "advertise", options->advertise));
  if (!options->advertise_kv.empty())
    HW_RETURN_IF_ERROR(CheckAddress(flags, "advertise_kv", options->advertise_kv));
  if (!options->metrics.empty()) HW_RETURN_IF_ERROR(CheckAddress(flags, "metrics", options->metrics));
  if (IsWildcard(options->listen) && options->advertise.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--advertise is required where --listen is ",
                                                   options->listen, ": others cannot dial that address"));
  }
  if (options->kv_dir.empty()) {
    const char* const temporary = std::getenv("TMPDIR");
    options->kv_dir = absl::StrCat(temporary != nullptr && *temporary != '\0' ? temporary : "/tmp",
                                   "/headwater-kv-", options->decode_node);
  }
  options->config = config.Summary();
  if (config.print_requested()) *help = config.Print();
  return absl::OkStatus();
}

absl::Status DefaultKvBudget(const std::string& directory, uint64_t* bytes) {
  uint64_t memory_kib = 0;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string name; meminfo >> name;) {
    if (name == "MemAvailable:") {
      meminfo >> memory_kib;
      break;
    }
  }
  if (memory_kib == 0) {
    return absl::UnavailableError("/proc/meminfo does not tell the available memory; pass --kv_budget");
  }
  struct statvfs disk {};
  // The directory is made later; its file system is the nearest existing parent's.
  for (std::string path = directory; statvfs(path.c_str(), &disk) != 0;) {
    const size_t slash = path.find_last_of('/');
    if (errno != ENOENT || path == "/" || path == ".") {
      return absl::NotFoundError(
          absl::StrCat("--kv_dir ", directory, ": free space of ", path, ": ", std::strerror(errno)));
    }
    path = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  }
  const uint64_t disk_bytes = static_cast<uint64_t>(disk.f_bavail) * disk.f_frsize;
  *bytes = std::min(memory_kib * 1024, disk_bytes) / 4;
  return absl::OkStatus();
}

}  // namespace headwater
