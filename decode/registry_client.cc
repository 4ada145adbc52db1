#include "decode/registry_client.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "headwater/v1/decode.grpc.pb.h"

namespace headwater {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(100);
constexpr absl::Duration kDefaultInterval = absl::Seconds(2);
constexpr absl::Duration kLeastInterval = absl::Milliseconds(100);
constexpr absl::Duration kMostInterval = absl::Seconds(60);

absl::Duration IntervalOf(const v1::RegisterResponse& response) {
  if (response.heartbeat_interval_ms() == 0) return kDefaultInterval;
  return std::clamp(absl::Milliseconds(response.heartbeat_interval_ms()), kLeastInterval, kMostInterval);
}

// One Register stream, from its start to its end. gRPC's threads report events, the client's thread waits for
// them.
class RegisterStream final : public grpc::ClientBidiReactor<v1::RegisterRequest, v1::RegisterResponse> {
 public:
  RegisterStream(v1::DecodeRegistryService::Stub* stub, const v1::DecodeRegistration& registration) {
    *outgoing_.mutable_registration() = registration;
    stub->async()->Register(&context_, this);
    StartRead(&incoming_);
    StartWrite(&outgoing_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!ok) return;
    answered_ = true;
    interval_ = IntervalOf(incoming_);
    StartRead(&incoming_);
    changed_.notify_all();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    // A write that failed ends the stream: OnDone() tells why.
    writing_ = !ok;
    changed_.notify_all();
  }

  void OnDone(const grpc::Status& status) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    status_ = FromGrpcStatus(status);
    done_ = true;
    changed_.notify_all();
  }

  // False: the stream has ended, or `timeout` passed without an answer.
  bool WaitAnswered(absl::Duration timeout) {
    return Wait(timeout, [this] { return done_ || answered_; }) && !Done();
  }
  // True: the stream has ended.
  bool WaitDone(absl::Duration timeout) {
    return Wait(timeout, [this] { return done_; });
  }
  // False: the message before it is not taken yet after `timeout`, or the stream has ended.
  bool Send(const v1::DecodeHeartbeat& heartbeat, absl::Duration timeout) {
    if (!Wait(timeout, [this] { return done_ || !writing_; })) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (done_) return false;
    *outgoing_.mutable_heartbeat() = heartbeat;
    writing_ = true;
    StartWrite(&outgoing_);
    return true;
  }
  // Cancels what is left of the stream and returns its status. The object may go afterwards.
  absl::Status End() {
    context_.TryCancel();
    std::unique_lock<std::mutex> lock(mutex_);
    // gRPC ends a cancelled call without the peer's help.
    changed_.wait(lock, [this] { return done_; });
    return status_;
  }

  absl::Duration interval() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return interval_;
  }

 private:
  template <typename Condition>
  bool Wait(absl::Duration timeout, Condition condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), condition);
  }
  bool Done() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return done_;
  }

  grpc::ClientContext context_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_, but for the messages while gRPC has them.
  v1::RegisterRequest outgoing_;
  v1::RegisterResponse incoming_;
  bool writing_ = true;
  bool answered_ = false;
  bool done_ = false;
  absl::Duration interval_ = kDefaultInterval;
  absl::Status status_;
};

class GrpcRegistryClient final : public RegistryClient {
 public:
  explicit GrpcRegistryClient(const Options& options)
      : options_(options),
        connected_gauge_(options.metrics->Gauge("headwater_decode_registered",
                                                "1 while the coordinator has this node registered.")),
        channel_(DialPrivate(options.coordinator, options.transport.get(), Role::kCoordinator)),
        stub_(v1::DecodeRegistryService::NewStub(channel_)),
        thread_([this] { Run(); }) {}

  ~GrpcRegistryClient() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    stop_.notify_all();
    thread_.join();
  }

  bool connected() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return connected_;
  }

 private:
  void Run() {
    absl::Duration backoff = kFirstBackoff;
    std::minstd_rand random(std::random_device{}());
    std::string last_error;
    while (!Stopping(absl::ZeroDuration())) {
      bool was_connected = false;
      const absl::Status status = RunStream(&was_connected);
      SetConnected(false);
      if (Stopping(absl::ZeroDuration())) return;
      if (was_connected) backoff = kFirstBackoff;
      // A coordinator that is down gives the same error every few seconds: one line is enough.
      const std::string error = status.ToString();
      if (was_connected || error != last_error) {
        HW_LOG(WARNING).Field("coordinator", options_.coordinator)
            << "not registered with the coordinator, trying again: " << error;
      }
      last_error = error;
      if (Stopping(backoff * std::uniform_real_distribution<double>(0.5, 1.0)(random))) return;
      backoff = std::min(2 * backoff, options_.max_backoff);
    }
  }

  // One stream from dialling to its end.
  absl::Status RunStream(bool* was_connected) {
    RegisterStream stream(stub_.get(), options_.registration);
    const absl::Time give_up = Clock::Real()->Now() + options_.answer_timeout;
    while (!stream.WaitAnswered(kStopCheck)) {
      if (stream.WaitDone(absl::ZeroDuration())) return stream.End();
      if (Stopping(absl::ZeroDuration())) return stream.End();
      if (Clock::Real()->Now() >= give_up) {
        (void)stream.End();
        return absl::DeadlineExceededError(
            absl::StrCat("no answer to the registration in ", absl::FormatDuration(options_.answer_timeout)));
      }
    }
    *was_connected = true;
    SetConnected(true);
    HW_LOG(INFO).Field("coordinator", options_.coordinator) << "registered with the coordinator";
    while (true) {
      if (!stream.Send(options_.heartbeat(), options_.answer_timeout)) return stream.End();
      absl::Duration left = stream.interval();
      while (left > absl::ZeroDuration()) {
        const absl::Duration part = std::min(left, kStopCheck);
        if (stream.WaitDone(part) || Stopping(absl::ZeroDuration())) return stream.End();
        left -= part;
      }
    }
  }

  // Waits up to `timeout` for the end of the client; true: it has come.
  bool Stopping(absl::Duration timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    return stop_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [this] { return stopping_; });
  }

  void SetConnected(bool connected) {
    const std::lock_guard<std::mutex> lock(mutex_);
    connected_ = connected;
    connected_gauge_.Set(connected ? 1 : 0);
  }

  static constexpr absl::Duration kStopCheck = absl::Milliseconds(100);

  const Options options_;
  prometheus::Gauge& connected_gauge_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::DecodeRegistryService::Stub> stub_;
  mutable std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;   // guarded by mutex_
  bool connected_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace

std::unique_ptr<RegistryClient> RegistryClient::Start(const Options& options) {
  return std::make_unique<GrpcRegistryClient>(options);
}

}  // namespace headwater
