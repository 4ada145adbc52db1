// headwater-decode: the reference decode node.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include <signal.h>
#include <unistd.h>

#include "base/config/config.h"
#include "base/log.h"
#include "base/signals.h"
#include "base/version.h"
#include "decode/node.h"
#include "decode/options.h"

namespace headwater {
namespace {

constexpr int kExitUsage = 2;
// The drain ended before the generations did, or the shutdown met its limit (EX_TEMPFAIL).
constexpr int kExitCut = 75;
constexpr absl::Duration kShutdownLimit = absl::Seconds(5);

int Fail(const absl::Status& status) {
  const std::string message = absl::StrCat("headwater-decode: ", status.message(), "\n");
  std::fputs(message.c_str(), stderr);
  return kExitUsage;
}

int Main(int argc, char** argv) {
  BlockTerminationSignals();
  DecodeOptions options;
  std::string help;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 1 && arguments[0] == "--version") {
    std::fputs(VersionText("headwater-decode").c_str(), stdout);
    return 0;
  }
  if (const absl::Status status = ParseDecodeOptions(arguments, &options, &help); !status.ok()) {
    return Fail(status);
  }
  if (!help.empty()) {
    std::fputs(help.c_str(), stdout);
    return 0;
  }
  LogFormat format = LogFormat::kText;
  HW_CHECK(ParseLogFormat(options.log_format, &format));
  InitLogging(format, LogSeverity::kINFO, "decode");
  LogConfig(options.config);

  auto node = DecodeNode::Start(options);
  if (!node.ok()) return Fail(node.status());
  int signal_number = 0;
  while (signal_number == 0) signal_number = WaitForTerminationSignal(absl::Hours(1));
  int exit_code = 0;
  if (signal_number == SIGTERM) {
    HW_LOG(INFO) << "draining, at most " << absl::FormatDuration(options.drain_timeout);
    // A second signal, or a drain that outlives its own limit, ends the process.
    ExitOnSignalOrAfter(options.drain_timeout + kShutdownLimit, kExitCut);
    if (!(*node)->Drain(options.drain_timeout)) {
      HW_LOG(WARNING) << "generations were still running when the drain timeout ended";
      exit_code = kExitCut;
    }
  } else {
    ExitOnSignalOrAfter(kShutdownLimit, kExitCut);
  }
  *node = nullptr;
  HW_LOG(INFO) << "stopped";
  return exit_code;
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) { return headwater::Main(argc, argv); }
