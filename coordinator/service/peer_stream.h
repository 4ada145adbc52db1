// One registration stream between gRPC's threads and the scheduler's; WorkerControlAdapter and
// DecodeRegistryAdapter say what its messages mean.
#ifndef HW_COORDINATOR_SERVICE_PEER_STREAM_H_
#define HW_COORDINATOR_SERVICE_PEER_STREAM_H_

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include <grpcpp/alarm.h>
#include <grpcpp/support/server_callback.h>

#include "base/rpc/grpc_status.h"
#include "coordinator/registration.h"
#include "coordinator/scheduler_loop.h"

namespace headwater {

// Owns itself from Start() until gRPC is done with it; the scheduler may hold it longer.
template <typename Request, typename Response>
class PeerStream : public grpc::ServerBidiReactor<Request, Response>,
                   public std::enable_shared_from_this<PeerStream<Request, Response>> {
 public:
  PeerStream(grpc::CallbackServerContext* context, SchedulerLoop* loop) : loop_(loop), context_(context) {}

  void Start() {
    self_ = this->shared_from_this();
    std::weak_ptr<PeerStream> weak = self_;
    alarm_.Set(std::chrono::system_clock::now() + std::chrono::seconds(10), [weak](bool expired) {
      const auto stream = weak.lock();
      if (expired && stream != nullptr) {
        stream->CloseStream(absl::DeadlineExceededError("no registration came within 10 s"));
      }
    });
    this->StartRead(&request_);
  }

  // Queues a message; false: the stream has ended or kMaxOutbox messages wait already. Thread-safe.
  bool SendMessage(Response message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_ || outbox_.size() >= kMaxOutbox) return false;
    outbox_.push_back(std::move(message));
    Pump();
    return true;
  }

  // Ends the stream; what has not been written is dropped. Thread-safe, idempotent.
  void CloseStream(const absl::Status& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) return;
    closing_ = true;
    status_ = ToGrpcStatus(why);
    outbox_.clear();
    // A peer that does not read would hold up the write that is under way.
    if (writing_) context_->TryCancel();
    Pump();
  }

 protected:
  // On the scheduler's thread, one message at a time.
  virtual void OnMessage(const Request& request) = 0;
  // On the scheduler's thread, once, after the last message.
  virtual void OnClosed() = 0;

  // The peer has registered: it may be silent now.
  void DisarmRegistrationAlarm() { alarm_.Cancel(); }

 private:
  // Of each job that a worker holds there may be the assignment and its abort; a worker holds two passes at
  // most.
  static constexpr size_t kMaxOutbox = 64 + 2 * 2 * kMaxPackedPrompts;

  void OnReadDone(bool ok) final {
    const auto self = this->shared_from_this();
    if (!ok) {
      CloseStream(absl::OkStatus());
      return;
    }
    loop_->Post([self] {
      self->OnMessage(self->request_);
      std::lock_guard<std::mutex> lock(self->mutex_);
      if (!self->closing_) self->StartRead(&self->request_);
    });
  }

  void OnWriteDone(bool ok) final {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    if (!ok) closing_ = true;
    Pump();
  }

  void OnCancel() final { CloseStream(absl::CancelledError("the stream was cancelled")); }

  void OnDone() final {
    alarm_.Cancel();
    const auto self = std::exchange(self_, nullptr);
    loop_->Post([self] { self->OnClosed(); });
  }

  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_) return;
    if (closing_) {
      finished_ = true;
      this->Finish(status_);
    } else if (!outbox_.empty()) {
      writing_ = true;
      response_ = std::move(outbox_.front());
      outbox_.pop_front();
      this->StartWrite(&response_);
    }
  }

  SchedulerLoop* const loop_;
  grpc::CallbackServerContext* const context_;
  std::shared_ptr<PeerStream> self_;
  grpc::Alarm alarm_;
  Request request_;
  std::mutex mutex_;
  std::deque<Response> outbox_ ABSL_GUARDED_BY(mutex_);
  Response response_ ABSL_GUARDED_BY(mutex_);
  grpc::Status status_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SERVICE_PEER_STREAM_H_
