#include "base/steady_waits.h"

#include <atomic>
#include <cstdint>
#include <ctime>
#include <new>

#include "absl/base/config.h"

namespace headwater {

void LinkSteadyWaits() {}

}  // namespace headwater

#if ABSL_LTS_RELEASE_VERSION < 20230802

#include "absl/synchronization/internal/create_thread_identity.h"
#include "absl/synchronization/internal/kernel_timeout.h"
#include "absl/synchronization/internal/per_thread_sem.h"
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

using absl::base_internal::ThreadIdentity;
using absl::synchronization_internal::KernelTimeout;

constexpr int64_t kSecond = 1'000'000'000;

int64_t Nanos(const timespec& time) { return int64_t{time.tv_sec} * kSecond + time.tv_nsec; }

int64_t Now(clockid_t clock) {
  timespec now = {};
  clock_gettime(clock, &now);
  return Nanos(now);
}

// The thread's count of posts. Abseil has made its own there, a zero of the same size, and no longer looks at
// it but to wake this thread for nothing, which is harmless.
std::atomic<int32_t>* CountOf(ThreadIdentity* identity) {
  static_assert(sizeof(std::atomic<int32_t>) <= sizeof(identity->waiter_state.data));
  return std::launder(reinterpret_cast<std::atomic<int32_t>*>(identity->waiter_state.data));
}

// Sleeps while the count is 0, at most for `limit`; null: without limit. May return for no reason.
void Sleep(std::atomic<int32_t>* count, const timespec* limit) {
  syscall(SYS_futex, count, FUTEX_WAIT_PRIVATE, 0, limit, nullptr, 0);
}

}  // namespace

extern "C" {

// Abseil declares both as weak symbols for programs to replace.
__attribute__((visibility("default"))) void ABSL_INTERNAL_C_SYMBOL(AbslInternalPerThreadSemPost)(
    ThreadIdentity* identity) {
  std::atomic<int32_t>* const count = CountOf(identity);
  if (count->fetch_add(1, std::memory_order_release) == 0) {
    syscall(SYS_futex, count, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  }
}

// The timeout is a point of the wall clock: it becomes a duration here, as soon as it is known.
__attribute__((visibility("default"))) bool ABSL_INTERNAL_C_SYMBOL(AbslInternalPerThreadSemWait)(
    KernelTimeout timeout) {
  const bool limited = timeout.has_timeout();
  int64_t end = 0;
  if (limited) {
    end = Now(CLOCK_MONOTONIC) + (Nanos(timeout.MakeAbsTimespec()) - Now(CLOCK_REALTIME));
  }
  std::atomic<int32_t>* const count =
      CountOf(absl::synchronization_internal::GetOrCreateCurrentThreadIdentity());
  while (true) {
    int32_t posts = count->load(std::memory_order_relaxed);
    while (posts > 0) {
      if (count->compare_exchange_weak(posts, posts - 1, std::memory_order_acquire)) return true;
    }
    if (!limited) {
      Sleep(count, nullptr);
      continue;
    }
    const int64_t left = end - Now(CLOCK_MONOTONIC);
    if (left <= 0) return false;
    // The system counts a relative limit by its monotonic clock.
    const timespec limit = {static_cast<time_t>(left / kSecond), static_cast<long>(left % kSecond)};
    Sleep(count, &limit);
  }
}

}  // extern "C"

#endif  // ABSL_LTS_RELEASE_VERSION
