#include "base/clock.h"

#include <chrono>

#include "base/steady_waits.h"

namespace headwater {
namespace {

class MonotonicClock final : public Clock {
 public:
  absl::Time Now() const override {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return absl::UnixEpoch() + absl::FromChrono(since);
  }
};

}  // namespace

const Clock* Clock::Real() {
  LinkSteadyWaits();
  static const MonotonicClock* const clock = new MonotonicClock();
  return clock;
}

}  // namespace headwater
