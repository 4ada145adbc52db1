#include "worker/cuda/nccl_link.h"

#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

// Of an orderly end, and of what the destructor waits for in all.
constexpr absl::Duration kFinalizeTimeout = absl::Seconds(3);
constexpr absl::Duration kCloseTimeout = absl::Seconds(5);
// Of the text that NCCL keeps of its last error, which other threads may write meanwhile.
constexpr size_t kMaxErrorText = 1023;

// ncclInProgress is a non-blocking communicator's usual answer.
bool Failed(ncclResult_t result) { return result != ncclSuccess && result != ncclInProgress; }

// False: the communicator is still there, to be aborted.
bool Finalize(ncclComm_t comm) {
  const absl::Time deadline = SteadyNow() + kFinalizeTimeout;
  ncclResult_t state = ncclCommFinalize(comm);
  while (state == ncclInProgress && SteadyNow() < deadline) {
    absl::SleepFor(absl::Milliseconds(1));
    if (ncclCommGetAsyncError(comm, &state) != ncclSuccess) return false;
  }
  if (state != ncclSuccess) return false;
  if (const ncclResult_t result = ncclCommDestroy(comm); Failed(result)) {
    HW_LOG(WARNING) << "ncclCommDestroy: " << ncclGetErrorString(result);
  }
  return true;
}

}  // namespace

NcclLink::Communicator::~Communicator() {
  if (stream != nullptr) (void)cudaStreamDestroy(stream);
}

NcclLink::~NcclLink() {
  Fail(absl::CancelledError("the group was destroyed")).IgnoreError();
  if (!WaitUntilGivenBack(kCloseTimeout)) {
    HW_LOG(WARNING).Field("rank", rank_)
        << "NCCL still waits for the peers of a group; what it holds is given back when they have gone";
  }
}

bool NcclLink::WaitUntilGivenBack(absl::Duration timeout) const {
  {
    absl::MutexLock lock(&mutex_);
    if (!giving_back_) return true;
  }
  return given_back_->WaitForNotificationWithTimeout(timeout);
}

std::string NcclLink::Describe(absl::string_view what, absl::string_view text) const {
  return absl::StrCat("rank ", rank_, " of ", world_size_, ": ", what, " ", text);
}

absl::Status NcclLink::Error(ncclResult_t result, absl::string_view what) const {
  const char* const text = ncclGetLastError(nullptr);
  const std::string last(text, text == nullptr ? 0 : strnlen(text, kMaxErrorText));
  return absl::UnavailableError(
      Describe(what, absl::StrCat("failed: ", ncclGetErrorString(result), last.empty() ? "" : ": ", last)));
}

// Both ncclCommDestroy() and ncclCommAbort() may wait for long; an abort ends the kernels first.
void NcclLink::GiveBack(std::unique_ptr<Communicator> communicator, bool finish) {
  std::thread([communicator = std::move(communicator), device = device_, finish,
               done = given_back_]() mutable {
    (void)cudaSetDevice(device);
    if (!finish || !Finalize(communicator->comm)) {
      if (const ncclResult_t result = ncclCommAbort(communicator->comm); Failed(result)) {
        HW_LOG(WARNING) << "ncclCommAbort: " << ncclGetErrorString(result);
      }
    }
    communicator.reset();
    done->Notify();
  }).detach();
}

absl::Status NcclLink::End(absl::Status why, bool finish) {
  std::unique_ptr<Communicator> communicator;
  {
    absl::MutexLock lock(&mutex_);
    if (!error_.ok()) return error_;
    error_ = why;
    if (cancel_ != nullptr) cancel_();
    communicator = std::move(communicator_);
    giving_back_ = communicator != nullptr;
  }
  if (communicator != nullptr) GiveBack(std::move(communicator), finish);
  return why;
}

absl::Status NcclLink::error() const {
  absl::MutexLock lock(&mutex_);
  return error_;
}

absl::Status NcclLink::OnEnd(std::function<void()> cancel) {
  absl::MutexLock lock(&mutex_);
  cancel_ = std::move(cancel);
  return error_;
}

absl::Status NcclLink::Init(const ncclUniqueId& id) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t comm = nullptr;
  // Not under the mutex: the first such call of a process loads and prepares what NCCL needs.
  const ncclResult_t result = ncclCommInitRankConfig(&comm, world_size_, id, rank_, &config);
  if (comm == nullptr) return Fail(Error(result, "ncclCommInitRankConfig"));
  auto communicator = std::make_unique<Communicator>(comm);
  absl::Status ended;
  {
    absl::MutexLock lock(&mutex_);
    ended = error_;
    if (ended.ok()) {
      communicator_ = std::move(communicator);
    } else {
      giving_back_ = true;
    }
  }
  if (!ended.ok()) {
    GiveBack(std::move(communicator), false);
    return ended;
  }
  return Failed(result) ? Fail(Error(result, "ncclCommInitRankConfig")) : absl::OkStatus();
}

absl::Status NcclLink::Keep(cudaStream_t stream, DeviceBuffer memory) {
  absl::MutexLock lock(&mutex_);
  if (communicator_ == nullptr) {
    (void)cudaStreamDestroy(stream);
    return error_;
  }
  communicator_->stream = stream;
  communicator_->memory = std::move(memory);
  return absl::OkStatus();
}

absl::Status NcclLink::Launch(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                              absl::string_view what, cudaStream_t stream) {
  ncclResult_t result = ncclSuccess;
  {
    absl::MutexLock lock(&mutex_);
    if (!error_.ok()) return error_;
    if (communicator_ == nullptr) return absl::FailedPreconditionError(Describe(what, "came before Init()"));
    result = ncclGroupStart();
    if (result == ncclSuccess) {
      result = EnqueueParts(send, receive, communicator_->comm, stream);
      // After an error too: the thread must leave the group call.
      const ncclResult_t ended = ncclGroupEnd();
      if (!Failed(result)) result = ended;
    }
  }
  return Failed(result) ? Fail(Error(result, what)) : absl::OkStatus();
}

// NCCL pairs a rank's sends to a peer with that peer's receives by the order of the calls.
ncclResult_t NcclLink::EnqueueParts(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                                    ncclComm_t comm, cudaStream_t stream) const {
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_) continue;
    for (const DevicePart& part : send[static_cast<size_t>(peer)]) {
      if (part.bytes == 0) continue;
      const ncclResult_t result = ncclSend(part.data, part.bytes, ncclInt8, peer, comm, stream);
      if (Failed(result)) return result;
    }
    for (const DevicePart& part : receive[static_cast<size_t>(peer)]) {
      if (part.bytes == 0) continue;
      const ncclResult_t result = ncclRecv(part.data, part.bytes, ncclInt8, peer, comm, stream);
      if (Failed(result)) return result;
    }
  }
  return ncclSuccess;
}

absl::StatusOr<bool> NcclLink::Ready(absl::string_view what) {
  ncclResult_t state = ncclSuccess;
  {
    absl::MutexLock lock(&mutex_);
    if (!error_.ok()) return error_;
    if (communicator_ == nullptr) return true;
    const ncclResult_t asked = ncclCommGetAsyncError(communicator_->comm, &state);
    if (asked != ncclSuccess) state = asked;
  }
  if (Failed(state)) return Fail(Error(state, what));
  return state == ncclSuccess;
}

}  // namespace headwater
