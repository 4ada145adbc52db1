// Timelines of requests: when each waited, computed, exchanged and sent. Kept while a request runs and,
// within a bound of memory, after its end. Used by the scheduler's thread alone.
#ifndef HW_COORDINATOR_TRACE_H_
#define HW_COORDINATOR_TRACE_H_

#include <cstddef>
#include <cstdint>
#include <list>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"

#include "coordinator/job.h"
#include "headwater/v1/admin.pb.h"

namespace headwater {

// Microseconds from `arrived` to `at`; at least 1, because 0 stands for never.
uint64_t TraceMicros(absl::Time arrived, absl::Time at);

// Keeps a rank's report: its layers below the model's number, in order, at most one of each.
void AddRankTimeline(const Job& job, uint32_t rank, const v1::RankTrace& reported, absl::Time now,
                     v1::EpochTrace* epoch);

// What is known of a job now.
v1::RequestTrace MakeRequestTrace(const Job& job);

// The traces of requests that ended last.
class TraceStore {
 public:
  // Of serialized traces. 0: keeps none.
  explicit TraceStore(uint64_t max_bytes) : max_bytes_(max_bytes) {}

  // Takes the place of an earlier one of the key. The oldest go where there is no room; one that is larger
  // than all the room is not kept.
  void Put(const JobKey& key, v1::RequestTrace trace);
  // Null: none. Valid until the next Put().
  const v1::RequestTrace* Find(const JobKey& key) const;
  uint64_t bytes() const { return bytes_; }
  size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    JobKey key;
    v1::RequestTrace trace;
    uint64_t bytes = 0;
  };
  void Erase(std::list<Entry>::iterator it);

  const uint64_t max_bytes_;
  uint64_t bytes_ = 0;
  std::list<Entry> entries_;  // the oldest first
  absl::flat_hash_map<JobKey, std::list<Entry>::iterator> index_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_TRACE_H_
