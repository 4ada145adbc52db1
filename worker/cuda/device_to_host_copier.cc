#include "worker/cuda/device_to_host_copier.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

#include "base/status_macros.h"
#include "model/cuda/device_buffer.h"
#include "worker/cuda/cuda_layer_log.h"

namespace headwater {
namespace {

constexpr uint64_t kPiece = uint64_t{16} << 20;
// New pages are what takes the time, and each thread gets its own.
constexpr int kThreads = 4;
constexpr uint64_t kLeastOfThread = uint64_t{1} << 20;
constexpr absl::Duration kPoll = absl::Microseconds(50);

void CopyInParallel(char* to, const char* from, uint64_t bytes) {
  const uint64_t share = std::max(kLeastOfThread, (bytes + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (uint64_t at = share; at < bytes; at += share) {
    threads.emplace_back([=] { std::memcpy(to + at, from + at, std::min(share, bytes - at)); });
  }
  std::memcpy(to, from, std::min(share, bytes));
  for (std::thread& thread : threads) thread.join();
}

class Copier final : public DeviceToHostCopier {
 public:
  absl::Status Init() {
    HW_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device_), "cudaGetDevice"));
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
    for (Buffer& buffer : buffers_) {
      HW_ASSIGN_OR_RETURN(buffer.memory, DeviceBuffer::AllocatePinned(kPiece, "checkpoints"));
      HW_RETURN_IF_ERROR(buffer.arrived.Create(cudaEventDisableTiming));
    }
    thread_ = std::thread([this] { Run(); });
    return absl::OkStatus();
  }

  ~Copier() override {
    if (thread_.joinable()) {
      {
        absl::MutexLock lock(&mutex_);
        stop_ = true;
      }
      thread_.join();
    }
    if (stream_ == nullptr) return;
    (void)cudaStreamSynchronize(stream_);
    (void)cudaStreamDestroy(stream_);
  }

  absl::Status Add(cudaStream_t after, const void* from, void* to, uint64_t bytes) override {
    if (bytes == 0) return absl::OkStatus();
    Job job{std::make_unique<CudaEvent>(), static_cast<const char*>(from), static_cast<char*>(to), bytes};
    HW_RETURN_IF_ERROR(job.ready->Create(cudaEventDisableTiming));
    HW_RETURN_IF_ERROR(job.ready->Record(after));
    absl::MutexLock lock(&mutex_);
    jobs_.push_back(std::move(job));
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> copied() const override {
    absl::MutexLock lock(&mutex_);
    if (!status_.ok()) return status_;
    return copied_;
  }

 private:
  struct Job {
    std::unique_ptr<CudaEvent> ready;
    const char* from = nullptr;
    char* to = nullptr;
    uint64_t bytes = 0;
  };
  struct Buffer {
    DeviceBuffer memory;
    CudaEvent arrived;
    char* to = nullptr;
    uint64_t bytes = 0;
  };

  bool Stopped() const {
    absl::MutexLock lock(&mutex_);
    return stop_;
  }

  void Run() {
    absl::Status status = FromCuda(cudaSetDevice(device_), "cudaSetDevice");
    Job job;
    while (status.ok() && NextJob(&job)) status = Copy(job);
    absl::MutexLock lock(&mutex_);
    if (status_.ok()) status_ = status;
  }

  // False: stopped.
  bool NextJob(Job* job) {
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(
        +[](Copier* self)
             ABSL_EXCLUSIVE_LOCKS_REQUIRED(self->mutex_) { return self->stop_ || !self->jobs_.empty(); },
        this));
    if (stop_) return false;
    *job = std::move(jobs_.front());
    jobs_.pop_front();
    return true;
  }

  // While one piece is copied on the host the next one comes from the device.
  absl::Status Copy(const Job& job) {
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamWaitEvent(stream_, job.ready->get(), 0), "a checkpoint"));
    size_t next = 0;
    for (uint64_t begun = 0; begun < job.bytes; next = 1 - next) {
      Buffer& buffer = buffers_[next];
      HW_RETURN_IF_ERROR(TakeOut(&buffer));
      buffer.bytes = std::min(kPiece, job.bytes - begun);
      buffer.to = job.to + begun;
      HW_RETURN_IF_ERROR(FromCuda(cudaMemcpyAsync(buffer.memory.data(), job.from + begun, buffer.bytes,
                                                  cudaMemcpyDeviceToHost, stream_),
                                  "a checkpoint"));
      HW_RETURN_IF_ERROR(buffer.arrived.Record(stream_));
      begun += buffer.bytes;
    }
    HW_RETURN_IF_ERROR(TakeOut(&buffers_[next]));
    return TakeOut(&buffers_[1 - next]);
  }

  absl::Status TakeOut(Buffer* buffer) {
    if (buffer->bytes == 0) return absl::OkStatus();
    while (true) {
      const cudaError_t state = cudaEventQuery(buffer->arrived.get());
      if (state == cudaSuccess) break;
      if (state != cudaErrorNotReady) return FromCuda(state, "a checkpoint");
      (void)cudaGetLastError();
      if (Stopped()) return absl::CancelledError("checkpoints end");
      absl::SleepFor(kPoll);
    }
    CopyInParallel(buffer->to, buffer->memory.data(), buffer->bytes);
    absl::MutexLock lock(&mutex_);
    copied_ += std::exchange(buffer->bytes, 0);
    return absl::OkStatus();
  }

  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  Buffer buffers_[2];
  std::thread thread_;
  mutable absl::Mutex mutex_;
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mutex_);  // two a slice
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t copied_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceToHostCopier>> DeviceToHostCopier::Start() {
  auto copier = std::make_unique<Copier>();
  HW_RETURN_IF_ERROR(copier->Init());
  return std::unique_ptr<DeviceToHostCopier>(std::move(copier));
}

}  // namespace headwater
