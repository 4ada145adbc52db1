// GpuPacer: keeps what is enqueued on a stream short, so that a cancelled job leaves the device soon.
#ifndef HW_WORKER_CUDA_GPU_PACER_H_
#define HW_WORKER_CUDA_GPU_PACER_H_

#include <chrono>
#include <functional>
#include <thread>
#include <utility>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

#include "base/status_macros.h"
#include "model/cuda/device_buffer.h"

namespace headwater {

class GpuPacer {
 public:
  // step: the loop's heartbeat; an error ends it. polls: it is called while the device is waited for, too,
  // which may never get done where it waits for others.
  GpuPacer(std::function<absl::Status()> step, bool polls) : step_(std::move(step)), polls_(polls) {}
  ~GpuPacer() {
    for (const cudaEvent_t event : events_) {
      if (event != nullptr) (void)cudaEventDestroy(event);
    }
  }
  GpuPacer(const GpuPacer&) = delete;
  GpuPacer& operator=(const GpuPacer&) = delete;

  absl::Status Init(cudaStream_t stream) {
    stream_ = stream;
    for (cudaEvent_t& event : events_) {
      // The thread sleeps while it waits.
      HW_RETURN_IF_ERROR(FromCuda(
          cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "an event"));
    }
    return absl::OkStatus();
  }

  // `flop` more have been enqueued, in a few launches. Waits until no more than kMarks marks of kFlopPerMark
  // are ahead of the device. The job's error, or the device's.
  absl::Status Enqueued(double flop) {
    HW_RETURN_IF_ERROR(step_());
    flop_ += flop;
    ++calls_;
    if (flop_ < kFlopPerMark && (!polls_ || calls_ < kCallsPerMark)) return absl::OkStatus();
    flop_ = 0;
    calls_ = 0;
    cudaEvent_t& event = events_[marks_++ % kMarks];
    // Set kMarks marks ago, or never.
    if (polls_) HW_RETURN_IF_ERROR(Poll([&] { return cudaEventQuery(event); }));
    HW_RETURN_IF_ERROR(FromCuda(cudaEventSynchronize(event), "the device"));
    HW_RETURN_IF_ERROR(FromCuda(cudaEventRecord(event, stream_), "an event"));
    return step_();
  }

  // Waits until all that is enqueued has run.
  absl::Status Drain() {
    if (polls_) HW_RETURN_IF_ERROR(Poll([&] { return cudaStreamQuery(stream_); }));
    return FromCuda(cudaStreamSynchronize(stream_), "the device");
  }

 private:
  static constexpr std::chrono::microseconds kPollInterval{200};

  template <typename Query>
  absl::Status Poll(const Query& query) const {
    cudaError_t state;
    while ((state = query()) == cudaErrorNotReady) {
      (void)cudaGetLastError();  // no failure: the next launch must not take it for its own
      HW_RETURN_IF_ERROR(step_());
      std::this_thread::sleep_for(kPollInterval);
    }
    return FromCuda(state, "the device");
  }

  static constexpr unsigned kMarks = 2;
  static constexpr double kFlopPerMark = 5e12;  // about 8 ms of an H100
  // A thread that enqueues more launches than CUDA queues waits in there, and would not see a lost peer.
  static constexpr int kCallsPerMark = 16;

  const std::function<absl::Status()> step_;
  const bool polls_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t events_[kMarks] = {};
  unsigned marks_ = 0;
  double flop_ = 0;
  int calls_ = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_GPU_PACER_H_
