// generate and release: calls to a decode node.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include <grpcpp/client_context.h>

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "headwater/v1/admin.grpc.pb.h"
#include "tools/cli/command.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/progress.h"
#include "tools/cli/token_ids.h"

namespace headwater {
namespace {

constexpr int64_t kMaxNewTokens = 65536;
constexpr absl::Duration kLookupLimit = absl::Seconds(10);

struct SessionFlags {
  CommonFlags common;
  std::string session;
  std::string decode_address;
  std::string decode_node;
};

void DeclareSession(SessionFlags* session, FlagSet* flags) {
  flags->String("session", &session->session, "session id, as submit's result names it; required");
  flags->String("decode_address", &session->decode_address, "HOST:PORT of the decode node");
  flags->String("decode_node", &session->decode_node,
                "name of the decode node, instead of its address: the coordinator is asked for it");
  DeclareCommon(&session->common, flags);
}

std::string CheckSession(const SessionFlags& session) {
  if (session.session.empty()) return "--session is required";
  if (session.decode_address.empty() == session.decode_node.empty()) {
    return "give one of --decode_address and --decode_node";
  }
  return "";
}

absl::StatusOr<std::string> FindAddress(const SessionFlags& session, const Console& console) {
  if (!session.decode_address.empty()) return session.decode_address;
  HW_ASSIGN_OR_RETURN(const auto channel,
                      Connect(Role::kCoordinator, session.common.coordinator, session.common, console));
  grpc::ClientContext context;
  SetDeadline(kLookupLimit, &context);
  v1::ListDecodeNodesResponse nodes;
  HW_RETURN_IF_ERROR(
      FromGrpcStatus(v1::AdminService::NewStub(channel)->ListDecodeNodes(&context, {}, &nodes)));
  for (const v1::DecodeNodeSummary& node : nodes.decode_nodes()) {
    if (node.decode_node() == session.decode_node) return node.decode_address();
  }
  return MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_DECODE_NODE,
                   absl::StrCat("the coordinator knows no decode node '", session.decode_node, "'"));
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> ConnectNode(const SessionFlags& session,
                                                           const Console& console) {
  HW_ASSIGN_OR_RETURN(const std::string address, FindAddress(session, console));
  return Connect(Role::kDecode, address, session.common, console);
}

}  // namespace

int RunGenerate(absl::Span<const std::string> arguments, const Console& console) {
  SessionFlags session;
  int64_t max_new_tokens = 32;
  std::string stop_token_ids;
  FlagSet flags(
      "headwater generate --session=ID --decode_address=HOST:PORT [flags]\n\n"
      "Generates from a prefilled cache; a later call goes on where the last one ended.");
  flags.Int("max_new_tokens", &max_new_tokens, 1, kMaxNewTokens, "tokens to generate at most");
  flags.String("stop_token_ids", &stop_token_ids, "ids that end the generation");
  DeclareSession(&session, &flags);
  int exit_code = 0;
  if (!ParseFlags("generate", &flags, arguments, 0, console, &exit_code)) return exit_code;
  const std::string problem = CheckSession(session);
  if (!problem.empty()) return UsageError("generate", problem, console);
  v1::GenerateRequest request;
  request.set_session_id(session.session);
  request.set_max_new_tokens(static_cast<uint32_t>(max_new_tokens));
  if (!stop_token_ids.empty()) {
    const auto stops = ParseTokenIds(stop_token_ids);
    if (!stops.ok()) {
      return UsageError("generate", absl::StrCat("--stop_token_ids: ", stops.status().message()), console);
    }
    request.mutable_stop_token_ids()->Assign(stops->begin(), stops->end());
  }

  TokenWriter tokens(session.common.json, &console.out);
  const auto channel = ConnectNode(session, console);
  absl::Status status = channel.status();
  if (status.ok()) {
    status = StreamTokens(*channel, request, console,
                          [&tokens](const v1::GenerateResponse& token) { tokens.Write(token); });
  }
  tokens.Finish();
  if (!status.ok()) return ReportError(status, session.common, console);
  if (session.common.json) {
    Json result = {{"event", "result"}, {"ok", true}, {"exit_code", 0}, {"session_id", session.session}};
    result["generated"] = tokens.Result();
    console.out << DumpJson(result) << std::endl;
  }
  return kExitOk;
}

int RunRelease(absl::Span<const std::string> arguments, const Console& console) {
  SessionFlags session;
  FlagSet flags(
      "headwater release --session=ID --decode_address=HOST:PORT [flags]\n\nFrees a prefilled cache.");
  DeclareSession(&session, &flags);
  int exit_code = 0;
  if (!ParseFlags("release", &flags, arguments, 0, console, &exit_code)) return exit_code;
  const std::string problem = CheckSession(session);
  if (!problem.empty()) return UsageError("release", problem, console);
  const auto channel = ConnectNode(session, console);
  if (!channel.ok()) return ReportError(channel.status(), session.common, console);
  const absl::StatusOr<uint64_t> bytes = ReleaseSession(*channel, session.session);
  if (!bytes.ok()) return ReportError(bytes.status(), session.common, console);
  if (session.common.json) {
    Json result = {{"event", "result"}, {"ok", true}, {"exit_code", 0}, {"session_id", session.session}};
    result["bytes_reclaimed"] = *bytes;
    console.out << DumpJson(result) << std::endl;
  } else {
    console.out << "released " << RenderBytes(*bytes) << std::endl;
  }
  return kExitOk;
}

}  // namespace headwater
