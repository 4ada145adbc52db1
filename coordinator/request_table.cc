#include "coordinator/request_table.h"

#include "base/log.h"

namespace headwater {

const RequestTable::Record* RequestTable::Find(const JobKey& key) const {
  const auto it = records_.find(key);
  return it == records_.end() ? nullptr : &it->second;
}

void RequestTable::Start(const JobKey& key, const std::string& content_hash, uint64_t serial) {
  const bool inserted =
      records_.insert({key, Record{content_hash, serial, nullptr, false, next_generation_++}}).second;
  HW_CHECK(inserted);
}

void RequestTable::End(const JobKey& key, std::shared_ptr<const v1::PrefillResponse> terminal,
                       bool restartable, absl::Time now) {
  const auto it = records_.find(key);
  HW_CHECK(it != records_.end() && it->second.terminal == nullptr);
  it->second.serial = 0;
  it->second.terminal = std::move(terminal);
  it->second.restartable = restartable;
  ended_.push_back({now, key, it->second.generation});
  while (ended_.size() > max_ended_) PopOldest();
}

void RequestTable::Forget(const JobKey& key) { records_.erase(key); }

void RequestTable::Expire(absl::Time now) {
  while (!ended_.empty() && now - ended_.front().at > retention_) PopOldest();
}

void RequestTable::PopOldest() {
  const auto it = records_.find(ended_.front().key);
  if (it != records_.end() && it->second.generation == ended_.front().generation) records_.erase(it);
  ended_.pop_front();
}

}  // namespace headwater
