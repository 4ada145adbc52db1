#include "coordinator/service/client_services.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/rpc/grpc_status.h"
#include "coordinator/service/event_stream.h"
#include "coordinator/validation.h"

namespace headwater {
namespace {

absl::Status Overloaded() {
  return WithRetryAfter(MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_FULL,
                                  "the coordinator has more calls waiting than it takes"),
                        absl::Seconds(1));
}

bool IsTerminal(const v1::PrefillResponse& event) { return event.has_completed() || event.has_failed(); }

using SingleStream = EventStream<v1::PrefillResponse>;
using BatchStream = EventStream<v1::BatchPrefillResponse>;

// Of a call that is about one job.
template <typename Stream>
class StreamWatcher final : public JobWatcher {
 public:
  explicit StreamWatcher(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}

  void OnEvent(std::shared_ptr<const v1::PrefillResponse> event) override {
    const bool terminal = IsTerminal(*event);
    stream_->Push(0, std::move(event));
    if (terminal) stream_->End(grpc::Status::OK);
  }
  void OnRejected(const absl::Status& status) override { stream_->End(ToGrpcStatus(status)); }

 private:
  const std::shared_ptr<Stream> stream_;
};

// Answers a submission with the first event. The response must live until then.
class AcceptanceWatcher final : public JobWatcher, public std::enable_shared_from_this<AcceptanceWatcher> {
 public:
  AcceptanceWatcher(grpc::ServerUnaryReactor* reactor, v1::SubmitPrefillResponse* response)
      : reactor_(reactor), response_(response) {}
  // Runs once an event has been answered, not a rejection.
  void set_answered(std::function<void(std::shared_ptr<JobWatcher>)> answered) {
    answered_ = std::move(answered);
  }

  void OnEvent(std::shared_ptr<const v1::PrefillResponse> event) override {
    if (reactor_ == nullptr) return;
    if (event->has_accepted()) {
      response_->set_request_id(event->accepted().request_id());
      response_->set_trace_id(event->accepted().trace_id());
    } else {
      response_->set_request_id(event->has_completed()  ? event->completed().request_id()
                                : event->has_progress() ? event->progress().request_id()
                                                        : event->failed().request_id());
    }
    std::exchange(reactor_, nullptr)->Finish(grpc::Status::OK);
    answered_(shared_from_this());
  }
  void OnRejected(const absl::Status& status) override {
    if (reactor_ != nullptr) std::exchange(reactor_, nullptr)->Finish(ToGrpcStatus(status));
  }

 private:
  grpc::ServerUnaryReactor* reactor_;  // null: answered
  v1::SubmitPrefillResponse* const response_;
  std::function<void(std::shared_ptr<JobWatcher>)> answered_;
};

// One item of a batch. The stream ends with the last item's terminal event.
class ItemWatcher final : public JobWatcher {
 public:
  ItemWatcher(std::shared_ptr<BatchStream> stream, std::shared_ptr<std::atomic<int>> items_left,
              uint32_t item, std::string request_id)
      : stream_(std::move(stream)),
        items_left_(std::move(items_left)),
        item_(item),
        request_id_(std::move(request_id)) {}

  void OnEvent(std::shared_ptr<const v1::PrefillResponse> event) override {
    const bool terminal = IsTerminal(*event);
    stream_->Push(item_, std::move(event));
    if (terminal && items_left_->fetch_sub(1) == 1) stream_->End(grpc::Status::OK);
  }
  void OnRejected(const absl::Status& status) override {
    auto event = std::make_shared<v1::PrefillResponse>();
    event->mutable_failed()->set_request_id(request_id_);
    *event->mutable_failed()->mutable_error() = ToRpcStatus(status);
    OnEvent(std::move(event));
  }

