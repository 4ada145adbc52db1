#include "worker/cuda/inprocess_device_group.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

#include "base/clock.h"
#include "base/status_macros.h"
#include "model/cuda/device_buffer.h"

namespace headwater {
namespace {

constexpr absl::Duration kPoll = absl::Microseconds(50);

// What a rank tells the others of one exchange.
struct Announced {
  std::vector<DeviceParts> send;
  cudaEvent_t ready = nullptr;   // the parts are whole
  cudaEvent_t copied = nullptr;  // it has taken those of the others
};

struct State {
  State(int size, absl::Duration limit) : world_size(size), timeout(limit) {}
  ~State() {
    for (const cudaEvent_t event : events) (void)cudaEventDestroy(event);
  }

  const int world_size;
  const absl::Duration timeout;
  absl::Mutex mutex;
  absl::Status status ABSL_GUARDED_BY(mutex);
  std::map<int64_t, std::map<int, Announced>> exchanges ABSL_GUARDED_BY(mutex);
  std::vector<cudaEvent_t> events ABSL_GUARDED_BY(mutex);
};

class Endpoint final : public DeviceGroup {
 public:
  Endpoint(int rank, std::shared_ptr<State> state) : rank_(rank), state_(std::move(state)) {}
  int rank() const override { return rank_; }
  int world_size() const override { return state_->world_size; }

  absl::Status Exchange(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                        absl::string_view what, cudaStream_t stream) override {
    const int64_t number = next_++;
    Announced own;
    own.send.assign(send.begin(), send.end());
    HW_ASSIGN_OR_RETURN(own.ready, Record(stream));
    Announce(number, own);
    HW_RETURN_IF_ERROR(Await(number, what, [](const Announced& other) { return other.ready != nullptr; }));
    for (int peer = 0; peer < world_size(); ++peer) {
      if (peer == rank_) continue;
      HW_RETURN_IF_ERROR(Take(Of(number, peer), receive[static_cast<size_t>(peer)], stream));
    }
    HW_ASSIGN_OR_RETURN(own.copied, Record(stream));
    Announce(number, own);
    HW_RETURN_IF_ERROR(Await(number, what, [](const Announced& other) { return other.copied != nullptr; }));
    for (int peer = 0; peer < world_size(); ++peer) {
      HW_RETURN_IF_ERROR(FromCuda(cudaStreamWaitEvent(stream, Of(number, peer).copied, 0), "an event"));
    }
    return absl::OkStatus();
  }

  absl::Status Check() override {
    const absl::MutexLock lock(&state_->mutex);
    return state_->status;
  }

  void Abort() override {
    const absl::MutexLock lock(&state_->mutex);
    state_->status.Update(absl::UnavailableError(absl::StrCat("rank ", rank_, " has aborted the group")));
  }

 private:
  absl::StatusOr<cudaEvent_t> Record(cudaStream_t stream) {
    cudaEvent_t event = nullptr;
    HW_RETURN_IF_ERROR(FromCuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event"));
    const absl::MutexLock lock(&state_->mutex);
    state_->events.push_back(event);
    HW_RETURN_IF_ERROR(FromCuda(cudaEventRecord(event, stream), "an event"));
    return event;
  }

  void Announce(int64_t number, const Announced& own) {
    const absl::MutexLock lock(&state_->mutex);
    state_->exchanges[number][rank_] = own;
  }

  Announced Of(int64_t number, int rank) {
    const absl::MutexLock lock(&state_->mutex);
    return state_->exchanges[number][rank];
  }

  template <typename Done>
  absl::Status Await(int64_t number, absl::string_view what, const Done& done) {
    const absl::Time deadline = SteadyNow() + state_->timeout;
    while (true) {
      {
        const absl::MutexLock lock(&state_->mutex);
        HW_RETURN_IF_ERROR(state_->status);
        int come = 0;
        for (const auto& [rank, announced] : state_->exchanges[number]) come += done(announced) ? 1 : 0;
        if (come == world_size()) return absl::OkStatus();
      }
      if (SteadyNow() > deadline)
        return absl::DeadlineExceededError(
            absl::StrCat(what, ": a rank is late by ", absl::FormatDuration(state_->timeout)));
      absl::SleepFor(kPoll);
    }
  }

  absl::Status Take(const Announced& from, const DeviceParts& into, cudaStream_t stream) {
    const DeviceParts& parts = from.send[static_cast<size_t>(rank_)];
    if (parts.size() != into.size()) return absl::InternalError("numbers of parts differ");
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamWaitEvent(stream, from.ready, 0), "an event"));
    for (size_t i = 0; i < parts.size(); ++i) {
      if (parts[i].bytes != into[i].bytes) return absl::InternalError("sizes of parts differ");
      HW_RETURN_IF_ERROR(FromCuda(
          cudaMemcpyAsync(into[i].data, parts[i].data, parts[i].bytes, cudaMemcpyDeviceToDevice, stream),
          "a part"));
    }
    return absl::OkStatus();
  }

  const int rank_;
  const std::shared_ptr<State> state_;
  int64_t next_ = 0;
};

}  // namespace

std::vector<std::unique_ptr<DeviceGroup>> MakeInProcessDeviceGroup(int world_size, absl::Duration timeout) {
  const auto state = std::make_shared<State>(world_size, timeout);
  std::vector<std::unique_ptr<DeviceGroup>> group;
  for (int rank = 0; rank < world_size; ++rank) group.push_back(std::make_unique<Endpoint>(rank, state));
  return group;
}

}  // namespace headwater
