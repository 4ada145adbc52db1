// headwater-coordinator: the front door of a cluster.
//
// Exit codes: 0 every accepted request had ended; 75 requests were cut; 2 a flag is out of range or an
// address cannot be bound; 1 an unknown flag.
#include <memory>

#include <signal.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/signals.h"
#include "coordinator/coordinator_server.h"
#include "coordinator/flags.h"

namespace headwater {
namespace {

constexpr int kExitCut = 75;
constexpr int kExitUsage = 2;

// Waits until accepted requests have ended, the time is up, or another signal comes (`hurry`).
void Drain(CoordinatorServer* server, absl::Duration timeout, bool* hurry) {
  const absl::Time end = Clock::Real()->Now() + timeout;
  server->BeginDrain();
  while (server->NumJobs() > 0) {
    if (Clock::Real()->Now() >= end) return;
    *hurry = WaitForTerminationSignal(absl::Milliseconds(100)) != 0;
    if (*hurry) return;
  }
}

int Run(int argc, char** argv) {
  BlockTerminationSignals();
  auto flags = ParseCoordinatorFlags(argc, argv);
  if (!flags.ok()) {
    HW_LOG(ERROR) << flags.status().message();
    return kExitUsage;
  }
  InitLogging(flags->log_format, LogSeverity::kINFO, "coordinator");
  auto server = CoordinatorServer::Start(flags->options, flags->listen, flags->metrics);
  if (!server.ok()) {
    HW_LOG(ERROR) << server.status().message();
    return kExitUsage;
  }
  HW_LOG(INFO).Field("address", (*server)->address()).Field("metrics", flags->metrics) << "serving";

  int signal_number = 0;
  while (signal_number == 0) signal_number = WaitForTerminationSignal(absl::Hours(1));
  bool hurry = signal_number == SIGINT;
  if (!hurry) {
    HW_LOG(INFO).Field("timeout", absl::FormatDuration(flags->drain_timeout)) << "draining";
    Drain(server->get(), flags->drain_timeout, &hurry);
  }
  // From here on the end is bounded, whatever the peers do.
  ExitOnSignalOrAfter(hurry ? absl::Seconds(4.5) : absl::Seconds(20), kExitCut);
  const size_t cut = (*server)->Stop(hurry ? absl::Seconds(2) : flags->options.abort_wait);
  server->reset();
  HW_LOG(INFO).Field("cut", static_cast<int64_t>(cut)) << "ended";
  return cut == 0 ? 0 : kExitCut;
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) { return headwater::Run(argc, argv); }
