#include "decode/service.h"

#include <deque>
#include <mutex>
#include <string>
#include <utility>

#include <grpcpp/support/server_callback.h>

#include "base/log.h"
#include "base/rpc/closed_text.h"
#include "base/rpc/grpc_status.h"
#include "headwater/v1/decode.grpc.pb.h"

namespace headwater {
namespace {

constexpr size_t kMaxWaitingTokens = 64;

// What clients are told; what they are not is logged.
grpc::Status ForClient(const std::string& session_id, const absl::Status& status) {
  const v1::ErrorReason reason = ReasonOf(status);
  if (status.ok() || (reason != v1::ERROR_REASON_UNSPECIFIED && reason != v1::ERROR_REASON_INTERNAL)) {
    return ToGrpcStatus(status);
  }
  HW_LOG(WARNING)
          .Field("session_id", session_id)
          .Field("error", status.ToString(absl::StatusToStringMode::kWithNoExtraData))
      << "a client's call failed";
  return ToGrpcStatus(WithClosedText(status));
}

// One Generate call. Deletes itself when gRPC is done with it, which is after the engine is.
class GenerateCall final : public grpc::ServerWriteReactor<v1::GenerateResponse>, public GenerationSink {
 public:
  GenerateCall(GenerationEngine* engine, const v1::GenerateRequest& request)
      : engine_(engine), session_id_(request.session_id()) {
    // gRPC holds back what the reactor starts before the handler has returned, so the engine may answer at
    // once.
    const absl::StatusOr<uint64_t> id = engine_->Start(request, this);
    if (id.ok()) {
      id_ = *id;
    } else {
      Finish(ForClient(session_id_, id.status()));
    }
  }

  bool OnToken(const v1::GenerateResponse& token) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (broken_) return true;
    waiting_.push_back(token);
    if (!writing_) WriteNext();
    was_full_ = waiting_.size() >= kMaxWaitingTokens;
    return !was_full_;
  }

  void OnDone(const absl::Status& status) override {
    bool finish = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
      status_ = ForClient(session_id_, status);
      finish = !writing_;
    }
    if (finish) Finish(status_);
  }

  void OnWriteDone(bool ok) override {
    bool resume = false;
    bool finish = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      broken_ = broken_ || !ok;
      if (broken_) waiting_.clear();
      if (!waiting_.empty()) WriteNext();
      resume = std::exchange(was_full_, was_full_ && waiting_.size() > kMaxWaitingTokens / 2) && !was_full_;
      finish = done_ && !writing_;
    }
    if (finish) return Finish(status_);
    if (!ok) engine_->Cancel(id_);
    if (resume) engine_->Resume(id_);
  }

  void OnCancel() override { engine_->Cancel(id_); }
  void OnDone() override { delete this; }

 private:
  // Requires mutex_ and !waiting_.empty().
  void WriteNext() {
    writing_ = true;
    current_ = std::move(waiting_.front());
    waiting_.pop_front();
    StartWrite(&current_);
  }

  GenerationEngine* const engine_;
  const std::string session_id_;
  uint64_t id_ = 0;
  std::mutex mutex_;
  // Guarded by mutex_; status_ is fixed once done_.
  std::deque<v1::GenerateResponse> waiting_;
  v1::GenerateResponse current_;
  bool writing_ = false;
  bool was_full_ = false;
  bool broken_ = false;  // the client is gone
  bool done_ = false;
  grpc::Status status_;
};

class DecodeServiceAdapter final : public v1::DecodeService::CallbackService {
 public:
  explicit DecodeServiceAdapter(GenerationEngine* engine) : engine_(engine) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* /*context*/,
                                                           const v1::GenerateRequest* request) override {
    return new GenerateCall(engine_, *request);
  }

  grpc::ServerUnaryReactor* Release(grpc::CallbackServerContext* context, const v1::ReleaseRequest* request,
                                    v1::ReleaseResponse* response) override {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    const absl::Status status = engine_->Release(request->session_id(), [response, reactor](uint64_t bytes) {
      response->set_bytes_reclaimed(bytes);
      reactor->Finish(grpc::Status::OK);
    });
    if (!status.ok()) reactor->Finish(ForClient(request->session_id(), status));
    return reactor;
  }

 private:
  GenerationEngine* const engine_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeDecodeService(GenerationEngine* engine) {
  return std::make_unique<DecodeServiceAdapter>(engine);
}

}  // namespace headwater
