// The events of one client call that its connection has not taken yet.
#ifndef HW_COORDINATOR_EVENT_QUEUE_H_
#define HW_COORDINATOR_EVENT_QUEUE_H_

#include <cstdint>
#include <list>
#include <memory>
#include <optional>

#include "absl/container/flat_hash_map.h"

#include "headwater/v1/prefill.pb.h"

namespace headwater {

// Bounded by what it holds: of each item at most one progress event (a newer one takes the place of the
// older, keeping an announced plan) beside its accepted and its terminal event, which are never dropped.
// A slow client thus costs at most three events per item. Not thread-safe.
class EventQueue {
 public:
  struct Entry {
    uint32_t item = 0;
    std::shared_ptr<const v1::PrefillResponse> event;
  };

  void Push(uint32_t item, std::shared_ptr<const v1::PrefillResponse> event);
  // In order of arrival; nullopt: empty.
  std::optional<Entry> Pop();
  void Clear();
  size_t size() const { return entries_.size(); }

 private:
  std::list<Entry> entries_;
  absl::flat_hash_map<uint32_t, std::list<Entry>::iterator> progress_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_EVENT_QUEUE_H_
