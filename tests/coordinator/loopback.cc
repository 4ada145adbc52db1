#include "tests/coordinator/loopback.h"

#include <chrono>

#include "absl/status/status.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"
#include "tests/support/dial.h"

namespace headwater::testing {
namespace {

constexpr std::chrono::seconds kLongest(10);
constexpr std::chrono::milliseconds kHeartbeat(300);

}  // namespace

ScriptedWorker::ScriptedWorker(const std::string& coordinator, const std::string& id, Script script)
    : script_(std::move(script)), stub_(v1::WorkerControlService::NewStub(DialPlaintext(coordinator))) {
  context_.set_wait_for_ready(true);
  stream_ = stub_->Connect(&context_);
  v1::ConnectRequest registration;
  *registration.mutable_registration() = MakeWorker(id, RandomId());
  Send(registration);
  reader_ = std::thread([this] { Read(); });
  heart_ = std::thread([this] { Heartbeat(); });
}

ScriptedWorker::~ScriptedWorker() {
  Kill();
  Finish();
}

void ScriptedWorker::Send(const v1::ConnectRequest& message) {
  std::lock_guard<std::mutex> lock(mutex_);
  stream_->Write(message);
}

void ScriptedWorker::CompleteAtOnce(ScriptedWorker* worker, const v1::PrefillAssignment& assignment) {
  for (uint32_t layer = 1; layer <= assignment.layout().num_layers(); ++layer) {
    v1::ConnectRequest message;
    auto* progress = message.mutable_progress();
    progress->set_request_id(assignment.request_id());
    progress->set_epoch(assignment.epoch());
    progress->set_rank(assignment.rank());
    progress->set_layers_done(layer);
    worker->Send(message);
  }
  v1::ConnectRequest message;
  auto* completed = message.mutable_completed();
  completed->set_request_id(assignment.request_id());
  completed->set_epoch(assignment.epoch());
  completed->set_rank(assignment.rank());
  completed->set_kv_digest_share(std::string(16, '\2'));
  completed->set_kv_blocks(1);
  if (assignment.rank() + 1 == assignment.plan().world_size()) {
    completed->set_first_token(assignment.token_ids(assignment.token_ids_size() - 1));
  }
  worker->Send(message);
}

bool ScriptedWorker::WaitFor(const int* counter, int count) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, kLongest, [=] { return *counter >= count; });
}

bool ScriptedWorker::WaitUntilRegistered() { return WaitFor(&registered_, 1); }
bool ScriptedWorker::WaitForAssignments(int count) { return WaitFor(&assignments_, count); }
bool ScriptedWorker::WaitForAborts(int count) { return WaitFor(&aborts_, count); }

void ScriptedWorker::Kill() { context_.TryCancel(); }

grpc::Status ScriptedWorker::Finish() {
  if (finished_) return status_;
  finished_ = true;
  reader_.join();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
    changed_.notify_all();
  }
  heart_.join();
  return status_ = stream_->Finish();
}

void ScriptedWorker::Heartbeat() {
  v1::ConnectRequest message;
  message.mutable_heartbeat();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, kHeartbeat, [this] { return ending_; })) stream_->Write(message);
}

void ScriptedWorker::Read() {
  v1::ConnectResponse response;
  while (stream_->Read(&response)) {
    if (response.has_registered()) {
      std::lock_guard<std::mutex> lock(mutex_);
      ++registered_;
      changed_.notify_all();
    } else if (response.has_assignment()) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        ++assignments_;
        changed_.notify_all();
        current_ = response.assignment();
      }
      script_(this, response.assignment());
    } else if (response.has_abort()) {
      v1::ConnectRequest message;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        ++aborts_;
        changed_.notify_all();
        message.mutable_failed()->set_request_id(current_.request_id());
        message.mutable_failed()->set_epoch(current_.epoch());
        message.mutable_failed()->set_rank(current_.rank());
      }
      *message.mutable_failed()->mutable_error() = ToRpcStatus(absl::CancelledError("aborted"));
      Send(message);
    }
  }
}

ScriptedDecodeNode::ScriptedDecodeNode(const std::string& coordinator, const std::string& id)
    : stub_(v1::DecodeRegistryService::NewStub(DialPlaintext(coordinator))) {
  auto running = StartServer("127.0.0.1:0", {this});
  HW_CHECK(running.ok());
  running_ = *std::move(running);
  context_.set_wait_for_ready(true);
  stream_ = stub_->Register(&context_);
  v1::RegisterRequest registration;
  *registration.mutable_registration() = MakeDecodeNode(id);
  registration.mutable_registration()->set_kv_address(running_.address);
  registration.mutable_registration()->set_decode_address(running_.address);
  stream_->Write(registration);
  heart_ = std::thread([this] {
    v1::RegisterResponse response;
    const bool registered = stream_->Read(&response);
    v1::RegisterRequest heartbeat;
    heartbeat.mutable_heartbeat();
    std::unique_lock<std::mutex> lock(mutex_);
    registered_ = registered;
    changed_.notify_all();
    while (!changed_.wait_for(lock, kHeartbeat, [this] { return ending_; })) stream_->Write(heartbeat);
  });
}

ScriptedDecodeNode::~ScriptedDecodeNode() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
    changed_.notify_all();
  }
  heart_.join();
  context_.TryCancel();
  stream_->Finish();
  running_.server->Shutdown();
}

bool ScriptedDecodeNode::WaitUntilRegistered() {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, kLongest, [this] { return registered_; });
}

grpc::Status ScriptedDecodeNode::OpenSession(grpc::ServerContext* context,
                                             const v1::OpenSessionRequest* request,
                                             v1::OpenSessionResponse*) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto trace = context->client_metadata().find("traceparent");
  traceparent_ = trace == context->client_metadata().end()
                     ? ""
                     : std::string(trace->second.data(), trace->second.size());
  open_[request->session_id()] = request->epoch();
  return grpc::Status::OK;
}

grpc::Status ScriptedDecodeNode::CommitSession(grpc::ServerContext*, const v1::CommitSessionRequest* request,
                                               v1::CommitSessionResponse*) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = open_.find(request->session_id());
  if (it == open_.end() || it->second != request->epoch()) {
    return ToGrpcStatus(MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION, "unknown"));
  }
  open_.erase(it);
  committed_[request->session_id()] = *request;
  return grpc::Status::OK;
}

grpc::Status ScriptedDecodeNode::AbortSession(grpc::ServerContext*, const v1::AbortSessionRequest* request,
                                              v1::AbortSessionResponse*) {
  std::lock_guard<std::mutex> lock(mutex_);
  open_.erase(request->session_id());
  return grpc::Status::OK;
}

size_t ScriptedDecodeNode::num_open() {
  std::lock_guard<std::mutex> lock(mutex_);
  return open_.size();
}

std::string ScriptedDecodeNode::traceparent() {
  std::lock_guard<std::mutex> lock(mutex_);
  return traceparent_;
}

size_t ScriptedDecodeNode::num_committed() {
  std::lock_guard<std::mutex> lock(mutex_);
  return committed_.size();
}

v1::CommitSessionRequest ScriptedDecodeNode::committed(const std::string& session_id) {
  std::lock_guard<std::mutex> lock(mutex_);
  return committed_[session_id];
}

}  // namespace headwater::testing
