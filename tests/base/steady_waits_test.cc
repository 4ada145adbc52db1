#include "base/steady_waits.h"

#include <thread>
#include <vector>

#include "absl/base/config.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include <dlfcn.h>
#include <gtest/gtest.h>

#include "base/clock.h"

namespace headwater {
namespace {

#define HW_TEXT(x) #x
#define HW_TEXT_OF(x) HW_TEXT(x)

TEST(SteadyWaitsTest, AbseilSleepsOnOurSemaphore) {
  const absl::Time now = SteadyNow();
  ASSERT_GT(now, absl::UnixEpoch());
#if ABSL_LTS_RELEASE_VERSION < 20230802
  // Found first, and so by Abseil's own calls: this program's, not the library's.
  Dl_info info = {};
  void* const found = dlsym(RTLD_DEFAULT, HW_TEXT_OF(ABSL_INTERNAL_C_SYMBOL(AbslInternalPerThreadSemWait)));
  ASSERT_NE(found, nullptr);
  ASSERT_NE(dladdr(found, &info), 0);
  Dl_info own = {};
  ASSERT_NE(dladdr(reinterpret_cast<void*>(&LinkSteadyWaits), &own), 0);
  EXPECT_STREQ(info.dli_fname, own.dli_fname);
#endif
}

TEST(SteadyWaitsTest, AWaitTakesAsLongAsItsLimit) {
  absl::Mutex mutex;
  absl::CondVar changed;
  absl::MutexLock lock(&mutex);
  const absl::Time begin = SteadyNow();

  EXPECT_TRUE(changed.WaitWithTimeout(&mutex, absl::Milliseconds(80)));

  EXPECT_GE(SteadyNow() - begin, absl::Milliseconds(79));
  EXPECT_LT(SteadyNow() - begin, absl::Seconds(20));
}

TEST(SteadyWaitsTest, LimitsInThePastAndTheFarFutureAreLimits) {
  absl::Mutex mutex;
  absl::CondVar changed;
  absl::MutexLock lock(&mutex);

  EXPECT_TRUE(changed.WaitWithTimeout(&mutex, -absl::Hours(1)));
  EXPECT_TRUE(changed.WaitWithDeadline(&mutex, absl::InfinitePast()));
  std::thread waker([&] {
    absl::MutexLock inner(&mutex);
    changed.Signal();
  });
  EXPECT_FALSE(changed.WaitWithDeadline(&mutex, absl::FromUnixSeconds(int64_t{1} << 40)));
  waker.join();
}

// Posts and timeouts race: no wakeup is lost, and none comes twice.
TEST(SteadyWaitsTest, ManyThreadsPassATokenAround) {
  constexpr int kThreads = 6, kRounds = 400;
  absl::Mutex mutex;
  int turn = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round) {
        absl::MutexLock lock(&mutex);
        const auto mine = [&] { return turn % kThreads == t; };
        for (int tries = 0; !mine(); ++tries) {
          ASSERT_LT(tries, 100'000);
          mutex.AwaitWithTimeout(absl::Condition(&mine), absl::Microseconds(50 + tries));
        }
        ++turn;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(turn, kThreads * kRounds);
}

}  // namespace
}  // namespace headwater
