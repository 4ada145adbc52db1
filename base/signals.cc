#include "base/signals.h"

#include <algorithm>
#include <cerrno>
#include <thread>

#include <signal.h>
#include <unistd.h>

#include "base/clock.h"

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
  const absl::Time end = Clock::Real()->Now() + timeout;
  for (;;) {
    const absl::Duration left = std::max(absl::ZeroDuration(), end - Clock::Real()->Now());
    const timespec limit = absl::ToTimespec(left);
    const int signal_number = sigtimedwait(&set, nullptr, &limit);
    if (signal_number > 0) return signal_number;
    // A stopped and continued process, or one that a tracer looks at, is interrupted without a signal of
    // ours.
    if (errno != EINTR) return 0;
  }
}

void ExitOnSignalOrAfter(absl::Duration limit, int exit_code, bool forgive_sigterm) {
  std::thread([limit, exit_code, forgive_sigterm] {
    const absl::Time end = Clock::Real()->Now() + limit;
    const int first = WaitForTerminationSignal(limit);
    if (forgive_sigterm && first == SIGTERM) WaitForTerminationSignal(end - Clock::Real()->Now());
    _exit(exit_code);
  }).detach();
}

}  // namespace headwater
