// workers, nodes, cancel and trace: short calls to the coordinator.
#include <string>

#include "absl/strings/str_cat.h"
#include "google/protobuf/util/json_util.h"
#include <grpcpp/client_context.h>

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "headwater/v1/admin.grpc.pb.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tools/cli/chrome_trace.h"
#include "tools/cli/command.h"
#include "tools/cli/exit_code.h"

namespace headwater {
namespace {

constexpr absl::Duration kListLimit = absl::Seconds(10);
// Cancelling ends when compute has stopped and the KV blocks are reclaimed.
constexpr absl::Duration kCancelLimit = absl::Seconds(60);

}  // namespace

int RunWorkers(absl::Span<const std::string> arguments, const Console& console) {
  CommonFlags common;
  FlagSet flags("headwater workers [flags]\n\nLists the workers that the coordinator knows.");
  DeclareCommon(&common, &flags);
  int exit_code = 0;
  if (!ParseFlags("workers", &flags, arguments, 0, console, &exit_code)) return exit_code;
  return CallAndShow<v1::ListWorkersResponse>(
      common, console, kListLimit,
      [](const auto& channel, grpc::ClientContext* context, v1::ListWorkersResponse* response) {
        return v1::AdminService::NewStub(channel)->ListWorkers(context, {}, response);
      },
      [](const v1::ListWorkersResponse& response) { return ToJson(response); }, RenderWorkers);
}

int RunNodes(absl::Span<const std::string> arguments, const Console& console) {
  CommonFlags common;
  FlagSet flags("headwater nodes [flags]\n\nLists the decode nodes that the coordinator knows.");
  DeclareCommon(&common, &flags);
  int exit_code = 0;
  if (!ParseFlags("nodes", &flags, arguments, 0, console, &exit_code)) return exit_code;
  return CallAndShow<v1::ListDecodeNodesResponse>(
      common, console, kListLimit,
      [](const auto& channel, grpc::ClientContext* context, v1::ListDecodeNodesResponse* response) {
        return v1::AdminService::NewStub(channel)->ListDecodeNodes(context, {}, response);
      },
      [](const v1::ListDecodeNodesResponse& response) { return ToJson(response); }, RenderDecodeNodes);
}

int RunCancel(absl::Span<const std::string> arguments, const Console& console) {
  CommonFlags common;
  v1::CancelPrefillRequest request;
  FlagSet flags("headwater cancel REQUEST_ID [flags]\n\nCancels a request that has not ended.");
  flags.String("tenant", request.mutable_tenant(), "whose request it is");
  DeclareCommon(&common, &flags);
  int exit_code = 0;
  if (!ParseFlags("cancel", &flags, arguments, 1, console, &exit_code)) return exit_code;
  if (flags.positional().empty()) return UsageError("cancel", "the REQUEST_ID is missing", console);
  request.set_request_id(flags.positional()[0]);
  return CallAndShow<v1::CancelPrefillResponse>(
      common, console, kCancelLimit,
      [&request](const auto& channel, grpc::ClientContext* context, v1::CancelPrefillResponse* response) {
        return v1::PrefillService::NewStub(channel)->CancelPrefill(context, request, response);
      },
      [](const v1::CancelPrefillResponse& response) {
        return Json{{"cancelled", response.cancelled()}};
      },
      [](const v1::CancelPrefillResponse& response) -> std::string {
        return response.cancelled() ? "cancelled\n" : "had already ended\n";
      });
}

int RunTrace(absl::Span<const std::string> arguments, const Console& console) {
  CommonFlags common;
  v1::GetTraceRequest request;
  FlagSet flags(
      "headwater trace REQUEST_ID [flags] > trace.json\n\nWrites the timeline of a request that runs or "
      "ended "
      "lately, in the JSON form of\nChrome's trace viewer: open it in https://ui.perfetto.dev. --json writes "
      "the "
      "message\nas it is.");
  flags.String("tenant", request.mutable_tenant(), "whose request it is");
  DeclareCommon(&common, &flags);
  int exit_code = 0;
  if (!ParseFlags("trace", &flags, arguments, 1, console, &exit_code)) return exit_code;
  if (flags.positional().empty()) return UsageError("trace", "the REQUEST_ID is missing", console);
  request.set_request_id(flags.positional()[0]);
  return CallAndShow<v1::GetTraceResponse>(
      common, console, kListLimit,
      [&request](const auto& channel, grpc::ClientContext* context, v1::GetTraceResponse* response) {
        return v1::AdminService::NewStub(channel)->GetTrace(context, request, response);
      },
      [](const v1::GetTraceResponse& response) {
        std::string text;
        google::protobuf::util::JsonPrintOptions options;
        options.preserve_proto_field_names = true;
        HW_CHECK(google::protobuf::util::MessageToJsonString(response.trace(), &text, options).ok());
        return Json{{"trace", Json::parse(text)}};
      },
      [](const v1::GetTraceResponse& response) { return DumpJson(ChromeTrace(response.trace())) + "\n"; });
}

}  // namespace headwater
