#include "kvtransfer/receiver.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include <grpcpp/alarm.h>
#include <grpcpp/support/server_callback.h>

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "headwater/v1/kv.grpc.pb.h"
#include "kvtransfer/frame.h"

namespace headwater {
namespace {

constexpr std::chrono::seconds kHelloTimeout(10);
// Acknowledgements that may wait while one is being written; no block is read meanwhile.
constexpr size_t kMostPendingAcks = 256;
constexpr int kMostStreams = 4096;
constexpr size_t kMostQueuedCalls = 256;

struct Instruments {
  Instruments(Metrics* metrics, KvSink sink)
      : bytes(metrics->Counter("headwater_kv_ingress_bytes_total",
                               "KV payload bytes stored, or verified and dropped (--sink=verify).")),
        stored(Blocks(metrics, sink == KvSink::kVerify ? "verified" : "stored")),
        duplicate(Blocks(metrics, "duplicate")),
        corrupt(Blocks(metrics, "corrupt")),
        stale_epoch(Blocks(metrics, "stale_epoch")),
        refused(Blocks(metrics, "refused")) {}
  static prometheus::Counter& Blocks(Metrics* metrics, const char* result) {
    return metrics->Counter("headwater_kv_ingress_blocks_total", "KV blocks received, by result.",
                            {{"result", result}});
  }
  void Count(PutResult result, uint64_t payload_bytes) {
    switch (result) {
      case PutResult::kStored:
        stored.Increment();
        bytes.Increment(static_cast<double>(payload_bytes));
        break;
      case PutResult::kAlreadyStored:
        duplicate.Increment();
        break;
      case PutResult::kCorrupt:
        corrupt.Increment();
        break;
      case PutResult::kStaleEpoch:
        stale_epoch.Increment();
        break;
      case PutResult::kRefused:
        refused.Increment();
        break;
    }
  }
  prometheus::Counter& bytes;
  prometheus::Counter& stored;
  prometheus::Counter& duplicate;
  prometheus::Counter& corrupt;
  prometheus::Counter& stale_epoch;
  prometheus::Counter& refused;
};

// Runs the unary calls, which allocate, free and hash whole caches, away from gRPC's few callback threads.
class CallThread {
 public:
  CallThread() : thread_([this] { Run(); }) {}
  ~CallThread() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  // False: too many wait.
  bool Add(std::function<void()> call) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (calls_.size() >= kMostQueuedCalls) return false;
      calls_.push_back(std::move(call));
    }
    changed_.notify_all();
    return true;
  }

 private:
  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopped_ || !calls_.empty(); });
      if (calls_.empty()) return;
      const std::function<void()> call = std::move(calls_.front());
      calls_.pop_front();
      lock.unlock();
      call();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> calls_;
  bool stopped_ = false;
  std::thread thread_;
};

struct Shared {
  Shared(KvStore* the_store, Metrics* metrics) : store(the_store), instruments(metrics, the_store->sink()) {}
  KvStore* const store;
  Instruments instruments;
  std::atomic<int> streams{0};
};

absl::Status BadField(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD, message);
}

