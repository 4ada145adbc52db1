#include "worker/control_client.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include <grpcpp/client_context.h>

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "headwater/v1/worker.grpc.pb.h"
#include "worker/assignment_queue.h"

namespace headwater {
namespace {

using Stream = grpc::ClientReaderWriter<v1::ConnectRequest, v1::ConnectResponse>;

// A coordinator that takes nothing more is disconnected.
constexpr size_t kMaxOutbox = 2048;
constexpr absl::Duration kDefaultHeartbeat = absl::Seconds(1);
constexpr absl::Duration kLeastHeartbeat = absl::Milliseconds(20);
constexpr absl::Duration kMostHeartbeat = absl::Seconds(60);
constexpr absl::Duration kFlushTimeout = absl::Seconds(2);
// Of assignments that share a pass, in one progress interval.
constexpr size_t kReportsPerInterval = 8;

// An assignment's name: request id and epoch.
using JobName = std::pair<std::string, uint32_t>;

template <typename Report>
JobName NameOf(const Report& report) {
  return {report.request_id(), report.epoch()};
}

class GrpcControlClient final : public ControlClient {
 public:
  GrpcControlClient(const ControlClientOptions& options, AssignmentRunner* runner)
      : options_(options),
        runner_(runner),
        stub_(v1::WorkerControlService::NewStub(
            DialPrivate(options.coordinator, options.transport.get(), Role::kCoordinator))),
        queue_(runner, options.max_queued,
               [this](uint64_t stream, v1::ConnectRequest message) { Post(stream, std::move(message)); }),
        thread_([this] { ConnectForever(); }) {}

  ~GrpcControlClient() override { Stop(); }

  bool Drain(absl::Duration timeout) override;
  bool drain_requested() const override {
    absl::MutexLock lock(&mutex_);
    return drain_requested_;
  }
  void Stop() override;
  absl::Duration StepAge() const override { return queue_.StepAge(); }
  bool registered() const override {
    absl::MutexLock lock(&mutex_);
    return registered_;
  }

 private:
  // Everything of one stream that its reader, its writer and Post() share.
  void ConnectForever();
  absl::Status RunStream();
  void ReadLoop(Stream* stream, uint64_t number);
  bool Handle(v1::ConnectResponse* response, uint64_t number);
  void WriteLoop(Stream* stream);
  std::optional<v1::ConnectRequest> NextMessage(bool* close) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Duration UntilNextMessage() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool Woken() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stream_over_ || closing_ || !outbox_.empty() || posted_progress_ || heartbeat_now_;
  }
  // Puts the job's progress, if it has any to tell, behind what is to be sent.
  void TakeProgress(const JobName& name) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  v1::ConnectRequest Heartbeat();
  void Post(uint64_t stream, v1::ConnectRequest message);
  void CancelStream() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (context_ != nullptr) context_->TryCancel();
  }

  const ControlClientOptions options_;
  AssignmentRunner* const runner_;
  const std::unique_ptr<v1::WorkerControlService::Stub> stub_;
  const Clock* const clock_ = Clock::Real();

  mutable absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  // Drained: the writer ends the stream once the outbox is empty, and no new one is made.
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  bool drain_requested_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  // A draining worker does not wait for its next beat to say so.
  bool heartbeat_now_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t stream_ ABSL_GUARDED_BY(mutex_) = 0;  // number of the current stream
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;
  bool registered_ ABSL_GUARDED_BY(mutex_) = false;
  bool stream_over_ ABSL_GUARDED_BY(mutex_) = true;
  absl::Time stream_start_ ABSL_GUARDED_BY(mutex_);
  absl::Duration heartbeat_interval_ ABSL_GUARDED_BY(mutex_) = kDefaultHeartbeat;
  absl::Time next_heartbeat_ ABSL_GUARDED_BY(mutex_);
  absl::Time next_progress_ ABSL_GUARDED_BY(mutex_);
  std::deque<v1::ConnectRequest> outbox_ ABSL_GUARDED_BY(mutex_);
  // The latest of each assignment that runs; an older one that was not sent yet is of no use.
  std::map<JobName, v1::RankProgress> progress_ ABSL_GUARDED_BY(mutex_);
  // What was posted last; where its assignment runs alone, heartbeats repeat it with the bytes acknowledged
  // since.
  std::optional<v1::RankProgress> last_progress_ ABSL_GUARDED_BY(mutex_);
  bool posted_progress_ ABSL_GUARDED_BY(mutex_) = false;

  AssignmentQueue queue_;
  std::thread thread_;
};

