#include "worker/egress.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

// A cancelled job is seen after this long at most.
constexpr absl::Duration kPoll = absl::Milliseconds(20);

}  // namespace

EgressRing::EgressRing(std::vector<char*> buffers, absl::Duration stall_timeout, const Clock* clock)
    : buffers_(std::move(buffers)),
      stall_timeout_(stall_timeout),
      clock_(clock),
      state_(std::make_shared<State>(buffers_.size())) {}

absl::Status EgressRing::Acquire(int64_t use, JobControl* control, char** buffer, absl::Duration* stalled) {
  const size_t slot = static_cast<size_t>(use) % buffers_.size();
  const absl::Time start = clock_->Now();
  absl::Status status;
  absl::MutexLock lock(&state_->mutex);
  while (state_->readers[slot] > 0) {
    status = control->Step();
    if (!status.ok()) break;
    if (clock_->Now() - std::max(start, state_->last_release) > stall_timeout_) {
      status = MakeError(
          absl::StatusCode::kUnavailable, v1::ERROR_REASON_KV_STREAM_STALLED,
          absl::StrCat("the decode node has acknowledged no block for ", absl::FormatDuration(stall_timeout_),
                       " while use ", use, " of the ring waits for a buffer with ", state_->readers[slot],
                       " blocks left"));
      break;
    }
    state_->released.WaitWithTimeout(&state_->mutex, std::min(kPoll, stall_timeout_));
  }
  *stalled += clock_->Now() - start;
  *buffer = buffers_[slot];
  return status;
}

std::function<void()> EgressRing::Use(int64_t use) {
  const size_t slot = static_cast<size_t>(use) % buffers_.size();
  absl::MutexLock lock(&state_->mutex);
  ++state_->readers[slot];
  return [state = state_, slot, clock = clock_] {
    absl::MutexLock release(&state->mutex);
    --state->readers[slot];
    state->last_release = clock->Now();
    state->released.SignalAll();
  };
}

}  // namespace headwater
