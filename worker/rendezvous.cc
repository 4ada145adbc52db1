#include "worker/rendezvous.h"

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include <grpcpp/client_context.h>
#include <grpcpp/server_context.h>

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "headwater/v1/worker.grpc.pb.h"

namespace headwater {
namespace {

class Service;

// One waiting Get. Finish() may be called once; whoever takes the reactor out of Service::waiting_ may call
// it.
class GetReactor final : public grpc::ServerUnaryReactor {
 public:
  GetReactor(Service* service, std::string key, v1::GetResponse* response)
      : service_(service), key_(std::move(key)), response_(response) {}
  void OnCancel() override;
  void OnDone() override { delete this; }

  const std::string& key() const { return key_; }
  void FinishWith(const std::string& value) {
    response_->set_value(value);
    Finish(grpc::Status::OK);
  }

 private:
  Service* const service_;
  const std::string key_;
  v1::GetResponse* const response_;
};

class Service final : public v1::RendezvousService::CallbackService {
 public:
  Service(const RendezvousLimits& limits, const Clock* clock) : limits_(limits), clock_(clock) {}

  grpc::ServerUnaryReactor* Put(grpc::CallbackServerContext* context, const v1::PutRequest* request,
                                v1::PutResponse* /*response*/) override {
    std::vector<GetReactor*> ready;
    const absl::Status status = Store(*request, &ready);
    for (GetReactor* reactor : ready) reactor->FinishWith(request->value());
    auto* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(status));
    return reactor;
  }

  grpc::ServerUnaryReactor* Get(grpc::CallbackServerContext* context, const v1::GetRequest* request,
                                v1::GetResponse* response) override {
    auto* reactor = new GetReactor(this, request->key(), response);
    const absl::Duration wait = absl::FromChrono(context->deadline() - std::chrono::system_clock::now());
    std::string value;
    bool found = false;
    const absl::Status status = Find(request->key(), wait, reactor, &value, &found);
    if (!status.ok()) {
      reactor->Finish(ToGrpcStatus(status));
    } else if (found) {
      reactor->FinishWith(value);
    }
    return reactor;
  }

  // True: the caller may Finish() it.
  bool TakeOut(GetReactor* reactor) {
    absl::MutexLock lock(&mutex_);
    const auto range = waiting_.equal_range(reactor->key());
    for (auto it = range.first; it != range.second; ++it) {
      if (it->second != reactor) continue;
      waiting_.erase(it);
      return true;
    }
    return false;
  }

 private:
  struct Entry {
    std::string value;
    absl::Time expiry;
  };

  absl::Status CheckKey(const std::string& key) const {
    if (!key.empty() && key.size() <= limits_.max_key_bytes) return absl::OkStatus();
    return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD,
                     absl::StrCat("key of ", key.size(), " bytes; allowed are 1 to ", limits_.max_key_bytes));
  }

  absl::Status Store(const v1::PutRequest& request, std::vector<GetReactor*>* ready) {
    absl::Status status = CheckKey(request.key());
    if (!status.ok()) return status;
    if (request.value().size() > limits_.max_value_bytes) {
      return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD,
                       absl::StrCat("value of ", request.value().size(), " bytes; at most ",
                                    limits_.max_value_bytes, " are allowed"));
    }
    absl::MutexLock lock(&mutex_);
    ForgetExpired();
    const auto it = entries_.find(request.key());
    if (it != entries_.end()) {
      if (it->second.value == request.value()) return absl::OkStatus();
      return absl::AlreadyExistsError(absl::StrCat("key ", request.key(), " has another value"));
    }
    if (entries_.size() >= limits_.max_keys) {
      return absl::ResourceExhaustedError(
          absl::StrCat("all ", limits_.max_keys, " rendezvous keys are taken"));
    }
    entries_[request.key()] = {request.value(), clock_->Now() + limits_.key_lifetime};
    order_.push_back(request.key());
    const auto range = waiting_.equal_range(request.key());
    for (auto waiter = range.first; waiter != range.second; ++waiter) ready->push_back(waiter->second);
    waiting_.erase(range.first, range.second);
    return absl::OkStatus();
  }

  absl::Status Find(const std::string& key, absl::Duration wait, GetReactor* reactor, std::string* value,
                    bool* found) {
    absl::Status status = CheckKey(key);
    if (!status.ok()) return status;
    if (wait > limits_.max_wait) {
      return MakeError(
          absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD,
          absl::StrCat("Get needs a deadline of at most ", absl::FormatDuration(limits_.max_wait)));
    }
    absl::MutexLock lock(&mutex_);
    ForgetExpired();
    const auto it = entries_.find(key);
    if (it != entries_.end()) {
      *value = it->second.value;
      *found = true;
      return absl::OkStatus();
    }
    if (waiting_.size() >= limits_.max_waiting) {
      return absl::ResourceExhaustedError(
          absl::StrCat("all ", limits_.max_waiting, " waiting rendezvous calls are taken"));
    }
    waiting_.emplace(key, reactor);
    return absl::OkStatus();
  }

  // Keys expire in the order in which they came.
  void ForgetExpired() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const absl::Time now = clock_->Now();
    while (!order_.empty() && entries_[order_.front()].expiry <= now) {
      entries_.erase(order_.front());
      order_.pop_front();
    }
  }

  const RendezvousLimits limits_;
  const Clock* const clock_;
  absl::Mutex mutex_;
  std::map<std::string, Entry> entries_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::string> order_ ABSL_GUARDED_BY(mutex_);
  std::multimap<std::string, GetReactor*> waiting_ ABSL_GUARDED_BY(mutex_);
};

