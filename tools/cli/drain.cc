// drain: a worker finishes what it has and leaves.
#include <algorithm>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include <grpcpp/client_context.h>

#include "base/clock.h"
#include "base/rpc/grpc_status.h"
#include "headwater/v1/admin.grpc.pb.h"
#include "tools/cli/command.h"
#include "tools/cli/exit_code.h"

namespace headwater {
namespace {

constexpr absl::Duration kCallLimit = absl::Seconds(10);
constexpr absl::Duration kPoll = absl::Milliseconds(200);

class Drainer {
 public:
  Drainer(v1::AdminService::Stub* stub, const Console& console) : stub_(stub), console_(console) {}

  absl::StatusOr<v1::WorkerSummary> Ask(const std::string& worker_id) {
    grpc::ClientContext context;
    SetDeadline(kCallLimit, &context);
    const Interrupt::Scope scope(console_.interrupt, [&context](int) { context.TryCancel(); });
    v1::DrainWorkerRequest request;
    request.set_worker_id(worker_id);
    v1::DrainWorkerResponse response;
    const absl::Status status = FromGrpcStatus(stub_->DrainWorker(&context, request, &response));
    if (!status.ok()) return status;
    return response.worker();
  }

  // Until no process with this incarnation is registered. DEADLINE_EXCEEDED says what it still has; the
  // worker goes on draining.
  absl::Status WaitUntilGone(v1::WorkerSummary worker, absl::Duration timeout) {
    const absl::Time end = Clock::Real()->Now() + timeout;
    while (true) {
      grpc::ClientContext context;
      SetDeadline(kCallLimit, &context);
      const Interrupt::Scope scope(console_.interrupt, [&context](int) { context.TryCancel(); });
      v1::ListWorkersResponse list;
      const absl::Status status = FromGrpcStatus(stub_->ListWorkers(&context, {}, &list));
      if (!status.ok()) return status;
      const auto same = std::find_if(list.workers().begin(), list.workers().end(), [&](const auto& other) {
        return other.worker_id() == worker.worker_id() && other.incarnation() == worker.incarnation();
      });
      if (same == list.workers().end()) return absl::OkStatus();
      worker = *same;
      if (Clock::Real()->Now() >= end) {
        return absl::DeadlineExceededError(absl::StrCat(
            "worker ", worker.worker_id(), " still has ", worker.num_requests(), " requests of ",
            worker.num_tokens(), " tokens after ", absl::FormatDuration(timeout), "; it goes on draining"));
      }
      std::this_thread::sleep_for(absl::ToChronoMilliseconds(kPoll));
    }
  }

 private:
  v1::AdminService::Stub* const stub_;
  const Console& console_;
};

}  // namespace

int RunDrain(absl::Span<const std::string> arguments, const Console& console) {
  CommonFlags common;
  bool wait = true;
  absl::Duration timeout = absl::Seconds(60);
  FlagSet flags(
      "headwater drain WORKER_ID [flags]\n\nHas a worker leave as SIGTERM does: it gets no new requests, "
      "finishes "
      "those that it\ncomputes (within its own --drain_timeout) and its process ends. What it has not begun "
      "goes to others.");
  flags.Bool("wait", &wait, "wait until it has left");
  flags.Duration("timeout", &timeout, absl::ZeroDuration(), absl::Hours(24), "most time to wait");
  DeclareCommon(&common, &flags);
  int exit_code = 0;
  if (!ParseFlags("drain", &flags, arguments, 1, console, &exit_code)) return exit_code;
  if (flags.positional().empty()) return UsageError("drain", "the WORKER_ID is missing", console);
  const auto channel = Connect(Role::kCoordinator, common.coordinator, common, console);
  if (!channel.ok()) return ReportError(channel.status(), common, console);
  const auto stub = v1::AdminService::NewStub(*channel);
  Drainer drainer(stub.get(), console);
  const absl::Time start = Clock::Real()->Now();
  const absl::StatusOr<v1::WorkerSummary> worker = drainer.Ask(flags.positional()[0]);
  if (!worker.ok()) return ReportError(worker.status(), common, console);
  if (!common.json) {
    console.out << worker->worker_id() << " drains: " << worker->num_requests() << " requests of "
                << worker->num_tokens() << " tokens to finish" << std::endl;
  }
  if (wait) {
    const absl::Status gone = drainer.WaitUntilGone(*worker, timeout);
    if (!gone.ok()) return ReportError(gone, common, console);
  }
  const double seconds = absl::ToDoubleSeconds(Clock::Real()->Now() - start);
  if (common.json) {
    const Json result = {{"event", "result"},
                         {"ok", true},
                         {"exit_code", 0},
                         {"worker_id", worker->worker_id()},
                         {"num_requests", worker->num_requests()},
                         {"left", wait},
                         {"seconds", seconds}};
    console.out << DumpJson(result) << std::endl;
  } else if (wait) {
    console.out << worker->worker_id() << " has left after "
                << absl::FormatDuration(absl::Milliseconds(static_cast<int64_t>(1e3 * seconds))) << "\n";
  }
  return kExitOk;
}

}  // namespace headwater
