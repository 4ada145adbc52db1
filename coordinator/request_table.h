// Idempotency: which request ids are known, running or ended.
#ifndef HW_COORDINATOR_REQUEST_TABLE_H_
#define HW_COORDINATOR_REQUEST_TABLE_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"

#include "coordinator/job.h"
#include "headwater/v1/prefill.pb.h"

namespace headwater {

// Running ids are kept until they end; ended ones for `retention`, at most `max_ended` of them, the oldest
// forgotten first. Not thread-safe.
class RequestTable {
 public:
  struct Record {
    std::string content_hash;
    // Of the running job; 0: ended.
    uint64_t serial = 0;
    // Null while it runs.
    std::shared_ptr<const v1::PrefillResponse> terminal;
    // It failed in a way that another try may not: the same request again starts anew.
    bool restartable = false;
    // Tells records of one key apart.
    uint64_t generation = 0;
  };

  RequestTable(absl::Duration retention, size_t max_ended) : retention_(retention), max_ended_(max_ended) {}

  // Null: unknown. Valid until the next call of another member.
  const Record* Find(const JobKey& key) const;
  // Requires that the key is unknown.
  void Start(const JobKey& key, const std::string& content_hash, uint64_t serial);
  // Requires that the key is running.
  void End(const JobKey& key, std::shared_ptr<const v1::PrefillResponse> terminal, bool restartable,
           absl::Time now);
  void Forget(const JobKey& key);
  // Forgets what ended more than the retention ago.
  void Expire(absl::Time now);

  size_t size() const { return records_.size(); }

 private:
  struct Ended {
    absl::Time at;
    JobKey key;
    uint64_t generation = 0;
  };

  void PopOldest();

  const absl::Duration retention_;
  const size_t max_ended_;
  uint64_t next_generation_ = 1;
  absl::flat_hash_map<JobKey, Record> records_;
  std::deque<Ended> ended_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_REQUEST_TABLE_H_
