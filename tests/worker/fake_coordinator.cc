#include "tests/worker/fake_coordinator.h"

#include "absl/strings/str_cat.h"

#include "base/log.h"

namespace headwater::testing {
namespace {

constexpr absl::Duration kPlenty = absl::Seconds(20);

}  // namespace

FakeCoordinator::FakeCoordinator(int port, bool accept, uint32_t heartbeat_ms)
    : accept_(accept), heartbeat_ms_(heartbeat_ms) {
  auto server = StartServer(absl::StrCat("127.0.0.1:", port), {this});
  HW_CHECK(server.ok());
  server_ = *std::move(server);
}

FakeCoordinator::~FakeCoordinator() { server_.server->Shutdown(std::chrono::system_clock::now()); }

grpc::Status FakeCoordinator::Connect(
    grpc::ServerContext* context, grpc::ServerReaderWriter<v1::ConnectResponse, v1::ConnectRequest>* stream) {
  {
    absl::MutexLock lock(&mutex_);
    context_ = context;
    stream_ = stream;
  }
  v1::ConnectRequest message;
  while (stream->Read(&message)) {
    absl::MutexLock lock(&mutex_);
    if (message.has_registration() && accept_) {
      v1::ConnectResponse response;
      response.mutable_registered()->set_heartbeat_interval_ms(heartbeat_ms_);
      stream->Write(response);
    }
    messages_.push_back(message);
  }
  absl::MutexLock lock(&mutex_);
  if (stream_ == stream) {
    stream_ = nullptr;
    context_ = nullptr;
  }
  return grpc::Status::OK;
}

void FakeCoordinator::Send(const v1::ConnectResponse& response) {
  absl::MutexLock lock(&mutex_);
  HW_CHECK(stream_ != nullptr);
  stream_->Write(response);
}

void FakeCoordinator::SendAssignment(const v1::PrefillAssignment& assignment) {
  v1::ConnectResponse response;
  *response.mutable_assignment() = assignment;
  Send(response);
}

void FakeCoordinator::SendAbort(const std::string& request_id, uint32_t epoch) {
  v1::ConnectResponse response;
  response.mutable_abort()->set_request_id(request_id);
  response.mutable_abort()->set_epoch(epoch);
  Send(response);
}

void FakeCoordinator::Break() {
  absl::MutexLock lock(&mutex_);
  if (context_ != nullptr) context_->TryCancel();
}

std::optional<v1::ConnectRequest> FakeCoordinator::Next(
    const std::function<bool(const v1::ConnectRequest&)>& wanted) {
  absl::MutexLock lock(&mutex_);
  const auto here = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    while (!messages_.empty() && !wanted(messages_.front())) messages_.pop_front();
    return !messages_.empty();
  };
  if (!mutex_.AwaitWithTimeout(absl::Condition(&here), kPlenty)) return std::nullopt;
  v1::ConnectRequest message = std::move(messages_.front());
  messages_.pop_front();
  return message;
}

std::optional<v1::WorkerRegistration> FakeCoordinator::NextRegistration() {
  const auto message = Next([](const v1::ConnectRequest& m) { return m.has_registration(); });
  if (!message.has_value()) return std::nullopt;
  return message->registration();
}

std::optional<v1::ConnectRequest> FakeCoordinator::NextResult() {
  return Next([](const v1::ConnectRequest& m) { return m.has_completed() || m.has_failed(); });
}

std::vector<v1::ConnectRequest> FakeCoordinator::Pending() const {
  absl::MutexLock lock(&mutex_);
  return {messages_.begin(), messages_.end()};
}

bool FakeCoordinator::WaitClosed() {
  absl::MutexLock lock(&mutex_);
  const auto closed = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stream_ == nullptr; };
  return mutex_.AwaitWithTimeout(absl::Condition(&closed), kPlenty);
}

}  // namespace headwater::testing
