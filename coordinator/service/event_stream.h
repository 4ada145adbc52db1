// The stream of events that answers one client call, between the scheduler's thread and gRPC's.
#ifndef HW_COORDINATOR_SERVICE_EVENT_STREAM_H_
#define HW_COORDINATOR_SERVICE_EVENT_STREAM_H_

#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/base/thread_annotations.h"
#include <grpcpp/support/server_callback.h>

#include "coordinator/event_queue.h"
#include "headwater/v1/prefill.pb.h"

namespace headwater {

inline void FillResponse(const EventQueue::Entry& entry, v1::PrefillResponse* out) { *out = *entry.event; }
inline void FillResponse(const EventQueue::Entry& entry, v1::WatchPrefillResponse* out) {
  *out->mutable_response() = *entry.event;
}
inline void FillResponse(const EventQueue::Entry& entry, v1::BatchPrefillResponse* out) {
  out->set_item(entry.item);
  *out->mutable_response() = *entry.event;
}

// Writes one event at a time; those that wait are in an EventQueue, which bounds them. Owns itself from
// Start() until gRPC is done with it; watchers hold it too, and may push into a stream that has ended.
template <typename Response>
class EventStream final : public grpc::ServerWriteReactor<Response>,
                          public std::enable_shared_from_this<EventStream<Response>> {
 public:
  // `on_done` runs once, on a thread of gRPC, when the call is over for whatever reason.
  void Start(std::function<void()> on_done) {
    on_done_ = std::move(on_done);
    self_ = this->shared_from_this();
  }

  void Push(uint32_t item, std::shared_ptr<const v1::PrefillResponse> event) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ending_) return;
    queue_.Push(item, std::move(event));
    Pump();
  }

  // The call ends with `status` once all events are written. The first call counts.
  void End(const grpc::Status& status) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ending_) return;
    ending_ = true;
    status_ = status;
    Pump();
  }

 private:
  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    if (!ok) Abandon();
    Pump();
  }

  void OnCancel() override {
    std::lock_guard<std::mutex> lock(mutex_);
    Abandon();
    Pump();
  }

  void OnDone() override {
    // Both may hold the last reference to this object.
    const auto on_done = std::exchange(on_done_, nullptr);
    const auto self = std::exchange(self_, nullptr);
    on_done();
  }

  void Abandon() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    queue_.Clear();
    if (!ending_) status_ = grpc::Status(grpc::StatusCode::CANCELLED, "the call was cancelled");
    ending_ = true;
  }

  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_) return;
    if (auto entry = queue_.Pop()) {
      writing_ = true;
      FillResponse(*entry, &response_);
      this->StartWrite(&response_);
    } else if (ending_) {
      finished_ = true;
      this->Finish(status_);
    }
  }

  std::function<void()> on_done_;
  std::shared_ptr<EventStream> self_;
  std::mutex mutex_;
  EventQueue queue_ ABSL_GUARDED_BY(mutex_);
  Response response_ ABSL_GUARDED_BY(mutex_);
  grpc::Status status_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SERVICE_EVENT_STREAM_H_
