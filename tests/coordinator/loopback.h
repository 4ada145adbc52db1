// Workers and decode nodes that follow a script, over real gRPC to a coordinator in the same process.
#ifndef HW_TESTS_COORDINATOR_LOOPBACK_H_
#define HW_TESTS_COORDINATOR_LOOPBACK_H_

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include <grpcpp/client_context.h>
#include <grpcpp/server.h>

#include "base/rpc/server.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "headwater/v1/kv.grpc.pb.h"
#include "headwater/v1/worker.grpc.pb.h"

namespace headwater::testing {

// Connects, registers, heartbeats, and hands assignments to `script`, which runs on the reading thread and
// may Send(). An abort is answered with RankFailed (CANCELLED).
class ScriptedWorker {
 public:
  using Script = std::function<void(ScriptedWorker*, const v1::PrefillAssignment&)>;

  ScriptedWorker(const std::string& coordinator, const std::string& id, Script script);
  // Disconnects.
  ~ScriptedWorker();

  void Send(const v1::ConnectRequest& message);
  // Reports every layer and completes.
  static void CompleteAtOnce(ScriptedWorker* worker, const v1::PrefillAssignment& assignment);
  // Does nothing: the assignment stays open until it is aborted.
  static void Stall(ScriptedWorker*, const v1::PrefillAssignment&) {}

  // Waits up to 10 s.
  bool WaitUntilRegistered();
  bool WaitForAssignments(int count);
  bool WaitForAborts(int count);
  // Breaks the stream as a killed process does.
  void Kill();
  // The status that ended the stream.
  grpc::Status Finish();

 private:
  void Read();
  void Heartbeat();
  bool WaitFor(const int* counter, int count);

  const Script script_;
  std::unique_ptr<v1::WorkerControlService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::ConnectRequest, v1::ConnectResponse>> stream_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int registered_ ABSL_GUARDED_BY(mutex_) = 0;
  int assignments_ ABSL_GUARDED_BY(mutex_) = 0;
  int aborts_ ABSL_GUARDED_BY(mutex_) = 0;
  v1::PrefillAssignment current_ ABSL_GUARDED_BY(mutex_);
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ = false;
  grpc::Status status_;
  std::thread reader_;
  std::thread heart_;
};

// Keeps sessions as a decode node does, without their blocks, and stays registered.
class ScriptedDecodeNode final : public v1::KvTransferService::Service {
 public:
  ScriptedDecodeNode(const std::string& coordinator, const std::string& id);
  ~ScriptedDecodeNode() override;

  grpc::Status OpenSession(grpc::ServerContext*, const v1::OpenSessionRequest* request,
                           v1::OpenSessionResponse* response) override;
  grpc::Status CommitSession(grpc::ServerContext*, const v1::CommitSessionRequest* request,
                             v1::CommitSessionResponse* response) override;
  grpc::Status AbortSession(grpc::ServerContext*, const v1::AbortSessionRequest* request,
                            v1::AbortSessionResponse* response) override;

  size_t num_open();
  size_t num_committed();
  // Metadata of the last OpenSession.
  std::string traceparent();
  v1::CommitSessionRequest committed(const std::string& session_id);
  bool WaitUntilRegistered();

 private:
  RunningServer running_;
  std::unique_ptr<v1::DecodeRegistryService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::RegisterRequest, v1::RegisterResponse>> stream_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool registered_ ABSL_GUARDED_BY(mutex_) = false;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<std::string, uint32_t> open_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, v1::CommitSessionRequest> committed_ ABSL_GUARDED_BY(mutex_);
  std::string traceparent_ ABSL_GUARDED_BY(mutex_);
  std::thread heart_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_COORDINATOR_LOOPBACK_H_
