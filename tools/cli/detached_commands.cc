// watch and status: what became of a request that another call, or 'submit --detach', has started.
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include <grpcpp/client_context.h>

#include "base/rpc/grpc_status.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tools/cli/command.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/prefill_call.h"
#include "tools/cli/progress.h"

namespace headwater {
namespace {

constexpr absl::Duration kStatusLimit = absl::Seconds(10);

absl::Duration TotalOf(const v1::PrefillCompleted& completed) {
  const auto& total = completed.stages().total();
  return absl::Seconds(total.seconds()) + absl::Nanoseconds(total.nanos());
}

// Status to its end, or an error of the call.
class WatchRun {
 public:
  WatchRun(const CommonFlags& common, const Console& console)
      : common_(common), console_(console), progress_(&console.err, console.err_is_terminal, console.width) {}

  int Run(const v1::WatchPrefillRequest& request) {
    const auto channel = Connect(Role::kCoordinator, common_.coordinator, common_, console_);
    if (!channel.ok()) return ReportError(channel.status(), common_, console_);
    const absl::StatusOr<v1::PrefillCompleted> completed = Watch(*channel, request);
    progress_.Finish();
    if (!completed.ok()) return ReportError(completed.status(), common_, console_);
    if (!common_.json) {
      console_.out << RenderCompleted(*completed, TotalOf(*completed));
      return kExitOk;
    }
    Json result = {{"event", "result"}, {"ok", true}, {"exit_code", 0}};
    Json prefill = CompletedToJson(*completed);
    prefill.erase("event");
    result.update(prefill);
    console_.out << DumpJson(result) << std::endl;
    return kExitOk;
  }

 private:
  absl::StatusOr<v1::PrefillCompleted> Watch(const std::shared_ptr<grpc::Channel>& channel,
                                             const v1::WatchPrefillRequest& request) {
    const auto stub = v1::PrefillService::NewStub(channel);
    // As long as the request runs, which its own deadline and the coordinator bound.
    grpc::ClientContext context;
    const Interrupt::Scope scope(console_.interrupt, [&context](int) { context.TryCancel(); });
    const auto reader = stub->WatchPrefill(&context, request);
    absl::StatusOr<v1::PrefillCompleted> result = absl::UnavailableError(
        absl::StrCat("the stream of request ", request.request_id(), " ended without a result"));
    bool has_result = false;
    v1::WatchPrefillResponse message;
    while (reader->Read(&message)) {
      const v1::PrefillResponse& event = message.response();
      if (common_.json) console_.out << DumpJson(EventToJson(event)) << std::endl;
      if (event.has_progress()) progress_.Update(event.progress());
      if (event.has_completed()) result = event.completed();
      if (event.has_failed()) result = FailureOf(event.failed());
      has_result = has_result || event.has_completed() || event.has_failed();
    }
    const absl::Status status = FromGrpcStatus(reader->Finish());
    if (!has_result && !status.ok()) return status;
    return result;
  }

  const CommonFlags& common_;
  const Console& console_;
  ProgressPrinter progress_;
};

std::string RenderLast(const v1::GetPrefillResponse& response) {
  switch (response.last().event_case()) {
    case v1::PrefillResponse::kAccepted:
      return absl::StrCat("accepted, position ", response.last().accepted().queue_position(), "\n");
    case v1::PrefillResponse::kProgress:
      return absl::StrCat("running: ", RenderLine(response.last().progress()), "\n");
    case v1::PrefillResponse::kCompleted:
      return "completed\n" +
             RenderCompleted(response.last().completed(), TotalOf(response.last().completed()));
    case v1::PrefillResponse::kFailed: {
      const absl::Status why = FailureOf(response.last().failed());
      return absl::StrCat("failed: ", Printable(why.ToString(absl::StatusToStringMode::kWithNoExtraData)),
                          "\n");
    }
    case v1::PrefillResponse::EVENT_NOT_SET:
      break;
  }
  return "waiting for workers of its model\n";
}

// Declares and parses what both take. False: `exit_code` is the command's.
template <typename Request>
bool ParseRequestId(const char* command, const char* usage, absl::Span<const std::string> arguments,
                    const Console& console, CommonFlags* common, Request* request, int* exit_code) {
  FlagSet flags(usage);
  flags.String("tenant", request->mutable_tenant(), "whose request it is");
  DeclareCommon(common, &flags);
  if (!ParseFlags(command, &flags, arguments, 1, console, exit_code)) return false;
  if (flags.positional().empty()) {
    *exit_code = UsageError(command, "the REQUEST_ID is missing", console);
    return false;
  }
  request->set_request_id(flags.positional()[0]);
  return true;
}

}  // namespace

int RunWatch(absl::Span<const std::string> arguments, const Console& console) {
  CommonFlags common;
  v1::WatchPrefillRequest request;
  int exit_code = 0;
  if (!ParseRequestId(
          "watch",
          "headwater watch REQUEST_ID [flags]\n\nShows progress and the result of a request that another "
          "call has started. Ctrl-C\nleaves a request of 'submit --detach' running.",
          arguments, console, &common, &request, &exit_code)) {
    return exit_code;
  }
  return WatchRun(common, console).Run(request);
}

int RunStatus(absl::Span<const std::string> arguments, const Console& console) {
  CommonFlags common;
  v1::GetPrefillRequest request;
  int exit_code = 0;
  if (!ParseRequestId("status",
                      "headwater status REQUEST_ID [flags]\n\nSays how far a request is, or how it ended. "
                      "Ended ones are known for ten minutes.",
                      arguments, console, &common, &request, &exit_code)) {
    return exit_code;
  }
  return CallAndShow<v1::GetPrefillResponse>(
      common, console, kStatusLimit,
      [&request](const auto& channel, grpc::ClientContext* context, v1::GetPrefillResponse* response) {
        return v1::PrefillService::NewStub(channel)->GetPrefill(context, request, response);
      },
      [](const v1::GetPrefillResponse& response) {
        return Json{{"last", response.has_last() ? EventToJson(response.last()) : Json()}};
      },
      RenderLast);
}

}  // namespace headwater
