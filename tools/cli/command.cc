#include "tools/cli/command.h"

#include <chrono>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "base/rpc/transport_flags.h"
#include "base/status_macros.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "tools/cli/exit_code.h"

namespace headwater {
namespace {

constexpr absl::Duration kReleaseLimit = absl::Seconds(60);

}  // namespace

void DeclareCommon(CommonFlags* common, FlagSet* flags) {
  flags->String("coordinator", &common->coordinator, "HOST:PORT of the coordinator");
  flags->Duration("connect_timeout", &common->connect_timeout, absl::Milliseconds(1), absl::Hours(1),
                  "how long to wait for a connection");
  flags->Bool("json", &common->json, "write JSON, one object a line; the last line is the result");
  DeclareTransport(&common->transport, flags);
}

int UsageError(absl::string_view command, absl::string_view message, const Console& console) {
  console.err << "headwater " << command << ": " << message << "\nrun 'headwater " << command
              << " --help' for its flags\n";
  return kExitUsage;
}

bool ParseFlags(absl::string_view command, FlagSet* flags, absl::Span<const std::string> arguments,
                size_t max_positional, const Console& console, int* exit_code) {
  const absl::Status status = flags->Parse(arguments);
  if (!status.ok()) {
    *exit_code = UsageError(command, status.message(), console);
    return false;
  }
  if (flags->help_requested()) {
    console.out << flags->Help();
    *exit_code = kExitOk;
    return false;
  }
  if (flags->positional().size() > max_positional) {
    *exit_code = UsageError(
        command, absl::StrCat("unexpected argument '", Printable(flags->positional()[max_positional]), "'"),
        console);
    return false;
  }
  return true;
}

int ReportError(const absl::Status& status, const CommonFlags& common, const Console& console) {
  const int exit_code = console.interrupt->raised() ? kExitInterrupted : ExitCodeOf(status);
  if (exit_code == kExitInterrupted) {
    console.err << "headwater: interrupted\n";
  } else {
    console.err << "headwater: " << DescribeError(status);
  }
  if (common.json) {
    Json result;
    result["event"] = "result";
    result["ok"] = false;
    result["exit_code"] = exit_code;
    result["error"] = ErrorToJson(status);
    console.out << DumpJson(result) << std::endl;
  }
  return exit_code;
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> Connect(Role server, const std::string& address,
                                                       const CommonFlags& common, const Console& console) {
  HW_ASSIGN_OR_RETURN(const std::shared_ptr<const Transport> transport, Transport::Create(common.transport));
  const auto channel = DialPrivate(address, transport.get(), server);
  const auto end = std::chrono::steady_clock::now() + absl::ToChronoMilliseconds(common.connect_timeout);
  // In slices, so that Ctrl-C is heard.
  constexpr auto kSlice = std::chrono::milliseconds(100);
  while (!channel->WaitForConnected(std::chrono::system_clock::now() + kSlice)) {
    if (console.interrupt->raised()) return absl::CancelledError("interrupted while connecting");
    if (std::chrono::steady_clock::now() >= end) {
      return absl::UnavailableError(absl::StrCat(
          "no ", server == Role::kDecode ? "decode node" : "coordinator", " answers at ", address, " within ",
          absl::FormatDuration(common.connect_timeout), " (is it running there",
          transport == nullptr ? "?)" : ", and does it believe --tls_cert, and do you believe it?)"));
    }
  }
  return channel;
}

void SetDeadline(absl::Duration limit, grpc::ClientContext* context) {
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(limit));
}

absl::Status StreamTokens(const std::shared_ptr<grpc::Channel>& channel, const v1::GenerateRequest& request,
                          const Console& console,
                          const std::function<void(const v1::GenerateResponse&)>& on_token) {
  const auto stub = v1::DecodeService::NewStub(channel);
  grpc::ClientContext context;
  const Interrupt::Scope scope(console.interrupt, [&context](int) { context.TryCancel(); });
  const auto reader = stub->Generate(&context, request);
  v1::GenerateResponse token;
  while (reader->Read(&token)) on_token(token);
  return FromGrpcStatus(reader->Finish());
}

void TokenWriter::Write(const v1::GenerateResponse& token) {
  const Json event = TokenToJson(token);
  tokens_.push_back(token.token_id());
  if (event.contains("finish_reason")) finish_reason_ = event["finish_reason"];
  if (json_) {
    *out_ << DumpJson(event) << std::endl;
  } else {
    *out_ << (open_line_ ? " " : "") << token.token_id() << std::flush;
    open_line_ = true;
  }
}

void TokenWriter::Finish() {
  if (open_line_) *out_ << std::endl;
  open_line_ = false;
}

Json TokenWriter::Result() const { return {{"tokens", tokens_}, {"finish_reason", finish_reason_}}; }

absl::StatusOr<uint64_t> ReleaseSession(const std::shared_ptr<grpc::Channel>& channel,
                                        const std::string& session_id) {
  const auto stub = v1::DecodeService::NewStub(channel);
  grpc::ClientContext context;
  SetDeadline(kReleaseLimit, &context);
  v1::ReleaseRequest request;
  request.set_session_id(session_id);
  v1::ReleaseResponse response;
  const absl::Status status = FromGrpcStatus(stub->Release(&context, request, &response));
  if (!status.ok()) return status;
  return response.bytes_reclaimed();
}

}  // namespace headwater
