// DecodeClient over gRPC.
#ifndef HW_COORDINATOR_SERVICE_GRPC_DECODE_CLIENT_H_
#define HW_COORDINATOR_SERVICE_GRPC_DECODE_CLIENT_H_

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include <grpcpp/client_context.h>

#include "base/rpc/transport.h"
#include "coordinator/links.h"
#include "coordinator/scheduler_loop.h"
#include "headwater/v1/kv.grpc.pb.h"

namespace headwater {

// Keeps one channel per address, at most 256. Answers are posted to `loop`.
class GrpcDecodeClient final : public DecodeClient {
 public:
  // `loop` must outlive this object.
  GrpcDecodeClient(SchedulerLoop* loop, std::shared_ptr<const Transport> transport)
      : loop_(loop), transport_(std::move(transport)) {}
  // Cancels the calls under way and waits for their ends.
  ~GrpcDecodeClient() override;

  void OpenSession(const std::string& kv_address, v1::OpenSessionRequest request, absl::Duration timeout,
                   Done done) override;
  void CommitSession(const std::string& kv_address, v1::CommitSessionRequest request, absl::Duration timeout,
                     Done done) override;
  // Waits within `timeout` for a node that is away.
  void AbortSession(const std::string& kv_address, v1::AbortSessionRequest request, absl::Duration timeout,
                    Done done) override;

 private:
  template <typename Request, typename Response>
  struct Call;

  std::shared_ptr<v1::KvTransferService::Stub> StubFor(const std::string& kv_address);
  template <typename Request, typename Response, typename Start>
  void StartCall(const std::string& kv_address, Request request, absl::Duration timeout, bool wait_for_ready,
                 Done done, Start start);

  SchedulerLoop* const loop_;
  const std::shared_ptr<const Transport> transport_;
  std::map<std::string, std::shared_ptr<v1::KvTransferService::Stub>> stubs_;
  std::mutex mutex_;
  std::condition_variable ended_;
  absl::flat_hash_set<grpc::ClientContext*> calls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SERVICE_GRPC_DECODE_CLIENT_H_
