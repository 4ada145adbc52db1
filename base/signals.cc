#include "base/signals.h"

#include <thread>

#include <signal.h>
#include <unistd.h>

namespace headwater {
namespace {

sigset_t TerminationSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

}  // namespace

void BlockTerminationSignals() {
  const sigset_t set = TerminationSignals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

int WaitForTerminationSignal(absl::Duration timeout) {
  const sigset_t set = TerminationSignals();
  const timespec limit = absl::ToTimespec(timeout);
  const int signal_number = sigtimedwait(&set, nullptr, &limit);
  return signal_number > 0 ? signal_number : 0;
}

void ExitOnSignalOrAfter(absl::Duration limit, int exit_code) {
  std::thread([limit, exit_code] {
    WaitForTerminationSignal(limit);
    _exit(exit_code);
  }).detach();
}

}  // namespace headwater
