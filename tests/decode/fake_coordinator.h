// A coordinator that only knows decode nodes, for tests: it records what they send and can be restarted.
#ifndef HW_TESTS_DECODE_FAKE_COORDINATOR_H_
#define HW_TESTS_DECODE_FAKE_COORDINATOR_H_

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/rpc/server.h"
#include "headwater/v1/decode.grpc.pb.h"

namespace headwater::testing {

// Thread-safe.
class FakeCoordinator final : public v1::DecodeRegistryService::Service {
 public:
  FakeCoordinator() { Start(); }
  ~FakeCoordinator() override { Stop(); }

  // Serves on the same port each time.
  void Start() {
    server_ = *StartServer(address_, {this});
    address_ = server_.address;
  }
  void Stop() {
    if (server_.server == nullptr) return;
    server_.server->Shutdown(std::chrono::system_clock::now());
    server_.server = nullptr;
  }
  // From now on, registrations get this status, or no answer.
  void Refuse(const grpc::Status& status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    refusal_ = status;
  }
  void KeepSilent(bool silent) {
    const std::lock_guard<std::mutex> lock(mutex_);
    silent_ = silent;
  }

  bool WaitForRegistrations(size_t count) {
    return Wait([&] { return registrations_.size() >= count; });
  }
  bool WaitForHeartbeats(size_t count) {
    return Wait([&] { return heartbeats_.size() >= count; });
  }
  bool WaitForStreamsEnded(size_t count) {
    return Wait([&] { return streams_ended_ >= count; });
  }
  std::vector<v1::DecodeRegistration> registrations() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return registrations_;
  }
  std::vector<v1::DecodeHeartbeat> heartbeats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return heartbeats_;
  }
  const std::string& address() const { return address_; }

  grpc::Status Register(
      grpc::ServerContext* /*context*/,
      grpc::ServerReaderWriter<v1::RegisterResponse, v1::RegisterRequest>* stream) override {
    v1::RegisterRequest request;
    while (stream->Read(&request)) {
      std::unique_lock<std::mutex> lock(mutex_);
      if (request.has_heartbeat()) heartbeats_.push_back(request.heartbeat());
      if (request.has_registration()) registrations_.push_back(request.registration());
      changed_.notify_all();
      if (!refusal_.ok()) return refusal_;
      if (silent_ || !request.has_registration()) continue;
      lock.unlock();
      v1::RegisterResponse response;
      response.set_heartbeat_interval_ms(100);
      stream->Write(response);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    ++streams_ended_;
    changed_.notify_all();
    return grpc::Status::OK;
  }

 private:
  template <typename Condition>
  bool Wait(Condition condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(60), condition);
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool silent_ = false;
  grpc::Status refusal_;
  std::vector<v1::DecodeRegistration> registrations_;
  std::vector<v1::DecodeHeartbeat> heartbeats_;
  size_t streams_ended_ = 0;
  std::string address_ = "127.0.0.1:0";
  RunningServer server_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_DECODE_FAKE_COORDINATOR_H_
