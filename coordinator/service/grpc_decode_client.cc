#include "coordinator/service/grpc_decode_client.h"

#include <chrono>
#include <utility>

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "base/trace_context.h"

namespace headwater {
namespace {

constexpr size_t kMaxChannels = 256;

}  // namespace

// Keeps everything that gRPC needs until the answer.
template <typename Request, typename Response>
struct GrpcDecodeClient::Call {
  std::shared_ptr<v1::KvTransferService::Stub> stub;
  grpc::ClientContext context;
  Request request;
  Response response;
};

GrpcDecodeClient::~GrpcDecodeClient() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (grpc::ClientContext* context : calls_) context->TryCancel();
  ended_.wait(lock, [this] { return calls_.empty(); });
}

std::shared_ptr<v1::KvTransferService::Stub> GrpcDecodeClient::StubFor(const std::string& kv_address) {
  const auto it = stubs_.find(kv_address);
  if (it != stubs_.end()) return it->second;
  // Calls hold their stubs, so any may go.
  if (stubs_.size() >= kMaxChannels) stubs_.erase(stubs_.begin());
  return stubs_
      .emplace(kv_address,
               v1::KvTransferService::NewStub(DialPrivate(kv_address, transport_.get(), Role::kDecode)))
      .first->second;
}

template <typename Request, typename Response, typename Start>
void GrpcDecodeClient::StartCall(const std::string& kv_address, Request request, absl::Duration timeout,
                                 bool wait_for_ready, Done done, Start start) {
  auto call = std::make_shared<Call<Request, Response>>();
  call->stub = StubFor(kv_address);
  call->request = std::move(request);
  call->context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout));
  call->context.set_wait_for_ready(wait_for_ready);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    calls_.insert(&call->context);
  }
  const auto finish = [this, call, done = std::move(done)](const grpc::Status& status) {
    loop_->Post([done, answer = FromGrpcStatus(status)] { done(answer); });
    std::lock_guard<std::mutex> lock(mutex_);
    calls_.erase(&call->context);
    ended_.notify_all();
  };
  start(call.get(), finish);
}

void GrpcDecodeClient::OpenSession(const std::string& kv_address, v1::OpenSessionRequest request,
                                   absl::Duration timeout, Done done) {
  StartCall<v1::OpenSessionRequest, v1::OpenSessionResponse>(
      kv_address, std::move(request), timeout, false, std::move(done), [](auto* call, auto finish) {
        if (!call->request.traceparent().empty()) {
          call->context.AddMetadata(kTraceparent, call->request.traceparent());
        }
        call->stub->async()->OpenSession(&call->context, &call->request, &call->response, std::move(finish));
      });
}

void GrpcDecodeClient::CommitSession(const std::string& kv_address, v1::CommitSessionRequest request,
                                     absl::Duration timeout, Done done) {
  StartCall<v1::CommitSessionRequest, v1::CommitSessionResponse>(
      kv_address, std::move(request), timeout, false, std::move(done), [](auto* call, auto finish) {
        call->stub->async()->CommitSession(&call->context, &call->request, &call->response,
                                           std::move(finish));
      });
}

void GrpcDecodeClient::AbortSession(const std::string& kv_address, v1::AbortSessionRequest request,
                                    absl::Duration timeout, Done done) {
  StartCall<v1::AbortSessionRequest, v1::AbortSessionResponse>(
      kv_address, std::move(request), timeout, true, std::move(done), [](auto* call, auto finish) {
        call->stub->async()->AbortSession(&call->context, &call->request, &call->response, std::move(finish));
      });
}

}  // namespace headwater
