// A Clock that moves only when the test says so.
#ifndef HW_TESTS_SUPPORT_FAKE_CLOCK_H_
#define HW_TESTS_SUPPORT_FAKE_CLOCK_H_

#include <mutex>

#include "absl/time/time.h"

#include "base/clock.h"

namespace headwater {

// Thread-safe.
class FakeClock final : public Clock {
 public:
  absl::Time Now() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return now_;
  }
  void Advance(absl::Duration by) {
    std::lock_guard<std::mutex> lock(mutex_);
    now_ += by;
  }

 private:
  mutable std::mutex mutex_;
  absl::Time now_ = absl::FromUnixSeconds(1'000'000);
};

}  // namespace headwater

#endif  // HW_TESTS_SUPPORT_FAKE_CLOCK_H_
