#include "worker/cuda/nccl_group.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include <nccl.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

#include "base/clock.h"
#include "base/status_macros.h"
#include "model/cuda/device_buffer.h"
#include "worker/cuda/nccl_link.h"
#include "worker/cuda/operations_under_way.h"

namespace headwater {
namespace {

// More would fill the device's queue of launches, where CUDA makes the caller wait without a deadline.
constexpr size_t kMaxUnderWay = 64;
// Of a launch that was under way when the group ended.
constexpr absl::Duration kLaunchEndTimeout = absl::Seconds(1);

// Between two looks at something that mostly takes microseconds.
class Pause {
 public:
  void Wait() {
    if (++looks_ < 200) {
      std::this_thread::yield();
    } else {
      absl::SleepFor(absl::Microseconds(100));
    }
  }

 private:
  int looks_ = 0;
};

class Nccl final : public NcclGroup {
 public:
  explicit Nccl(const NcclOptions& options)
      : options_(options),
        under_way_(absl::StrCat("rank ", options.rank, " of ", options.world_size), options.timeout),
        link_(options.rank, options.world_size, options.device) {}
  ~Nccl() override {
    if (Check().ok() && under_way_.size() == 0 && formed_) link_.Finish();
  }

  int rank() const override { return options_.rank; }
  int world_size() const override { return options_.world_size; }
  absl::Status Connect(RendezvousClient* rendezvous) override;
  absl::Status Exchange(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                        absl::string_view what, cudaStream_t stream) override;
  absl::Status Check() override;
  void Abort() override {
    link_.Fail(absl::CancelledError(link_.Describe("the group", "was aborted"))).IgnoreError();
  }

 private:
  absl::Status Form(RendezvousClient* rendezvous, absl::Time deadline);
  absl::Status ShareId(RendezvousClient* rendezvous, absl::Time deadline, ncclUniqueId* id);
  absl::Status FirstContact(absl::Time deadline);
  // Until NCCL has done with the last call and the stream, if any, has become idle.
  absl::Status WaitFor(absl::string_view what, cudaStream_t stream, absl::Time deadline);
  std::string Key(absl::string_view of) const { return absl::StrCat(options_.group_name, "/", of); }

  bool AnythingFor(absl::Span<const DeviceParts> parts) const;
  absl::Status MakeRoom();
  absl::Status AwaitLaunch(absl::string_view what);
  // An error that is not the link's own ends it.
  absl::Status Settle(absl::Status status) { return status.ok() ? status : link_.Fail(std::move(status)); }

  const NcclOptions options_;
  // Of the thread that uses the group.
  bool formed_ = false;
  OperationsUnderWay under_way_;
  // Goes first: what it has enqueued may use the events.
  NcclLink link_;
};

absl::Status Nccl::Connect(RendezvousClient* rendezvous) {
  HW_RETURN_IF_ERROR(link_.OnEnd([rendezvous] {
    if (rendezvous != nullptr) rendezvous->Abort();
  }));
  const absl::Time deadline = SteadyNow() + options_.connect_timeout;
  absl::Status status = world_size() == 1 ? absl::OkStatus() : Form(rendezvous, deadline);
  // An Abort() shows as whatever it broke.
  HW_RETURN_IF_ERROR(link_.OnEnd(nullptr));
  formed_ = status.ok();
  if (absl::IsDeadlineExceeded(status)) {
    status = absl::DeadlineExceededError(link_.Describe(
        "no group", absl::StrCat("was formed within ", absl::FormatDuration(options_.connect_timeout), ": ",
                                 status.message())));
  }
  return Settle(std::move(status));
}

absl::Status Nccl::Form(RendezvousClient* rendezvous, absl::Time deadline) {
  ncclUniqueId id;
  HW_RETURN_IF_ERROR(ShareId(rendezvous, deadline, &id));
  HW_RETURN_IF_ERROR(
      FromCuda(cudaSetDevice(options_.device), link_.Describe("CUDA device", absl::StrCat(options_.device))));
  HW_RETURN_IF_ERROR(link_.Init(id));
  HW_RETURN_IF_ERROR(WaitFor("the communicator", nullptr, deadline));
  return FirstContact(deadline);
}

// Rank 0 makes the id when all others have come: NCCL has a thread and a socket wait forever for a rank that
// never comes.
absl::Status Nccl::ShareId(RendezvousClient* rendezvous, absl::Time deadline, ncclUniqueId* id) {
  if (rank() != 0) {
    HW_RETURN_IF_ERROR(rendezvous->Put(Key(absl::StrCat(rank())), "here", deadline - SteadyNow()));
    HW_ASSIGN_OR_RETURN(const std::string value, rendezvous->Get(Key("id"), deadline - SteadyNow()));
    if (value.size() != sizeof(id->internal)) {
      return absl::InternalError(link_.Describe(
          "the group", absl::StrCat("has an id of ", value.size(), " bytes from rank 0; expected are ",
                                    sizeof(id->internal))));
    }
    std::memcpy(id->internal, value.data(), value.size());
    return absl::OkStatus();
  }
  for (int peer = 1; peer < world_size(); ++peer) {
    const absl::Status came = rendezvous->Get(Key(absl::StrCat(peer)), deadline - SteadyNow()).status();
    if (!came.ok()) return absl::Status(came.code(), absl::StrCat("rank ", peer, ": ", came.message()));
  }
  if (const ncclResult_t result = ncclGetUniqueId(id); result != ncclSuccess) {
    return link_.Error(result, "ncclGetUniqueId");
  }
  return rendezvous->Put(Key("id"), absl::string_view(id->internal, sizeof(id->internal)),
                         deadline - SteadyNow());
}

// NCCL connects two ranks when they first send each other something, and waits for both then. A byte from
// everybody to everybody here lets Exchange() return at once later; nobody is done while another still
// connects to it.
absl::Status Nccl::FirstContact(absl::Time deadline) {
  const size_t world = static_cast<size_t>(world_size());
  HW_ASSIGN_OR_RETURN(DeviceBuffer bytes, DeviceBuffer::Allocate(2 * world, "first contact of a group"));
  char* const data = bytes.data();
  cudaStream_t stream = nullptr;
  HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                              "stream of a group's first contact"));
  HW_RETURN_IF_ERROR(link_.Keep(stream, std::move(bytes)));
  std::vector<DeviceParts> send(world), receive(world);
  for (size_t peer = 0; peer < world; ++peer) {
    send[peer] = {{data + peer, 1}};
    receive[peer] = {{data + world + peer, 1}};
  }
  HW_RETURN_IF_ERROR(link_.Launch(send, receive, "first contact", stream));
  return WaitFor("first contact", stream, deadline);
}