// One PushBlocks stream: at most one message being read, one being written, and a bounded list of
// acknowledgements between them. gRPC's Start and Finish functions are called under the mutex, so that none
// comes after Finish; none of them runs a reaction before it returns.
class PushReactor final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  explicit PushReactor(Shared* shared) : shared_(shared) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (++shared_->streams > kMostStreams) {
      EndLocked(MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL,
                          absl::StrCat("this node has ", kMostStreams, " KV streams already")));
    } else {
      ++owners_;
      hello_alarm_.Set(std::chrono::system_clock::now() + kHelloTimeout,
                       [this](bool expired) { OnHelloAlarm(expired); });
    }
    ContinueLocked();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      // Half-closed, or the stream is over: what is to be said is said first.
      std::lock_guard<std::mutex> lock(mutex_);
      reading_ = false;
      read_closed_ = true;
      ContinueLocked();
      return;
    }
    DecodedFrame frame;
    absl::Status status = frame.Decode(received_, kMaxClientHeaderBytes);
    if (status.ok()) status = session_id_.empty() ? HandleHello(frame) : HandleBlock(frame);
    received_.Clear();
    std::lock_guard<std::mutex> lock(mutex_);
    reading_ = false;
    if (!status.ok()) EndLocked(status);
    ContinueLocked();
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    broken_ |= !ok;
    ContinueLocked();
  }

  void OnCancel() override {
    std::lock_guard<std::mutex> lock(mutex_);
    broken_ = true;
    ContinueLocked();
  }

  void OnDone() override {
    --shared_->streams;
    hello_alarm_.Cancel();
    Disown();
  }

 private:
  void OnHelloAlarm(bool expired) {
    if (expired) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!greeted_) {
        EndLocked(MakeError(absl::StatusCode::kDeadlineExceeded, v1::ERROR_REASON_DEADLINE,
                            absl::StrCat("no KvHello came within ", kHelloTimeout.count(), " s")));
        ContinueLocked();
      }
    }
    Disown();
  }

  void Disown() {
    if (--owners_ == 0) delete this;
  }

  absl::Status HandleHello(const DecodedFrame& frame) {
    if (!frame.header().has_hello()) return BadField("the first frame of a KV stream is not KvHello");
    const v1::KvHello& hello = frame.header().hello();
    absl::StatusOr<v1::KvSessionState> state = shared_->store->Hello(hello, nullptr);
    if (!state.ok()) return state.status();
    session_id_ = hello.session_id();
    epoch_ = hello.epoch();
    std::lock_guard<std::mutex> lock(mutex_);
    greeted_ = true;
    *greeting_.mutable_state() = *std::move(state);
    hello_alarm_.Cancel();
    return absl::OkStatus();
  }

  absl::Status HandleBlock(const DecodedFrame& frame) {
    if (!frame.header().has_block()) return BadField("a frame after KvHello is not KvBlock");
    const v1::KvBlock& block = frame.header().block();
    uint64_t index = 0;
    std::string error;
    PutResult result = PutResult::kRefused;
    if (block.epoch() == epoch_) {
      result = shared_->store->Put(session_id_, block, frame.payload(), &index, &error);
    } else {
      error = absl::StrCat("a block of epoch ", block.epoch(), " on a stream of epoch ", epoch_);
    }
    shared_->instruments.Count(result, frame.payload_bytes());
    std::lock_guard<std::mutex> lock(mutex_);
    switch (result) {
      case PutResult::kStored:
      case PutResult::kAlreadyStored:
        stored_.push_back(index);
        return absl::OkStatus();
      case PutResult::kCorrupt:
        corrupt_.push_back(index);
        return absl::OkStatus();
      case PutResult::kStaleEpoch:
        last_ack_.set_status(v1::KV_ACK_STATUS_STALE_EPOCH);
        last_ack_.add_block_indices(index);
        last_ack_.set_message(error);
        return MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_STALE_EPOCH, error);
      case PutResult::kRefused:
        break;
    }
    last_ack_.set_status(v1::KV_ACK_STATUS_REFUSED);
    last_ack_.set_message(error);
    return BadField(error);
  }

  // The stream ends with `status` once everything is written.
  void EndLocked(const absl::Status& status) {
    if (ending_) return;
    ending_ = true;
    end_ = status;
  }

  // Takes the next frame to write; false: there is none.
  bool NextFrameLocked(v1::KvFrameHeader* header) {
    if (greeting_.has_state()) {
      header->Swap(&greeting_);
      greeting_.Clear();
      return true;
    }
    for (auto* indices : {&stored_, &corrupt_}) {
      if (indices->empty()) continue;
      header->mutable_ack()->set_status(indices == &stored_ ? v1::KV_ACK_STATUS_STORED
                                                            : v1::KV_ACK_STATUS_CORRUPT);
      header->mutable_ack()->mutable_block_indices()->Add(indices->begin(), indices->end());
      indices->clear();
      return true;
    }
    if (last_ack_.status() == v1::KV_ACK_STATUS_UNSPECIFIED) return false;
    header->mutable_ack()->Swap(&last_ack_);
    last_ack_.Clear();
    return true;
  }

  void ContinueLocked() {
    if (finished_) return;
    v1::KvFrameHeader header;
    if (!broken_ && !writing_ && NextFrameLocked(&header)) {
      writing_ = true;
      sending_ = EncodeFrame(header);
      StartWrite(&sending_);
    }
    if (broken_ || (!writing_ && (ending_ || read_closed_))) {
      finished_ = true;
      if (!end_.ok()) HW_LOG(WARNING).Field("epoch", epoch_) << "KV stream ended: " << end_.message();
      Finish(ToGrpcStatus(broken_ && end_.ok() ? absl::CancelledError("the KV stream was cancelled") : end_));
      return;
    }
    if (!reading_ && !ending_ && !read_closed_ && stored_.size() + corrupt_.size() < kMostPendingAcks) {
      reading_ = true;
      StartRead(&received_);
    }
  }

  Shared* const shared_;
  // OnDone and the alarm each own the reactor until they have run.
  std::atomic<int> owners_{1};
  grpc::Alarm hello_alarm_;

  // Of the one read under way and its reaction.
  grpc::ByteBuffer received_;
  std::string session_id_;
  uint32_t epoch_ = 0;

  std::mutex mutex_;
  grpc::ByteBuffer sending_;
  v1::KvFrameHeader greeting_;
  std::vector<uint64_t> stored_;
  std::vector<uint64_t> corrupt_;
  v1::KvAck last_ack_;
  absl::Status end_;
  bool greeted_ = false;
  bool reading_ = false;
  bool read_closed_ = false;
  bool writing_ = false;
  bool broken_ = false;
  bool ending_ = false;
  bool finished_ = false;
};

