// The only caller of the system's clocks: code takes a Clock so that tests can hold time still.
#ifndef HW_BASE_CLOCK_H_
#define HW_BASE_CLOCK_H_

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace headwater {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;

  // Monotonic: unaffected by steps of the wall clock. Only differences mean anything.
  virtual absl::Time Now() const = 0;

  // The process-wide monotonic clock; never destroyed.
  static const Clock* Real();
};

// Clock::Real()->Now(): for deadlines and durations.
inline absl::Time SteadyNow() { return Clock::Real()->Now(); }

// Steps with the wall clock: for what people read, and for certificates.
inline absl::Time WallNow() { return absl::Now(); }

}  // namespace headwater

#endif  // HW_BASE_CLOCK_H_
