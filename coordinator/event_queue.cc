#include "coordinator/event_queue.h"

#include <utility>

namespace headwater {

void EventQueue::Push(uint32_t item, std::shared_ptr<const v1::PrefillResponse> event) {
  if (!event->has_progress()) {
    entries_.push_back({item, std::move(event)});
    return;
  }
  const auto it = progress_.find(item);
  if (it == progress_.end()) {
    entries_.push_back({item, std::move(event)});
    progress_[item] = std::prev(entries_.end());
    return;
  }
  Entry& waiting = *it->second;
  if (waiting.event->progress().has_plan() && !event->progress().has_plan()) {
    auto merged = std::make_shared<v1::PrefillResponse>(*event);
    *merged->mutable_progress()->mutable_plan() = waiting.event->progress().plan();
    event = std::move(merged);
  }
  waiting.event = std::move(event);
}

std::optional<EventQueue::Entry> EventQueue::Pop() {
  if (entries_.empty()) return std::nullopt;
  Entry entry = std::move(entries_.front());
  if (entry.event->has_progress()) progress_.erase(entry.item);
  entries_.pop_front();
  return entry;
}

void EventQueue::Clear() {
  entries_.clear();
  progress_.clear();
}

}  // namespace headwater
