// The last requests that ended and the last workers that were lost, for the live page.
#ifndef HW_COORDINATOR_HISTORY_H_
#define HW_COORDINATOR_HISTORY_H_

#include <cstdint>
#include <deque>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "coordinator/job.h"
#include "coordinator/snapshot.h"
#include "headwater/v1/prefill.pb.h"

namespace headwater {

// Bounded, whatever comes. Not thread-safe.
class History {
 public:
  explicit History(absl::Time start) : start_(start) {}

  // An accepted job, before it is destroyed.
  void AddEnded(const Job& job, const v1::PrefillResponse& terminal, const absl::Status& status,
                absl::Time now);
  void AddLostWorker(const std::string& id, const absl::Status& why, absl::Time now);

  // Sets what it knows: the totals but for retries, `ended` and `lost_workers`.
  void Fill(absl::Time now, Snapshot* out) const;

 private:
  struct Ended {
    absl::Time at;
    EndedView view;
  };
  struct Lost {
    absl::Time at;
    LostWorkerView view;
  };

  const absl::Time start_;
  uint64_t completed_ = 0, failed_ = 0, tokens_ = 0;
  std::deque<Ended> ended_;  // the newest first
  std::deque<Lost> lost_;
};

// Without its `waited` and `time_left`.
RequestView ViewOf(const Job& job);

}  // namespace headwater

#endif  // HW_COORDINATOR_HISTORY_H_
