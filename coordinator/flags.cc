#include "coordinator/flags.h"

#include <cstdint>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

#include "base/config/config.h"
#include "base/flags.h"
#include "base/rpc/transport_flags.h"
#include "base/status_macros.h"
#include "coordinator/validation.h"
#include "headwater/v1/config.pb.h"

namespace headwater {
namespace {

// Above it, sizes of caches would not fit 64 bits, and requests would not fit a message.
constexpr int64_t kMostPromptTokens = int64_t{1} << 24;
constexpr int64_t kMostQueue = int64_t{1} << 40;
constexpr int64_t kMostEpochs = 1000;
constexpr absl::Duration kLongestWait = absl::Hours(24 * 30);
// Of one process.
constexpr absl::string_view kOwnFlags[] = {"listen", "metrics", "health", "page"};

// A whole number from 1 to `most`.
template <typename T>
void Count(FlagSet* set, absl::string_view name, T* value, int64_t most, absl::string_view help) {
  const auto take = [value, most](absl::string_view text) {
    int64_t number = 0;
    if (!absl::SimpleAtoi(text, &number) || number < 1 || number > most) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", Printable(text), "' is not a whole number from 1 to ", most));
    }
    *value = static_cast<T>(number);
    return absl::OkStatus();
  };
  set->Custom(name, absl::StrCat(*value), help, take, FlagKind::kInt);
}

void Wait(FlagSet* set, absl::string_view name, absl::Duration* value, absl::string_view help) {
  set->Duration(name, value, absl::ZeroDuration(), kLongestWait, help);
}

}  // namespace

absl::Status ParseCoordinatorFlags(absl::Span<const std::string> arguments, CoordinatorFlags* flags,
                                   std::string* help) {
  CoordinatorOptions& o = flags->options;
  std::string log_format = "text";
  FlagSet set(
      "headwater-coordinator [flags] | --version\n\nThe front door of a Headwater cluster: takes prompts, "
      "plans and "
      "watches them.");
  set.String("listen", &flags->listen, "HOST:PORT of the gRPC services; port 0 takes a free one");
  set.String("metrics", &flags->metrics, "ADDRESS:PORT of /metrics, by HTTP in plaintext; empty: none");
  DeclareHealth(&flags->health, &set);
  set.String(
      "page", &flags->page,
      "ADDRESS:PORT of the live page, plain HTTP for whoever reaches it: a private address; empty: none");
  DeclareServerTransport(&flags->transport, &set);
  set.Choice("log_format", &log_format, {"text", "json"}, "how log lines are written");
  Count(&set, "max_prompt_tokens", &o.max_prompt_tokens, kMostPromptTokens,
        "longest prompt, whatever the model allows");
  Count(&set, "max_queue_requests", &o.max_queue_requests, kMostQueue,
        "requests that may wait; more are refused");
  Count(&set, "max_queue_tokens", &o.max_queue_tokens, kMostQueue,
        "prompt tokens that may wait; more are refused");
  Wait(&set, "max_queue_wait", &o.max_queue_wait, "longest wait for free workers");
  Wait(&set, "worker_wait", &o.worker_wait, "longest wait for workers that are not registered");
  Wait(&set, "reserve_wait", &o.reserve_wait,
       "how long idle workers wait for busy ones to join them on a long prompt");
  Wait(&set, "decode_grace", &o.decode_grace, "how long a decode node may be away");
  set.Custom("decode_cidrs", "",
             "ranges of addresses that decode nodes may register with, as 10.0.0.0/8,fd00::/8, and no names; "
             "empty: any",
             [&o](absl::string_view text) {
               HW_ASSIGN_OR_RETURN(o.decode_ranges, ParseAddressRanges(text));
               return absl::OkStatus();
             });
  Count(&set, "max_epochs", &o.max_epochs, kMostEpochs, "tries of a prompt whose workers are lost");
  Count(&set, "context_parallel_min_tokens", &o.context_parallel_min_tokens, kMostQueue,
        "shorter prompts run on one worker");
  set.Bytes("trace_memory", &o.trace_memory, "64MiB",
            "for the timelines of ended requests ('headwater trace'); 0: none are kept");
  Wait(&set, "drain_timeout", &flags->drain_timeout, "time for accepted requests after SIGTERM");
  Config config(v1::CoordinatorConfig::default_instance(), kOwnFlags, &set);
  HW_RETURN_IF_ERROR(config.Read(arguments, ProcessEnvironment()));
  if (set.help_requested()) {
    *help = set.Help();
    return absl::OkStatus();
  }
  if (!set.positional().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("argument '", Printable(set.positional()[0]), "' is not a flag; none is wanted"));
  }
  if (flags->listen.rfind(':') == std::string::npos) {
    return set.Refuse("listen", absl::StrCat("'", Printable(flags->listen), "' is not HOST:PORT"));
  }
  HW_CHECK(ParseLogFormat(log_format, &flags->log_format));
  flags->config = config.Summary();
  if (config.print_requested()) *help = config.Print();
  return absl::OkStatus();
}

}  // namespace headwater
