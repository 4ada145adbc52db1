// headwater-coordinator: the front door of a cluster.
//
// Exit codes: 0 every accepted request had ended; 75 requests were cut; 2 a flag is unknown or out of range,
// or an address cannot be bound.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include <signal.h>

#include "base/clock.h"
#include "base/config/config.h"
#include "base/log.h"
#include "base/signals.h"
#include "base/version.h"
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

int Fail(const absl::Status& status) {
  const std::string message = absl::StrCat("headwater-coordinator: ", status.message(), "\n");
  std::fputs(message.c_str(), stderr);
  return kExitUsage;
}

int Run(int argc, char** argv) {
  BlockTerminationSignals();
  CoordinatorFlags flags;
  std::string help;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 1 && arguments[0] == "--version") {
    std::fputs(VersionText("headwater-coordinator").c_str(), stdout);
    return 0;
  }
  if (const absl::Status status = ParseCoordinatorFlags(arguments, &flags, &help); !status.ok()) {
    return Fail(status);
  }
  if (!help.empty()) {
    std::fputs(help.c_str(), stdout);
    return 0;
  }
  InitLogging(flags.log_format, LogSeverity::kINFO, "coordinator");
  LogConfig(flags.config);
  const auto transport = Transport::Create(flags.transport, Role::kCoordinator);
  if (!transport.ok()) return Fail(transport.status());
  LogTransport(transport->get(), flags.listen);
  auto server = CoordinatorServer::Start(flags.options, {flags.listen, flags.metrics, flags.health,
                                                         *transport, flags.page, flags.config.sha256});
  if (!server.ok()) return Fail(server.status());
  HW_LOG(INFO)
          .Field("address", (*server)->address())
          .Field("metrics", flags.metrics)
          .Field("page", (*server)->page_address())
      << "serving";

  int signal_number = 0;
  while (signal_number == 0) signal_number = WaitForTerminationSignal(absl::Hours(1));
  bool hurry = signal_number == SIGINT;
  if (!hurry) {
    HW_LOG(INFO).Field("timeout", absl::FormatDuration(flags.drain_timeout)) << "draining";
    Drain(server->get(), flags.drain_timeout, &hurry);
  }
  // From here on the end is bounded, whatever the peers do.
  ExitOnSignalOrAfter(hurry ? absl::Seconds(4.5) : absl::Seconds(20), kExitCut);
  const size_t cut = (*server)->Stop(hurry ? absl::Seconds(2) : flags.options.abort_wait);
  server->reset();
  HW_LOG(INFO).Field("cut", static_cast<int64_t>(cut)) << "ended";
  return cut == 0 ? 0 : kExitCut;
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) { return headwater::Run(argc, argv); }