void GrpcControlClient::Post(uint64_t stream, v1::ConnectRequest message) {
  absl::MutexLock lock(&mutex_);
  if (stream != stream_ || stream_over_) return;
  if (message.has_progress()) {
    const v1::RankProgress& progress = message.progress();
    const JobName name = NameOf(progress);
    const bool same = last_progress_.has_value() && NameOf(*last_progress_) == name;
    const bool new_checkpoint =
        progress.checkpoint().layer() > (same ? last_progress_->checkpoint().layer() : 0);
    last_progress_ = progress;
    progress_[name] = progress;
    if (!new_checkpoint) {
      posted_progress_ = clock_->Now() >= next_progress_;
      return;
    }
    // None is left out: the ranks' checkpoints must meet.
    TakeProgress(name);
  } else {
    // What the rank did last comes before its end.
    const JobName ended = message.has_completed() ? NameOf(message.completed()) : NameOf(message.failed());
    TakeProgress(ended);
    if (last_progress_.has_value() && NameOf(*last_progress_) == ended) last_progress_.reset();
    outbox_.push_back(std::move(message));
  }
  if (outbox_.size() > kMaxOutbox) {
    HW_LOG(WARNING) << "the coordinator takes no messages, " << outbox_.size() << " wait; disconnecting";
    CancelStream();
  }
}

void GrpcControlClient::TakeProgress(const JobName& name) {
  auto last = progress_.extract(name);
  if (!last) return;
  *outbox_.emplace_back().mutable_progress() = std::move(last.mapped());
  if (progress_.empty()) posted_progress_ = false;
}

v1::ConnectRequest GrpcControlClient::Heartbeat() {
  v1::ConnectRequest message;
  const absl::Duration age = queue_.StepAge();
  message.mutable_heartbeat()->set_last_step_age_ms(static_cast<uint64_t>(absl::ToInt64Milliseconds(age)));
  const AssignmentRunner::KvBytes kv_bytes = runner_->kv_bytes();
  message.mutable_heartbeat()->set_kv_unacked_bytes(kv_bytes.unacked);
  {
    absl::MutexLock lock(&mutex_);
    message.mutable_heartbeat()->set_draining(draining_);
    if (last_progress_.has_value() && kv_bytes.acked > last_progress_->bytes_acked()) {
      last_progress_->set_bytes_acked(kv_bytes.acked);
      progress_[NameOf(*last_progress_)] = *last_progress_;
    }
  }
  if (options_.metrics != nullptr) options_.metrics->last_step_age.Set(absl::ToDoubleSeconds(age));
  return message;
}

absl::Duration GrpcControlClient::UntilNextMessage() const {
  absl::Time next = registered_ ? next_heartbeat_ : stream_start_ + options_.registration_timeout;
  if (!progress_.empty()) next = std::min(next, next_progress_);
  return next - clock_->Now();
}

// Waits until there is something to send; none: the stream is over or to be closed (`close`).
std::optional<v1::ConnectRequest> GrpcControlClient::NextMessage(bool* close) {
  while (true) {
    const absl::Duration until_deadline = queue_.EnforceDeadline();
    bool heartbeat = false;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(this, &GrpcControlClient::Woken),
                              std::min(until_deadline, UntilNextMessage()));
      const absl::Time now = clock_->Now();
      if (stream_over_) return std::nullopt;
      if (!outbox_.empty()) {
        v1::ConnectRequest message = std::move(outbox_.front());
        outbox_.pop_front();
        return message;
      }
      if (closing_) {
        *close = true;
        return std::nullopt;
      }
      posted_progress_ = false;
      if (!progress_.empty() && now >= next_progress_) {
        const size_t intervals = (progress_.size() + kReportsPerInterval - 1) / kReportsPerInterval;
        next_progress_ = now + options_.progress_interval * static_cast<double>(intervals);
        for (auto& [name, report] : progress_) *outbox_.emplace_back().mutable_progress() = std::move(report);
        progress_.clear();
        continue;
      }
      if (registered_ && (heartbeat_now_ || now >= next_heartbeat_)) {
        heartbeat_now_ = false;
        next_heartbeat_ = now + heartbeat_interval_;
        heartbeat = true;
      } else if (!registered_ && now >= stream_start_ + options_.registration_timeout) {
        HW_LOG(WARNING) << "the coordinator did not answer the registration within "
                        << absl::FormatDuration(options_.registration_timeout);
        CancelStream();
        return std::nullopt;
      }
    }
    if (heartbeat) return Heartbeat();
  }
}

void GrpcControlClient::WriteLoop(Stream* stream) {
  bool close = false;
  while (true) {
    const std::optional<v1::ConnectRequest> message = NextMessage(&close);
    if (!message.has_value()) break;
    // False: the stream is broken; the reader learns it, too.
    if (!stream->Write(*message)) return;
  }
  if (close) stream->WritesDone();
}

