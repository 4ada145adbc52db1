#include "worker/cuda/operations_under_way.h"

#include "absl/strings/str_cat.h"

#include "base/clock.h"
#include "base/status_macros.h"
#include "model/cuda/device_buffer.h"

namespace headwater {

absl::StatusOr<bool> WorkIsDone(cudaError_t query, absl::string_view what) {
  if (query == cudaErrorNotReady) {
    // CUDA keeps it as its last error, which a check of a kernel's launch would find.
    (void)cudaGetLastError();
    return false;
  }
  HW_RETURN_IF_ERROR(FromCuda(query, what));
  return true;
}

OperationsUnderWay::~OperationsUnderWay() {
  for (const Operation& operation : operations_) {
    (void)cudaEventDestroy(operation.begin);
    (void)cudaEventDestroy(operation.end);
  }
  for (cudaEvent_t event : free_events_) (void)cudaEventDestroy(event);
}

std::string OperationsUnderWay::Failed(absl::string_view what) const {
  return absl::StrCat(who_, ": ", what, " failed");
}

absl::StatusOr<cudaEvent_t> OperationsUnderWay::TakeEvent() {
  cudaEvent_t event = nullptr;
  if (free_events_.empty()) {
    HW_RETURN_IF_ERROR(
        FromCuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), Failed("an event")));
    return event;
  }
  event = free_events_.back();
  free_events_.pop_back();
  return event;
}

absl::Status OperationsUnderWay::Begin(absl::string_view what, cudaStream_t stream) {
  Operation operation;
  operation.what = what;
  HW_ASSIGN_OR_RETURN(operation.begin, TakeEvent());
  absl::StatusOr<cudaEvent_t> end = TakeEvent();
  if (!end.ok()) {
    free_events_.push_back(operation.begin);
    return std::move(end).status();
  }
  operation.end = *end;
  operations_.push_back(operation);
  return FromCuda(cudaEventRecord(operation.begin, stream), Failed(what));
}

absl::Status OperationsUnderWay::Enqueued(cudaStream_t stream) {
  Operation& operation = operations_.back();
  HW_RETURN_IF_ERROR(FromCuda(cudaEventRecord(operation.end, stream), Failed(operation.what)));
  operation.enqueued = true;
  return absl::OkStatus();
}

absl::Status OperationsUnderWay::Check() {
  while (!operations_.empty()) {
    Operation& oldest = operations_.front();
    if (oldest.begun_at == absl::InfiniteFuture()) {
      HW_ASSIGN_OR_RETURN(const bool begun, WorkIsDone(cudaEventQuery(oldest.begin), Failed(oldest.what)));
      if (!begun) return absl::OkStatus();
      oldest.begun_at = SteadyNow();
    }
    if (oldest.enqueued) {
      HW_ASSIGN_OR_RETURN(const bool ended, WorkIsDone(cudaEventQuery(oldest.end), Failed(oldest.what)));
      if (ended) {
        free_events_.push_back(oldest.begin);
        free_events_.push_back(oldest.end);
        operations_.pop_front();
        continue;
      }
    }
    if (SteadyNow() - oldest.begun_at < timeout_) return absl::OkStatus();
    return absl::DeadlineExceededError(
        absl::StrCat(who_, ": ", oldest.what, " did not end within ", absl::FormatDuration(timeout_)));
  }
  return absl::OkStatus();
}

}  // namespace headwater
