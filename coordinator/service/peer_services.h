// gRPC adapters of the inner side: the registration streams of workers and decode nodes.
#ifndef HW_COORDINATOR_SERVICE_PEER_SERVICES_H_
#define HW_COORDINATOR_SERVICE_PEER_SERVICES_H_

#include "coordinator/scheduler.h"
#include "coordinator/scheduler_loop.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "headwater/v1/worker.grpc.pb.h"

namespace headwater {

// A stream reads its next message only when the scheduler is done with the last one, so that a peer that
// talks fast slows down itself alone. A stream that does not register within 10 s is ended
// (DEADLINE_EXCEEDED). Both pointers must outlive the server.
class WorkerControlAdapter final : public v1::WorkerControlService::CallbackService {
 public:
  WorkerControlAdapter(Scheduler* scheduler, SchedulerLoop* loop) : scheduler_(scheduler), loop_(loop) {}

  grpc::ServerBidiReactor<v1::ConnectRequest, v1::ConnectResponse>* Connect(
      grpc::CallbackServerContext* context) override;

 private:
  Scheduler* const scheduler_;
  SchedulerLoop* const loop_;
};

class DecodeRegistryAdapter final : public v1::DecodeRegistryService::CallbackService {
 public:
  DecodeRegistryAdapter(Scheduler* scheduler, SchedulerLoop* loop) : scheduler_(scheduler), loop_(loop) {}

  grpc::ServerBidiReactor<v1::RegisterRequest, v1::RegisterResponse>* Register(
      grpc::CallbackServerContext* context) override;

 private:
  Scheduler* const scheduler_;
  SchedulerLoop* const loop_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SERVICE_PEER_SERVICES_H_