bool GrpcControlClient::Handle(v1::ConnectResponse* response, uint64_t number) {
  if (response->has_registered()) {
    absl::MutexLock lock(&mutex_);
    const uint32_t asked = response->registered().heartbeat_interval_ms();
    heartbeat_interval_ = asked == 0 ? kDefaultHeartbeat
                                     : std::clamp(absl::Milliseconds(asked), kLeastHeartbeat, kMostHeartbeat);
    next_heartbeat_ = clock_->Now() + heartbeat_interval_;
    registered_ = true;
    heartbeat_now_ = draining_;
    posted_progress_ = true;  // wakes the writer, whose next moment has changed
    return true;
  }
  if (!registered()) {
    HW_LOG(WARNING) << "the coordinator sent an assignment before it accepted the registration";
    return false;
  }
  if (response->has_assignment()) queue_.Add(number, std::move(*response->mutable_assignment()));
  if (response->has_drain()) {
    absl::MutexLock lock(&mutex_);
    drain_requested_ = true;
  }
  if (response->has_abort()) queue_.Abort(number, response->abort());
  return true;
}

void GrpcControlClient::ReadLoop(Stream* stream, uint64_t number) {
  v1::ConnectResponse response;
  while (stream->Read(&response)) {
    if (!Handle(&response, number)) {
      absl::MutexLock lock(&mutex_);
      CancelStream();
      return;
    }
  }
}

// One stream from its start to its end.
absl::Status GrpcControlClient::RunStream() {
  grpc::ClientContext context;
  uint64_t number = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (stopping_ || closing_) return absl::CancelledError("stopping");
    number = ++stream_;
    context_ = &context;
    registered_ = false;
    stream_over_ = false;
    stream_start_ = clock_->Now();
    next_progress_ = stream_start_;
  }
  const std::unique_ptr<Stream> stream = stub_->Connect(&context);
  v1::ConnectRequest hello;
  *hello.mutable_registration() = options_.registration;
  if (stream->Write(hello)) {
    std::thread writer([&] { WriteLoop(stream.get()); });
    ReadLoop(stream.get(), number);
    {
      absl::MutexLock lock(&mutex_);
      stream_over_ = true;
    }
    writer.join();
  }
  const absl::Status status = FromGrpcStatus(stream->Finish());
  {
    absl::MutexLock lock(&mutex_);
    context_ = nullptr;
    registered_ = false;
    stream_over_ = true;
    outbox_.clear();
    progress_.clear();
    last_progress_.reset();
  }
  queue_.DropAll(MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED,
                           "the control stream to the coordinator broke"));
  return status;
}

void GrpcControlClient::ConnectForever() {
  std::minstd_rand random{std::random_device{}()};
  absl::Duration backoff = options_.min_backoff;
  std::string complaint;
  while (true) {
    const absl::Time start = clock_->Now();
    const absl::Status status = RunStream();
    absl::MutexLock lock(&mutex_);
    if (stopping_ || closing_) return;
    // A stream that lived proves that the coordinator was well.
    const bool lived = clock_->Now() - start > options_.max_backoff;
    if (lived) backoff = options_.min_backoff;
    const std::string why = status.ok() ? "the coordinator closed it" : status.ToString();
    // The same trouble is told once.
    if (lived || why != complaint) {
      HW_LOG(WARNING).Field("coordinator", options_.coordinator)
          << "no control stream: " << why << "; trying again until it works";
    }
    complaint = why;
    const double jitter = std::uniform_real_distribution<double>(0.5, 1.0)(random);
    mutex_.AwaitWithTimeout(absl::Condition(
                                +[](GrpcControlClient* self) ABSL_EXCLUSIVE_LOCKS_REQUIRED(self->mutex_) {
                                  return self->stopping_ || self->closing_;
                                },
                                this),
                            backoff * jitter);
    if (stopping_ || closing_) return;
    backoff = std::min(2 * backoff, options_.max_backoff);
  }
}

bool GrpcControlClient::Drain(absl::Duration timeout) {
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    heartbeat_now_ = registered_;
  }
  queue_.StartDraining();
  const bool finished = queue_.WaitIdle(timeout);
  absl::MutexLock lock(&mutex_);
  if (finished) {
    // Results that were posted leave before the stream ends.
    closing_ = true;
    if (!registered_) CancelStream();
    mutex_.AwaitWithTimeout(absl::Condition(
                                +[](GrpcControlClient* self) ABSL_EXCLUSIVE_LOCKS_REQUIRED(self->mutex_) {
                                  return self->stream_over_;
                                },
                                this),
                            kFlushTimeout);
  }
  return finished;
}

void GrpcControlClient::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    CancelStream();
  }
  queue_.Stop();
  if (thread_.joinable()) thread_.join();
}

}  // namespace

std::unique_ptr<ControlClient> ControlClient::Start(const ControlClientOptions& options,
                                                    AssignmentRunner* runner) {
  return std::make_unique<GrpcControlClient>(options, runner);
}

}  // namespace headwater
