// Waiting for a KV sender's acknowledgements.
#ifndef HW_TESTS_WORKER_ACKED_H_
#define HW_TESTS_WORKER_ACKED_H_

#include <cstdint>

#include "absl/time/clock.h"
#include <gtest/gtest.h>

#include "kvtransfer/sender.h"

namespace headwater::testing {

// Until all that was submitted below `layer` is acknowledged; fails the test after 20 s.
inline void WaitAckedBelow(const KvSender* sender, uint32_t layer) {
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (!sender->AckedBelow(layer).has_value()) {
    ASSERT_LT(absl::Now(), deadline) << "blocks below layer " << layer << " are not acknowledged";
    absl::SleepFor(absl::Milliseconds(1));
  }
}

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_ACKED_H_
