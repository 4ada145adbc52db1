// What the subcommands share: flags, connections, reports.
#ifndef HW_TOOLS_CLI_COMMAND_H_
#define HW_TOOLS_CLI_COMMAND_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include "base/flags.h"
#include "base/rpc/grpc_status.h"
#include "base/rpc/transport.h"
#include "headwater/v1/decode.pb.h"
#include "tools/cli/console.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/render.h"

namespace headwater {

struct CommonFlags {
  std::string coordinator = "127.0.0.1:7070";
  absl::Duration connect_timeout = absl::Seconds(10);
  bool json = false;
  TransportOptions transport;
};
void DeclareCommon(CommonFlags* common, FlagSet* flags);

// Each takes the arguments after the subcommand's name and returns the exit code.
int RunSubmit(absl::Span<const std::string> arguments, const Console& console);
int RunBatch(absl::Span<const std::string> arguments, const Console& console);
int RunWatch(absl::Span<const std::string> arguments, const Console& console);
int RunStatus(absl::Span<const std::string> arguments, const Console& console);
int RunCancel(absl::Span<const std::string> arguments, const Console& console);
int RunGenerate(absl::Span<const std::string> arguments, const Console& console);
int RunRelease(absl::Span<const std::string> arguments, const Console& console);
int RunWorkers(absl::Span<const std::string> arguments, const Console& console);
int RunDrain(absl::Span<const std::string> arguments, const Console& console);
int RunTrace(absl::Span<const std::string> arguments, const Console& console);
int RunNodes(absl::Span<const std::string> arguments, const Console& console);
// Where it succeeds the process becomes the benchmark's program.
int RunBench(absl::Span<const std::string> arguments, const Console& console);

// Parses; true: go on. False: `exit_code` is 0 after --help was printed, 2 after a usage error was.
bool ParseFlags(absl::string_view command, FlagSet* flags, absl::Span<const std::string> arguments,
                size_t max_positional, const Console& console, int* exit_code);

// Says what is wrong with the command line and where to read more; returns 2.
int UsageError(absl::string_view command, absl::string_view message, const Console& console);

// Shows an error that a service answered, with --json as the last line on stdout too; returns its exit code,
// 130 after Ctrl-C.
int ReportError(const absl::Status& status, const CommonFlags& common, const Console& console);

// A connected channel to the coordinator or a decode node. UNAVAILABLE names which, the address and the
// limit; CANCELLED: Ctrl-C; INVALID_ARGUMENT: a flag of the transport.
absl::StatusOr<std::shared_ptr<grpc::Channel>> Connect(Role server, const std::string& address,
                                                       const CommonFlags& common, const Console& console);

void SetDeadline(absl::Duration limit, grpc::ClientContext* context);

// Dials, calls, and shows the response as JSON or as text.
template <typename Response>
int CallAndShow(const CommonFlags& common, const Console& console, absl::Duration limit,
                const std::function<grpc::Status(const std::shared_ptr<grpc::Channel>&, grpc::ClientContext*,
                                                 Response*)>& call,
                const std::function<Json(const Response&)>& json,
                const std::function<std::string(const Response&)>& text) {
  const auto channel = Connect(Role::kCoordinator, common.coordinator, common, console);
  if (!channel.ok()) return ReportError(channel.status(), common, console);
  grpc::ClientContext context;
  SetDeadline(limit, &context);
  const Interrupt::Scope scope(console.interrupt, [&context](int) { context.TryCancel(); });
  Response response;
  const absl::Status status = FromGrpcStatus(call(*channel, &context, &response));
  if (!status.ok()) return ReportError(status, common, console);
  if (common.json) {
    Json result = {{"event", "result"}, {"ok", true}, {"exit_code", 0}};
    result.update(json(response));
    console.out << DumpJson(result) << std::endl;
  } else {
    console.out << text(response);
  }
  return kExitOk;
}

// Streams a session's tokens. Ctrl-C ends the call.
absl::Status StreamTokens(const std::shared_ptr<grpc::Channel>& channel, const v1::GenerateRequest& request,
                          const Console& console,
                          const std::function<void(const v1::GenerateResponse&)>& on_token);

// Collects the tokens of a StreamTokens() call and shows them: ids on one line, or one JSON event each.
class TokenWriter {
 public:
  TokenWriter(bool json, std::ostream* out) : json_(json), out_(out) {}
  void Write(const v1::GenerateResponse& token);
  // Ends the line.
  void Finish();
  // {"tokens": [...], "finish_reason": ...}
  Json Result() const;

 private:
  const bool json_;
  std::ostream* const out_;
  Json tokens_ = Json::array();
  Json finish_reason_;
  bool open_line_ = false;
};

// Frees a session; bytes reclaimed.
absl::StatusOr<uint64_t> ReleaseSession(const std::shared_ptr<grpc::Channel>& channel,
                                        const std::string& session_id);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_COMMAND_H_
