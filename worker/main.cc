// headwater-worker: one rank of context-parallel prefill.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include <signal.h>

#include "base/config/config.h"
#include "base/log.h"
#include "base/signals.h"
#include "base/version.h"
#include "worker/cpu_backend.h"
#ifdef HW_WITH_CUDA
#include "worker/cuda/cuda_backend.h"
#endif
#include "worker/options.h"
#include "worker/worker.h"

namespace headwater {
namespace {

constexpr int kExitUsage = 2;
// The drain ended before the prefill did (EX_TEMPFAIL).
constexpr int kExitCut = 75;
constexpr absl::Duration kShutdownLimit = absl::Seconds(4);
// How soon a request of the coordinator is noticed.
constexpr absl::Duration kDrainPoll = absl::Milliseconds(50);

int Fail(const absl::Status& status) {
  const std::string message = absl::StrCat("headwater-worker: ", status.message(), "\n");
  std::fputs(message.c_str(), stderr);
  return kExitUsage;
}

absl::StatusOr<std::unique_ptr<PrefillBackend>> MakeBackend(const WorkerOptions& options) {
  if (options.device == "cpu") return CpuBackend::Load(options);
#ifdef HW_WITH_CUDA
  return CudaBackend::Load(options);
#else
  return absl::UnimplementedError(
      absl::StrCat("--device=", options.device, ": this build has no code for GPUs (HW_CUDA was off)"));
#endif
}

int Main(int argc, char** argv) {
  BlockTerminationSignals();
  WorkerOptions options;
  std::string help;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 1 && arguments[0] == "--version") {
    std::fputs(VersionText("headwater-worker").c_str(), stdout);
    return 0;
  }
  if (const absl::Status status = ParseWorkerOptions(arguments, &options, &help); !status.ok()) {
    return Fail(status);
  }
  if (!help.empty()) {
    std::fputs(help.c_str(), stdout);
    return 0;
  }
  LogFormat format = LogFormat::kText;
  HW_CHECK(ParseLogFormat(options.log_format, &format));
  InitLogging(format, LogSeverity::kINFO, "worker");
  LogConfig(options.config);

  auto worker = Worker::Start(options, MakeBackend);
  if (!worker.ok()) return Fail(worker.status());
  int signal_number = 0;
  bool asked = false;
  while (signal_number == 0 && !asked) {
    signal_number = WaitForTerminationSignal(kDrainPoll);
    asked = (*worker)->drain_requested();
  }
  int exit_code = 0;
  if (signal_number != SIGINT) {
    HW_LOG(INFO).Field("asked_by", signal_number == SIGTERM ? "signal" : "coordinator")
        << "draining, at most " << absl::FormatDuration(options.drain_timeout);
    // A second signal ends the process, and so does a drain that outlives its own limit.
    ExitOnSignalOrAfter(options.drain_timeout + kShutdownLimit, kExitCut, signal_number == 0);
    if (!(*worker)->Drain(options.drain_timeout)) {
      HW_LOG(WARNING) << "a prefill was still running when the drain timeout ended";
      exit_code = kExitCut;
    }
  } else {
    ExitOnSignalOrAfter(kShutdownLimit, kExitCut);
  }
  *worker = nullptr;
  HW_LOG(INFO) << "stopped";
  return exit_code;
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) { return headwater::Main(argc, argv); }
