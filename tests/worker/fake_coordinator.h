// FakeCoordinator: WorkerControlService whose every message the test sends and sees.
#ifndef HW_TESTS_WORKER_FAKE_COORDINATOR_H_
#define HW_TESTS_WORKER_FAKE_COORDINATOR_H_

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "base/rpc/server.h"
#include "headwater/v1/worker.grpc.pb.h"

namespace headwater::testing {

class FakeCoordinator final : public v1::WorkerControlService::Service {
 public:
  // Port 0 takes a free one. accept: answer registrations by itself, with this heartbeat interval.
  explicit FakeCoordinator(int port = 0, bool accept = true, uint32_t heartbeat_ms = 50);
  ~FakeCoordinator() override;

  const std::string& address() const { return server_.address; }
  int port() const { return server_.port; }

  grpc::Status Connect(grpc::ServerContext* context,
                       grpc::ServerReaderWriter<v1::ConnectResponse, v1::ConnectRequest>* stream) override;

  // To the worker connected last.
  void Send(const v1::ConnectResponse& response);
  void SendAssignment(const v1::PrefillAssignment& assignment);
  void SendAbort(const std::string& request_id, uint32_t epoch);
  // Ends the stream under the worker's feet.
  void Break();

  // Takes the next message that `wanted` likes, dropping those before it; none within 20 s: nullopt.
  std::optional<v1::ConnectRequest> Next(const std::function<bool(const v1::ConnectRequest&)>& wanted);
  std::optional<v1::WorkerRegistration> NextRegistration();
  // RankCompleted or RankFailed.
  std::optional<v1::ConnectRequest> NextResult();
  // Messages that wait to be taken.
  std::vector<v1::ConnectRequest> Pending() const;
  // Waits until the worker has closed its side, or 20 s.
  bool WaitClosed();

 private:
  const bool accept_;
  const uint32_t heartbeat_ms_;
  mutable absl::Mutex mutex_;
  grpc::ServerContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;
  grpc::ServerReaderWriter<v1::ConnectResponse, v1::ConnectRequest>* stream_ ABSL_GUARDED_BY(mutex_) =
      nullptr;
  std::deque<v1::ConnectRequest> messages_ ABSL_GUARDED_BY(mutex_);
  RunningServer server_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_FAKE_COORDINATOR_H_
