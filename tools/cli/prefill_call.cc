#include "tools/cli/prefill_call.h"

#include <condition_variable>
#include <mutex>

#include "absl/strings/str_cat.h"
#include <grpcpp/client_context.h>

#include "base/rpc/grpc_status.h"
#include "base/trace_context.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tools/cli/command.h"

namespace headwater {
namespace {

constexpr absl::Duration kCancelLimit = absl::Seconds(10);
// Time allowed over the request's own deadline for its last event to arrive.
constexpr absl::Duration kDeadlineGrace = absl::Seconds(30);

// Sends CancelPrefill without waiting; its destructor waits for the answer, which has a deadline.
class CancelCall {
 public:
  CancelCall(v1::PrefillService::Stub* stub, const v1::PrefillRequest& request, grpc::ClientContext* prefill)
      : stub_(stub), prefill_(prefill) {
    request_.set_request_id(request.request_id());
    request_.set_tenant(request.tenant());
  }
  ~CancelCall() {
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait(lock, [this] { return !under_way_; });
  }

  void OnInterrupt(int count) {
    if (count > 1) return prefill_->TryCancel();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      under_way_ = true;
    }
    SetDeadline(kCancelLimit, &context_);
    stub_->async()->CancelPrefill(&context_, &request_, &response_, [this](const grpc::Status&) {
      // Whatever the answer, nothing is left to wait for.
      prefill_->TryCancel();
      const std::lock_guard<std::mutex> lock(mutex_);
      under_way_ = false;
      ended_.notify_all();
    });
  }

 private:
  v1::PrefillService::Stub* const stub_;
  grpc::ClientContext* const prefill_;
  grpc::ClientContext context_;
  v1::CancelPrefillRequest request_;
  v1::CancelPrefillResponse response_;
  std::mutex mutex_;
  std::condition_variable ended_;
  bool under_way_ = false;  // guarded by mutex_
};

}  // namespace

absl::Status FailureOf(const v1::PrefillFailed& failed) {
  const absl::Status status = FromRpcStatus(failed.error());
  return status.ok() ? absl::UnknownError("the request failed with an error whose code is OK") : status;
}

absl::StatusOr<v1::PrefillCompleted> CallPrefill(
    const std::shared_ptr<grpc::Channel>& channel, const v1::PrefillRequest& request,
    const std::string& traceparent, const Console& console,
    const std::function<void(const v1::PrefillResponse&)>& on_event) {
  const auto stub = v1::PrefillService::NewStub(channel);
  grpc::ClientContext context;
  if (!traceparent.empty()) context.AddMetadata(kTraceparent, traceparent);
  if (request.has_deadline()) {
    SetDeadline(absl::Seconds(request.deadline().seconds()) + kDeadlineGrace, &context);
  }
  CancelCall cancel(stub.get(), request, &context);
  // Before the call: from its start on there is something to cancel.
  const Interrupt::Scope scope(console.interrupt, [&cancel](int count) { cancel.OnInterrupt(count); });
  const auto reader = stub->Prefill(&context, request);
  absl::StatusOr<v1::PrefillCompleted> result = absl::UnavailableError(
      absl::StrCat("the stream of request ", request.request_id(), " ended without a result"));
  bool has_result = false;
  v1::PrefillResponse event;
  while (reader->Read(&event)) {
    on_event(event);
    if (event.has_completed()) result = event.completed();
    if (event.has_failed()) result = FailureOf(event.failed());
    has_result = has_result || event.has_completed() || event.has_failed();
  }
  const absl::Status status = FromGrpcStatus(reader->Finish());
  // What the service said of the request counts more than how the call ended.
  if (!has_result && !status.ok()) return status;
  return result;
}

}  // namespace headwater