// The call's deadline, its client's end and the server's shutdown all come this way.
void GetReactor::OnCancel() {
  if (!service_->TakeOut(this)) return;
  Finish(grpc::Status(grpc::StatusCode::DEADLINE_EXCEEDED, absl::StrCat("nobody has put key ", key_)));
}

class Client final : public RendezvousClient {
 public:
  Client(const std::string& address, const Transport* transport)
      : address_(address),
        stub_(v1::RendezvousService::NewStub(DialPrivate(address, transport, Role::kWorker))) {}

  absl::Status Put(absl::string_view key, absl::string_view value, absl::Duration timeout) override {
    v1::PutRequest request;
    request.set_key(std::string(key));
    request.set_value(std::string(value));
    v1::PutResponse response;
    return Call("Put", key, timeout,
                [&](grpc::ClientContext* context) { return stub_->Put(context, request, &response); });
  }

  absl::StatusOr<std::string> Get(absl::string_view key, absl::Duration timeout) override {
    v1::GetRequest request;
    request.set_key(std::string(key));
    v1::GetResponse response;
    absl::Status status = Call("Get", key, timeout, [&](grpc::ClientContext* context) {
      return stub_->Get(context, request, &response);
    });
    if (!status.ok()) return status;
    return std::move(*response.mutable_value());
  }

  void Abort() override {
    absl::MutexLock lock(&mutex_);
    aborted_ = true;
    for (grpc::ClientContext* context : calls_) context->TryCancel();
  }

 private:
  template <typename Run>
  absl::Status Call(absl::string_view operation, absl::string_view key, absl::Duration timeout,
                    const Run& run) {
    grpc::ClientContext context;
    // The service takes no deadline later than its own limit.
    const absl::Duration wait = std::min(timeout, RendezvousLimits().max_wait - absl::Seconds(1));
    context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(wait));
    // A server that is not up yet is waited for.
    context.set_wait_for_ready(true);
    {
      absl::MutexLock lock(&mutex_);
      if (aborted_) return absl::CancelledError("rendezvous aborted");
      calls_.insert(&context);
    }
    const absl::Status status = FromGrpcStatus(run(&context));
    absl::MutexLock lock(&mutex_);
    calls_.erase(&context);
    if (aborted_) return absl::CancelledError("rendezvous aborted");
    if (status.ok()) return status;
    absl::Status named(status.code(), absl::StrCat("rendezvous ", operation, " of ", key, " at ", address_,
                                                   ": ", status.message()));
    return named;
  }

  const std::string address_;
  const std::unique_ptr<v1::RendezvousService::Stub> stub_;
  absl::Mutex mutex_;
  bool aborted_ ABSL_GUARDED_BY(mutex_) = false;
  std::set<grpc::ClientContext*> calls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<grpc::Service> MakeRendezvousService(const RendezvousLimits& limits, const Clock* clock) {
  return std::make_unique<Service>(limits, clock);
}

std::unique_ptr<RendezvousClient> RendezvousClient::Dial(const std::string& address,
                                                         const Transport* transport) {
  return std::make_unique<Client>(address, transport);
}

}  // namespace headwater
