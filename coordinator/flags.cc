#include "coordinator/flags.h"

#include <cstdint>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "coordinator/validation.h"

ABSL_FLAG(std::string, listen, "127.0.0.1:7070", "Address of the gRPC services; port 0 takes a free one.");
ABSL_FLAG(std::string, metrics, "127.0.0.1:9070", "Address of /metrics; empty: none.");
ABSL_FLAG(std::string, log_format, "text", "Log lines as text or json.");
ABSL_FLAG(uint64_t, max_prompt_tokens, uint64_t{1} << 22, "Longest prompt, whatever the model allows.");
ABSL_FLAG(uint64_t, max_queue_requests, 1024, "Requests that may wait; more are refused.");
ABSL_FLAG(uint64_t, max_queue_tokens, uint64_t{1} << 24, "Prompt tokens that may wait; more are refused.");
ABSL_FLAG(absl::Duration, max_queue_wait, absl::Minutes(10), "Longest wait for free workers.");
ABSL_FLAG(absl::Duration, worker_wait, absl::Seconds(30),
          "Longest wait for workers that are not registered.");
ABSL_FLAG(absl::Duration, reserve_wait, absl::Seconds(10),
          "How long idle workers wait for busy ones to join them on a long prompt.");
ABSL_FLAG(absl::Duration, decode_grace, absl::Seconds(30), "How long a decode node may be away.");
ABSL_FLAG(uint32_t, max_epochs, 4, "Tries of a prompt whose workers are lost.");
ABSL_FLAG(uint64_t, context_parallel_min_tokens, 2048, "Shorter prompts run on one worker.");
ABSL_FLAG(absl::Duration, drain_timeout, absl::Seconds(45), "Time for accepted requests after SIGTERM.");

namespace headwater {
namespace {

// Above it, sizes of caches would not fit 64 bits, and requests would not fit a message.
constexpr uint64_t kMostPromptTokens = uint64_t{1} << 24;
constexpr uint64_t kMostQueue = uint64_t{1} << 40;

absl::Status Wrong(absl::string_view flag, const std::string& value, const std::string& limit) {
  return absl::InvalidArgumentError(absl::StrCat("--", flag, " is ", value, "; ", limit, " is wanted"));
}

absl::Status CheckCount(absl::string_view flag, uint64_t value, uint64_t most) {
  if (value >= 1 && value <= most) return absl::OkStatus();
  return Wrong(flag, absl::StrCat(value), absl::StrCat("1 to ", most));
}

absl::Status CheckWait(absl::string_view flag, absl::Duration value) {
  if (value >= absl::ZeroDuration() && value <= absl::Hours(24 * 30)) return absl::OkStatus();
  return Wrong(flag, absl::FormatDuration(value), "0 to 30 days");
}

absl::Status Check(const CoordinatorFlags& flags) {
  const CoordinatorOptions& options = flags.options;
  if (flags.listen.rfind(':') == std::string::npos) {
    return Wrong("listen", absl::StrCat("\"", Printable(flags.listen), "\""), "host:port");
  }
  HW_RETURN_IF_ERROR(CheckCount("max_prompt_tokens", options.max_prompt_tokens, kMostPromptTokens));
  HW_RETURN_IF_ERROR(CheckCount("max_queue_requests", options.max_queue_requests, kMostQueue));
  HW_RETURN_IF_ERROR(CheckCount("max_queue_tokens", options.max_queue_tokens, kMostQueue));
  HW_RETURN_IF_ERROR(CheckCount("max_epochs", options.max_epochs, 1000));
  HW_RETURN_IF_ERROR(
      CheckCount("context_parallel_min_tokens", options.context_parallel_min_tokens, kMostQueue));
  HW_RETURN_IF_ERROR(CheckWait("max_queue_wait", options.max_queue_wait));
  HW_RETURN_IF_ERROR(CheckWait("worker_wait", options.worker_wait));
  HW_RETURN_IF_ERROR(CheckWait("reserve_wait", options.reserve_wait));
  HW_RETURN_IF_ERROR(CheckWait("decode_grace", options.decode_grace));
  return CheckWait("drain_timeout", flags.drain_timeout);
}

}  // namespace

absl::StatusOr<CoordinatorFlags> ParseCoordinatorFlags(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "The front door of a Headwater cluster: takes prompts, plans and watches them.");
  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  if (rest.size() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("argument \"", Printable(rest[1]), "\" is not a flag; none is wanted"));
  }
  CoordinatorFlags flags;
  flags.listen = absl::GetFlag(FLAGS_listen);
  flags.metrics = absl::GetFlag(FLAGS_metrics);
  const std::string log_format = absl::GetFlag(FLAGS_log_format);
  if (!ParseLogFormat(log_format, &flags.log_format)) {
    return Wrong("log_format", absl::StrCat("\"", Printable(log_format), "\""), "text or json");
  }
  flags.drain_timeout = absl::GetFlag(FLAGS_drain_timeout);
  CoordinatorOptions& options = flags.options;
  options.max_prompt_tokens = absl::GetFlag(FLAGS_max_prompt_tokens);
  options.max_queue_requests = absl::GetFlag(FLAGS_max_queue_requests);
  options.max_queue_tokens = absl::GetFlag(FLAGS_max_queue_tokens);
  options.max_queue_wait = absl::GetFlag(FLAGS_max_queue_wait);
  options.worker_wait = absl::GetFlag(FLAGS_worker_wait);
  options.reserve_wait = absl::GetFlag(FLAGS_reserve_wait);
  options.decode_grace = absl::GetFlag(FLAGS_decode_grace);
  options.max_epochs = absl::GetFlag(FLAGS_max_epochs);
  options.context_parallel_min_tokens = absl::GetFlag(FLAGS_context_parallel_min_tokens);
  HW_RETURN_IF_ERROR(Check(flags));
  return flags;
}

}  // namespace headwater
