// gRPC adapters of the client side: PrefillService and AdminService.
#ifndef HW_COORDINATOR_SERVICE_CLIENT_SERVICES_H_
#define HW_COORDINATOR_SERVICE_CLIENT_SERVICES_H_

#include "coordinator/scheduler.h"
#include "coordinator/scheduler_loop.h"
#include "headwater/v1/admin.grpc.pb.h"
#include "headwater/v1/prefill.grpc.pb.h"

namespace headwater {

// Checks requests on gRPC's threads, hands them to the scheduler's. Both pointers must outlive the server.
class PrefillServiceAdapter final : public v1::PrefillService::CallbackService {
 public:
  PrefillServiceAdapter(Scheduler* scheduler, SchedulerLoop* loop) : scheduler_(scheduler), loop_(loop) {}

  grpc::ServerWriteReactor<v1::PrefillResponse>* Prefill(grpc::CallbackServerContext* context,
                                                         const v1::PrefillRequest* request) override;
  grpc::ServerWriteReactor<v1::BatchPrefillResponse>* BatchPrefill(
      grpc::CallbackServerContext* context, const v1::BatchPrefillRequest* request) override;
  grpc::ServerUnaryReactor* CancelPrefill(grpc::CallbackServerContext* context,
                                          const v1::CancelPrefillRequest* request,
                                          v1::CancelPrefillResponse* response) override;
  grpc::ServerUnaryReactor* SubmitPrefill(grpc::CallbackServerContext* context,
                                          const v1::SubmitPrefillRequest* request,
                                          v1::SubmitPrefillResponse* response) override;
  grpc::ServerWriteReactor<v1::WatchPrefillResponse>* WatchPrefill(
      grpc::CallbackServerContext* context, const v1::WatchPrefillRequest* request) override;
  grpc::ServerUnaryReactor* GetPrefill(grpc::CallbackServerContext* context,
                                       const v1::GetPrefillRequest* request,
                                       v1::GetPrefillResponse* response) override;

 private:
  Scheduler* const scheduler_;
  SchedulerLoop* const loop_;
};

class AdminServiceAdapter final : public v1::AdminService::CallbackService {
 public:
  AdminServiceAdapter(Scheduler* scheduler, SchedulerLoop* loop) : scheduler_(scheduler), loop_(loop) {}

  grpc::ServerUnaryReactor* ListWorkers(grpc::CallbackServerContext* context,
                                        const v1::ListWorkersRequest* request,
                                        v1::ListWorkersResponse* response) override;
  grpc::ServerUnaryReactor* ListDecodeNodes(grpc::CallbackServerContext* context,
                                            const v1::ListDecodeNodesRequest* request,
                                            v1::ListDecodeNodesResponse* response) override;
  grpc::ServerUnaryReactor* DrainWorker(grpc::CallbackServerContext* context,
                                        const v1::DrainWorkerRequest* request,
                                        v1::DrainWorkerResponse* response) override;
  grpc::ServerUnaryReactor* GetTrace(grpc::CallbackServerContext* context, const v1::GetTraceRequest* request,
                                     v1::GetTraceResponse* response) override;

 private:
  Scheduler* const scheduler_;
  SchedulerLoop* const loop_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SERVICE_CLIENT_SERVICES_H_