absl::Status Nccl::WaitFor(absl::string_view what, cudaStream_t stream, absl::Time deadline) {
  Pause pause;
  while (true) {
    HW_ASSIGN_OR_RETURN(bool done, link_.Ready(what));
    if (done && stream != nullptr) {
      HW_ASSIGN_OR_RETURN(done, WorkIsDone(cudaStreamQuery(stream), link_.Describe(what, "failed")));
    }
    if (done) return absl::OkStatus();
    if (SteadyNow() >= deadline) return absl::DeadlineExceededError(absl::StrCat(what, " waits for a peer"));
    pause.Wait();
  }
}

bool Nccl::AnythingFor(absl::Span<const DeviceParts> parts) const {
  for (size_t peer = 0; peer < parts.size(); ++peer) {
    if (peer == static_cast<size_t>(rank())) continue;
    for (const DevicePart& part : parts[peer]) {
      if (part.bytes != 0) return true;
    }
  }
  return false;
}

absl::Status Nccl::Exchange(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                            absl::string_view what, cudaStream_t stream) {
  HW_RETURN_IF_ERROR(link_.error());
  if (!formed_) return absl::FailedPreconditionError(link_.Describe(what, "came before Connect()"));
  const size_t world = static_cast<size_t>(world_size());
  if (send.size() != world || receive.size() != world) {
    return link_.Fail(absl::InvalidArgumentError(link_.Describe(
        what, absl::StrCat("has parts for ", send.size(), " and from ", receive.size(), " ranks"))));
  }
  if (!AnythingFor(send) && !AnythingFor(receive)) return absl::OkStatus();
  HW_RETURN_IF_ERROR(MakeRoom());
  // Events belong to the device that is current when they are made.
  HW_RETURN_IF_ERROR(Settle(FromCuda(cudaSetDevice(options_.device), link_.Describe(what, "failed"))));
  HW_RETURN_IF_ERROR(Settle(under_way_.Begin(what, stream)));
  HW_RETURN_IF_ERROR(link_.Launch(send, receive, what, stream));
  HW_RETURN_IF_ERROR(AwaitLaunch(what));
  return Settle(under_way_.Enqueued(stream));
}

absl::Status Nccl::MakeRoom() {
  Pause pause;
  while (under_way_.size() >= kMaxUnderWay) {
    HW_RETURN_IF_ERROR(Check());
    if (under_way_.size() >= kMaxUnderWay) pause.Wait();
  }
  return absl::OkStatus();
}

// NCCL launches on a thread of its own; what the caller enqueues next must come after that.
absl::Status Nccl::AwaitLaunch(absl::string_view what) {
  Pause pause;
  while (true) {
    const absl::StatusOr<bool> launched = link_.Ready(what);
    if (launched.ok() && *launched) return absl::OkStatus();
    const absl::Status status = launched.ok() ? Settle(under_way_.Check()) : launched.status();
    if (!status.ok()) {
      // That thread may be about to use the stream, which the caller may be about to destroy.
      (void)link_.WaitUntilGivenBack(kLaunchEndTimeout);
      return status;
    }
    pause.Wait();
  }
}

absl::Status Nccl::Check() {
  HW_RETURN_IF_ERROR(link_.error());
  HW_RETURN_IF_ERROR(Settle(under_way_.Check()));
  // After the events: an error of NCCL's may have ended an operation.
  return link_.Ready("the group").status();
}

}  // namespace

absl::StatusOr<std::unique_ptr<NcclGroup>> NcclGroup::Create(const NcclOptions& options) {
  if (options.world_size < 1 || options.rank < 0 || options.rank >= options.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", options.rank, " of ", options.world_size, " is not possible"));
  }
  if (options.device < 0) return absl::InvalidArgumentError(absl::StrCat("no CUDA device ", options.device));
  if (options.group_name.empty()) return absl::InvalidArgumentError("a group over GPUs needs a name");
  if (std::min(options.connect_timeout, options.timeout) <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("timeouts of ", absl::FormatDuration(options.connect_timeout), " and ",
                     absl::FormatDuration(options.timeout), ": both must be above 0"));
  }
  return std::make_unique<Nccl>(options);
}

}  // namespace headwater
