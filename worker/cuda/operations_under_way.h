// OperationsUnderWay: how long a group's operations have been on their stream.
#ifndef HW_WORKER_CUDA_OPERATIONS_UNDER_WAY_H_
#define HW_WORKER_CUDA_OPERATIONS_UNDER_WAY_H_

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace headwater {

// True: the work is done. `query` is what an event's or a stream's query returned; errors as FromCuda().
absl::StatusOr<bool> WorkIsDone(cudaError_t query, absl::string_view what);

// All on one stream, which passes them in the order of their beginnings. Not thread-safe. Waits for nothing.
class OperationsUnderWay {
 public:
  // `who` begins the message of every error.
  OperationsUnderWay(std::string who, absl::Duration timeout) : who_(std::move(who)), timeout_(timeout) {}
  OperationsUnderWay(const OperationsUnderWay&) = delete;
  OperationsUnderWay& operator=(const OperationsUnderWay&) = delete;
  ~OperationsUnderWay();

  // Around the enqueueing of an operation, with the stream's device current. Errors are FromCuda()'s. `what`
  // is kept.
  absl::Status Begin(absl::string_view what, cudaStream_t stream);
  absl::Status Enqueued(cudaStream_t stream);

  // Forgets what the stream has passed. DEADLINE_EXCEEDED: the oldest operation has not ended `timeout` after
  // a Check() that saw the stream come to it; otherwise FromCuda()'s.
  absl::Status Check();

  size_t size() const { return operations_.size(); }

 private:
  struct Operation {
    absl::string_view what;
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
    bool enqueued = false;  // `end` is recorded
    absl::Time begun_at = absl::InfiniteFuture();
  };

  absl::StatusOr<cudaEvent_t> TakeEvent();
  std::string Failed(absl::string_view what) const;

  const std::string who_;
  const absl::Duration timeout_;
  std::deque<Operation> operations_;  // oldest first
  std::vector<cudaEvent_t> free_events_;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_OPERATIONS_UNDER_WAY_H_