using Service = v1::KvTransferService;
using CallbackService = Service::WithRawCallbackMethod_PushBlocks<Service::WithCallbackMethod_OpenSession<
    Service::WithCallbackMethod_CommitSession<Service::WithCallbackMethod_AbortSession<Service::Service>>>>;

class KvReceiver final : public CallbackService {
 public:
  KvReceiver(KvStore* store, Metrics* metrics) : shared_(store, metrics) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* PushBlocks(
      grpc::CallbackServerContext*) override {
    return new PushReactor(&shared_);
  }

  grpc::ServerUnaryReactor* OpenSession(grpc::CallbackServerContext* context,
                                        const v1::OpenSessionRequest* request,
                                        v1::OpenSessionResponse* response) override {
    return Run(context, [this, request, response]() -> absl::Status {
      HW_ASSIGN_OR_RETURN(const uint64_t bytes, shared_.store->OpenSession(*request));
      response->set_bytes_reserved(bytes);
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* CommitSession(grpc::CallbackServerContext* context,
                                          const v1::CommitSessionRequest* request,
                                          v1::CommitSessionResponse* response) override {
    return Run(context, [this, request, response]() -> absl::Status {
      HW_ASSIGN_OR_RETURN(*response, shared_.store->Commit(*request));
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* AbortSession(grpc::CallbackServerContext* context,
                                         const v1::AbortSessionRequest* request,
                                         v1::AbortSessionResponse* response) override {
    return Run(context, [this, request, response]() -> absl::Status {
      HW_ASSIGN_OR_RETURN(const uint64_t bytes, shared_.store->Abort(*request));
      response->set_bytes_reclaimed(bytes);
      return absl::OkStatus();
    });
  }

 private:
  grpc::ServerUnaryReactor* Run(grpc::CallbackServerContext* context, std::function<absl::Status()> call) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const bool added =
        calls_.Add([reactor, call = std::move(call)] { reactor->Finish(ToGrpcStatus(call())); });
    if (!added) {
      reactor->Finish(ToGrpcStatus(
          WithRetryAfter(MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_FULL,
                                   absl::StrCat(kMostQueuedCalls, " KV session calls wait already")),
                         absl::Seconds(1))));
    }
    return reactor;
  }

  Shared shared_;
  CallThread calls_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeKvReceiver(KvStore* store, Metrics* metrics) {
  return std::make_unique<KvReceiver>(store, metrics);
}

}  // namespace headwater