 private:
  const std::shared_ptr<BatchStream> stream_;
  const std::shared_ptr<std::atomic<int>> items_left_;
  const uint32_t item_;
  const std::string request_id_;
};

JobKey KeyOf(const PreparedRequest& prepared) {
  return {prepared.request->tenant(), prepared.request->request_id()};
}

absl::string_view Metadata(const grpc::CallbackServerContext& context, const char* name) {
  const auto it = context.client_metadata().find(name);
  return it == context.client_metadata().end() ? "" : absl::string_view(it->second.data(), it->second.size());
}

absl::StatusOr<PreparedRequest> Prepare(const grpc::CallbackServerContext& context,
                                        const v1::PrefillRequest& request,
                                        const CoordinatorOptions& options) {
  return PrepareRequest(request, options, Metadata(context, kTraceparent), Metadata(context, kTracestate));
}

grpc::ServerUnaryReactor* FinishNow(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace

grpc::ServerWriteReactor<v1::PrefillResponse>* PrefillServiceAdapter::Prefill(
    grpc::CallbackServerContext* context, const v1::PrefillRequest* request) {
  auto stream = std::make_shared<SingleStream>();
  auto prepared = Prepare(*context, *request, scheduler_->options());
  if (!prepared.ok()) {
    scheduler_->CountRejection(prepared.status());
    stream->Start([] {});
    stream->End(ToGrpcStatus(prepared.status()));
    return stream.get();
  }
  const auto watcher = std::make_shared<StreamWatcher<SingleStream>>(stream);
  stream->Start([this, watch = JobWatch{KeyOf(*prepared), watcher}] {
    loop_->Post([this, watch] { scheduler_->Detach({watch}); });
  });
  const bool posted =
      loop_->TryPost([this, submitted = *prepared, watcher] { scheduler_->Submit(submitted, watcher); });
  if (!posted) stream->End(ToGrpcStatus(Overloaded()));
  return stream.get();
}

grpc::ServerWriteReactor<v1::BatchPrefillResponse>* PrefillServiceAdapter::BatchPrefill(
    grpc::CallbackServerContext* context, const v1::BatchPrefillRequest* request) {
  auto stream = std::make_shared<BatchStream>();
  const absl::Status valid = CheckBatch(*request, scheduler_->options());
  if (!valid.ok()) {
    scheduler_->CountRejection(valid);
    stream->Start([] {});
    stream->End(ToGrpcStatus(valid));
    return stream.get();
  }
  const auto items_left = std::make_shared<std::atomic<int>>(request->items_size());
  std::vector<std::pair<PreparedRequest, std::shared_ptr<JobWatcher>>> submissions;
  std::vector<JobWatch> watches;
  std::vector<std::pair<std::shared_ptr<JobWatcher>, absl::Status>> refused;
  for (int i = 0; i < request->items_size(); ++i) {
    const auto watcher = std::make_shared<ItemWatcher>(stream, items_left, static_cast<uint32_t>(i),
                                                       request->items(i).request_id());
    auto prepared = Prepare(*context, request->items(i), scheduler_->options());
    if (prepared.ok()) {
      watches.push_back({KeyOf(*prepared), watcher});
      submissions.emplace_back(*std::move(prepared), watcher);
    } else {
      scheduler_->CountRejection(prepared.status());
      refused.emplace_back(watcher, prepared.status());
    }
  }
  stream->Start([this, watches = std::move(watches)] {
    loop_->Post([this, watches] { scheduler_->Detach(watches); });
  });
  const bool posted = loop_->TryPost([this, submissions = std::move(submissions)] {
    for (const auto& [prepared, watcher] : submissions) scheduler_->Submit(prepared, watcher);
  });
  if (!posted) stream->End(ToGrpcStatus(Overloaded()));
  for (const auto& [watcher, status] : refused) watcher->OnRejected(status);
  return stream.get();
}

grpc::ServerUnaryReactor* PrefillServiceAdapter::CancelPrefill(grpc::CallbackServerContext* context,
                                                               const v1::CancelPrefillRequest* request,
                                                               v1::CancelPrefillResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const JobKey key{request->tenant(), request->request_id()};
  const bool posted = loop_->TryPost([this, key, response, reactor] {
    scheduler_->Cancel(key, [response, reactor](const absl::StatusOr<bool>& cancelled) {
      if (cancelled.ok()) response->set_cancelled(*cancelled);
      reactor->Finish(ToGrpcStatus(cancelled.status()));
    });
  });
  if (!posted) reactor->Finish(ToGrpcStatus(Overloaded()));
  return reactor;
}

grpc::ServerUnaryReactor* PrefillServiceAdapter::SubmitPrefill(grpc::CallbackServerContext* context,
                                                               const v1::SubmitPrefillRequest* request,
                                                               v1::SubmitPrefillResponse* response) {
  auto prepared = Prepare(*context, request->request(), scheduler_->options());
  if (!prepared.ok()) {
    scheduler_->CountRejection(prepared.status());
    return FinishNow(context, prepared.status());
  }
  prepared->detached = true;
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const auto watcher = std::make_shared<AcceptanceWatcher>(reactor, response);
  // It has nothing to watch once it has answered; the job must not collect such ones.
  watcher->set_answered([this, key = KeyOf(*prepared)](std::shared_ptr<JobWatcher> answered) {
    loop_->Post([this, watch = JobWatch{key, std::move(answered)}] { scheduler_->Detach({watch}); });
  });
  const bool posted =
      loop_->TryPost([this, submitted = *prepared, watcher] { scheduler_->Submit(submitted, watcher); });
  if (!posted) reactor->Finish(ToGrpcStatus(Overloaded()));
  return reactor;
}

grpc::ServerWriteReactor<v1::WatchPrefillResponse>* PrefillServiceAdapter::WatchPrefill(
    grpc::CallbackServerContext* /*context*/, const v1::WatchPrefillRequest* request) {
  using WatchStream = EventStream<v1::WatchPrefillResponse>;
  auto stream = std::make_shared<WatchStream>();
  const auto watcher = std::make_shared<StreamWatcher<WatchStream>>(stream);
  const JobKey key{request->tenant(), request->request_id()};
  stream->Start([this, watch = JobWatch{key, watcher}] {
    loop_->Post([this, watch] { scheduler_->Detach({watch}); });
  });
  const bool posted = loop_->TryPost([this, key, watcher] { scheduler_->Watch(key, watcher); });
  if (!posted) stream->End(ToGrpcStatus(Overloaded()));
  return stream.get();
}

grpc::ServerUnaryReactor* PrefillServiceAdapter::GetPrefill(grpc::CallbackServerContext* context,
                                                            const v1::GetPrefillRequest* request,
                                                            v1::GetPrefillResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const JobKey key{request->tenant(), request->request_id()};
  const bool posted = loop_->TryPost([this, key, response, reactor] {
    absl::StatusOr<v1::PrefillResponse> last = scheduler_->Get(key);
    if (last.ok() && last->event_case() != v1::PrefillResponse::EVENT_NOT_SET) {
      *response->mutable_last() = *std::move(last);
    }
    reactor->Finish(ToGrpcStatus(last.status()));
  });
  if (!posted) reactor->Finish(ToGrpcStatus(Overloaded()));
  return reactor;
}

grpc::ServerUnaryReactor* AdminServiceAdapter::ListWorkers(grpc::CallbackServerContext* context,
                                                           const v1::ListWorkersRequest*,
                                                           v1::ListWorkersResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const bool posted = loop_->TryPost([this, response, reactor] {
    *response = scheduler_->ListWorkers();
    reactor->Finish(grpc::Status::OK);
  });
  if (!posted) reactor->Finish(ToGrpcStatus(Overloaded()));
  return reactor;
}

grpc::ServerUnaryReactor* AdminServiceAdapter::ListDecodeNodes(grpc::CallbackServerContext* context,
                                                               const v1::ListDecodeNodesRequest*,
                                                               v1::ListDecodeNodesResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const bool posted = loop_->TryPost([this, response, reactor] {
    *response = scheduler_->ListDecodeNodes();
    reactor->Finish(grpc::Status::OK);
  });
  if (!posted) reactor->Finish(ToGrpcStatus(Overloaded()));
  return reactor;
}

grpc::ServerUnaryReactor* AdminServiceAdapter::DrainWorker(grpc::CallbackServerContext* context,
                                                           const v1::DrainWorkerRequest* request,
                                                           v1::DrainWorkerResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const bool posted = loop_->TryPost([this, id = request->worker_id(), response, reactor] {
    const absl::StatusOr<v1::WorkerSummary> drained = scheduler_->DrainWorker(id);
    if (drained.ok()) *response->mutable_worker() = *drained;
    reactor->Finish(ToGrpcStatus(drained.status()));
  });
  if (!posted) reactor->Finish(ToGrpcStatus(Overloaded()));
  return reactor;
}

grpc::ServerUnaryReactor* AdminServiceAdapter::GetTrace(grpc::CallbackServerContext* context,
                                                        const v1::GetTraceRequest* request,
                                                        v1::GetTraceResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const JobKey key{request->tenant(), request->request_id()};
  const bool posted = loop_->TryPost([this, key, response, reactor] {
    absl::StatusOr<v1::RequestTrace> trace = scheduler_->GetTrace(key);
    if (trace.ok()) *response->mutable_trace() = *std::move(trace);
    reactor->Finish(ToGrpcStatus(trace.status()));
  });
  if (!posted) reactor->Finish(ToGrpcStatus(Overloaded()));
  return reactor;
}

}  // namespace headwater
