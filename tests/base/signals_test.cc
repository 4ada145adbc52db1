#include "base/signals.h"

#include <thread>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <pthread.h>
#include <signal.h>

namespace headwater {
namespace {

void Ignore(int) {}

TEST(SignalsTest, AnInterruptedWaitGoesOnToItsEnd) {
  BlockTerminationSignals();
  signal(SIGUSR1, Ignore);
  const pthread_t waiter = pthread_self();
  std::thread interrupter([waiter] {
    for (int i = 0; i < 5; ++i) {
      absl::SleepFor(absl::Milliseconds(20));
      pthread_kill(waiter, SIGUSR1);
    }
  });

  const absl::Time start = absl::Now();
  const int signal_number = WaitForTerminationSignal(absl::Milliseconds(300));
  const absl::Duration waited = absl::Now() - start;
  interrupter.join();

  EXPECT_EQ(signal_number, 0);
  EXPECT_GE(waited, absl::Milliseconds(295));
}

TEST(SignalsTest, ATerminationSignalEndsTheWait) {
  BlockTerminationSignals();
  raise(SIGTERM);

  EXPECT_EQ(WaitForTerminationSignal(absl::Seconds(10)), SIGTERM);
}

}  // namespace
}  // namespace headwater
