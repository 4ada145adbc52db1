#include "coordinator/service/peer_services.h"

#include <memory>
#include <utility>

#include "base/log.h"
#include "coordinator/service/peer_stream.h"

namespace headwater {
namespace {

absl::Status RegistrationFirst() {
  return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD,
                   "the first message of the stream must be the registration, and no other may be");
}

class WorkerStream final : public PeerStream<v1::ConnectRequest, v1::ConnectResponse>, public WorkerLink {
 public:
  WorkerStream(grpc::CallbackServerContext* context, Scheduler* scheduler, SchedulerLoop* loop)
      : PeerStream(context, loop), scheduler_(scheduler) {}

  bool Send(v1::ConnectResponse message) override { return SendMessage(std::move(message)); }
  void Close(const absl::Status& why) override { CloseStream(why); }

 private:
  void OnMessage(const v1::ConnectRequest& request) override {
    if (connection_ != 0) {
      scheduler_->OnWorkerMessage(connection_, request);
      return;
    }
    if (!request.has_registration()) {
      CloseStream(RegistrationFirst());
      return;
    }
    auto link = std::static_pointer_cast<WorkerStream>(shared_from_this());
    const auto connection = scheduler_->AddWorker(request.registration(), std::move(link));
    if (connection.ok()) {
      connection_ = *connection;
      DisarmRegistrationAlarm();
    } else {
      HW_LOG(WARNING).Field("error", connection.status().message()) << "worker refused";
      CloseStream(connection.status());
    }
  }

  void OnClosed() override {
    if (connection_ != 0) scheduler_->OnWorkerClosed(connection_);
  }

  Scheduler* const scheduler_;
  uint64_t connection_ = 0;
};

class DecodeStream final : public PeerStream<v1::RegisterRequest, v1::RegisterResponse>, public PeerLink {
 public:
  DecodeStream(grpc::CallbackServerContext* context, Scheduler* scheduler, SchedulerLoop* loop)
      : PeerStream(context, loop), scheduler_(scheduler) {}

  void Close(const absl::Status& why) override { CloseStream(why); }

 private:
  void OnMessage(const v1::RegisterRequest& request) override {
    if (connection_ != 0 && request.has_heartbeat()) {
      scheduler_->OnDecodeHeartbeat(connection_, request.heartbeat());
      return;
    }
    if (connection_ != 0 || !request.has_registration()) {
      CloseStream(RegistrationFirst());
      return;
    }
    auto link = std::static_pointer_cast<DecodeStream>(shared_from_this());
    const auto connection = scheduler_->AddDecodeNode(request.registration(), std::move(link));
    if (!connection.ok()) {
      HW_LOG(WARNING).Field("error", connection.status().message()) << "decode node refused";
      CloseStream(connection.status());
      return;
    }
    connection_ = *connection;
    DisarmRegistrationAlarm();
    v1::RegisterResponse response;
    response.set_heartbeat_interval_ms(
        static_cast<uint32_t>(absl::ToInt64Milliseconds(scheduler_->options().heartbeat_interval)));
    SendMessage(std::move(response));
  }

  void OnClosed() override {
    if (connection_ != 0) scheduler_->OnDecodeClosed(connection_);
  }

  Scheduler* const scheduler_;
  uint64_t connection_ = 0;
};

}  // namespace

grpc::ServerBidiReactor<v1::ConnectRequest, v1::ConnectResponse>* WorkerControlAdapter::Connect(
    grpc::CallbackServerContext* context) {
  const auto stream = std::make_shared<WorkerStream>(context, scheduler_, loop_);
  stream->Start();
  return stream.get();
}

grpc::ServerBidiReactor<v1::RegisterRequest, v1::RegisterResponse>* DecodeRegistryAdapter::Register(
    grpc::CallbackServerContext* context) {
  const auto stream = std::make_shared<DecodeStream>(context, scheduler_, loop_);
  stream->Start();
  return stream.get();
}

}  // namespace headwater
