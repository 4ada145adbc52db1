#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

#include "base/clock.h"
#include "base/rpc/server.h"
#include "base/status_macros.h"
#include "base/trace_context.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tools/cli/command.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/prefill_call.h"
#include "tools/cli/progress.h"
#include "tools/cli/render_plan.h"
#include "tools/cli/request_flags.h"
#include "tools/cli/token_ids.h"

namespace headwater {
namespace {

constexpr int64_t kMaxNewTokens = 65536;
// A request waits to be accepted where its model has no workers yet: longer than coordinators let it.
constexpr absl::Duration kDetachLimit = absl::Minutes(5);

struct SubmitFlags {
  CommonFlags common;
  v1::PrefillRequest request;
  std::string tokens_file;
  std::string token_ids;
  std::string request_id;
  std::string traceparent;
  std::string stop_token_ids;
  int64_t generate = 0;
  bool release = false;
  bool explain = false;
  bool detach = false;
};

void Declare(SubmitFlags* submit, FlagSet* flags) {
  flags->String("tokens", &submit->tokens_file,
                "file of token ids separated by whitespace or commas; '-' reads standard input");
  flags->String("token_ids", &submit->token_ids, "the ids themselves, such as 1,2,3");
  flags->String(
      "request_id", &submit->request_id,
      "name of the request; the same one with the same content is the same request; empty: a random one");
  DeclareRequestFlags(&submit->request, flags);
  flags->Int("generate", &submit->generate, 0, kMaxNewTokens,
             "tokens to generate afterwards, the prefill's own included");
  flags->String("stop_token_ids", &submit->stop_token_ids, "ids that end the generation");
  flags->Bool(
      "explain", &submit->explain,
      "print every plan that came into question, what each was predicted to take, and why one was taken");
  flags->Bool("release", &submit->release, "free the cache at the end");
  flags->Bool("detach", &submit->detach,
              "end when the request is accepted and print its id, for 'headwater watch' and 'status'");
  flags->Custom(
      "traceparent", "", "the trace that this request belongs to (W3C Trace Context); empty: a new one",
      [submit](absl::string_view text) {
        if (ContinueTrace(text, "").parent_id.empty()) {
          return absl::InvalidArgumentError("wanted is 00-<32 hex digits>-<16 hex digits>-<2 hex digits>");
        }
        submit->traceparent = std::string(text);
        return absl::OkStatus();
      });
  DeclareCommon(&submit->common, flags);
}

// Checks what the flags say together and completes the request.
absl::Status Complete(const FlagSet& flags, std::istream& standard_in, SubmitFlags* submit) {
  if (flags.IsSet("tokens") == flags.IsSet("token_ids")) {
    return absl::InvalidArgumentError("give the prompt by one of --tokens=FILE and --token_ids=1,2,3");
  }
  if (flags.IsSet("decode_node") && flags.IsSet("decode_pool")) {
    return absl::InvalidArgumentError("--decode_node and --decode_pool exclude each other");
  }
  for (const char* const name : {"generate", "release", "explain"}) {
    if (submit->detach && flags.IsSet(name)) {
      return absl::InvalidArgumentError(absl::StrCat("--detach and --", name, " exclude each other"));
    }
  }
  const bool from_file = flags.IsSet("tokens");
  const absl::StatusOr<std::vector<uint32_t>> ids =
      from_file ? ReadTokenFile(submit->tokens_file, standard_in) : ParseTokenIds(submit->token_ids);
  if (!ids.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(from_file ? "--tokens: " : "--token_ids: ", ids.status().message()));
  }
  submit->request.mutable_token_ids()->Assign(ids->begin(), ids->end());
  // Named here, so that Ctrl-C can cancel it even before it is accepted.
  submit->request.set_explain(submit->explain);
  submit->request.set_request_id(submit->request_id.empty() ? RandomId() : submit->request_id);
  if (!submit->stop_token_ids.empty()) {
    const auto stops = ParseTokenIds(submit->stop_token_ids);
    if (!stops.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--stop_token_ids: ", stops.status().message()));
    }
  }
  return absl::OkStatus();
}

class SubmitRun {
 public:
  SubmitRun(const SubmitFlags& flags, const Console& console)
      : flags_(flags),
        console_(console),
        progress_(&console.err, console.err_is_terminal, console.width),
        tokens_(flags.common.json, &console.out) {}

  int Run() {
    const absl::Status status = Prefill();
    progress_.Finish();
    if (!status.ok()) return ReportError(status, flags_.common, console_);
    if (!flags_.common.json) console_.out << RenderCompleted(completed_, ttft_);
    const absl::Status after = GenerateAndRelease();
    if (!after.ok()) return ReportError(after, flags_.common, console_);
    if (flags_.common.json) WriteResult();
    return kExitOk;
  }

 private:
  absl::Status Prefill() {
    HW_ASSIGN_OR_RETURN(const auto channel,
                        Connect(Role::kCoordinator, flags_.common.coordinator, flags_.common, console_));
    const absl::Time start = Clock::Real()->Now();
    HW_ASSIGN_OR_RETURN(completed_, CallPrefill(channel, flags_.request, flags_.traceparent, console_,
                                                [this](const v1::PrefillResponse& event) { Show(event); }));
    ttft_ = Clock::Real()->Now() - start;
    return absl::OkStatus();
  }

  void Show(const v1::PrefillResponse& event) {
    if (flags_.common.json) console_.out << DumpJson(EventToJson(event)) << std::endl;
    if (event.has_progress()) {
      Explain(event.progress().has_explanation(), event.progress().explanation());
      progress_.Update(event.progress());
    }
    if (event.has_accepted()) {
      progress_.Note(absl::StrCat(
          "request ", Printable(event.accepted().request_id()), ": ", flags_.request.token_ids_size(),
          " tokens, accepted",
          event.accepted().queue_position() == 0
              ? ""
              : absl::StrCat(", position ", event.accepted().queue_position(), " in the queue")));
      Explain(event.accepted().has_explanation(), event.accepted().explanation());
    }
  }

  void Explain(bool explained, const v1::PlanExplanation& explanation) {
    if (explained && !flags_.common.json) console_.out << RenderExplanation(explanation) << std::endl;
  }

  absl::Status GenerateAndRelease() {
    if (flags_.generate == 0 && !flags_.release) return absl::OkStatus();
    HW_ASSIGN_OR_RETURN(const auto channel,
                        Connect(Role::kDecode, completed_.decode_address(), flags_.common, console_));
    absl::Status status = flags_.generate > 0 ? Generate(channel) : absl::OkStatus();
    if (!flags_.release) return status;
    // Also after a generation that failed, which is then the error to report.
    const absl::StatusOr<uint64_t> bytes = ReleaseSession(channel, completed_.session_id());
    if (!bytes.ok()) return status.ok() ? bytes.status() : status;
    released_ = *bytes;
    if (flags_.common.json) {
      console_.out << DumpJson({{"event", "released"}, {"bytes_reclaimed", *bytes}}) << std::endl;
    } else {
      console_.out << "released     " << RenderBytes(*bytes) << std::endl;
    }
    return status;
  }

  absl::Status Generate(const std::shared_ptr<grpc::Channel>& channel) {
    v1::GenerateRequest request;
    request.set_session_id(completed_.session_id());
    request.set_max_new_tokens(static_cast<uint32_t>(flags_.generate));
    const auto stops = ParseTokenIds(flags_.stop_token_ids);
    if (stops.ok()) request.mutable_stop_token_ids()->Assign(stops->begin(), stops->end());
    if (!flags_.common.json) console_.out << "generated    ";
    const absl::Status status = StreamTokens(
        channel, request, console_, [this](const v1::GenerateResponse& token) { tokens_.Write(token); });
    tokens_.Finish();
    return status;
  }

  void WriteResult() {
    Json result;
    result["event"] = "result";
    result["ok"] = true;
    result["exit_code"] = 0;
    result["ttft"] = absl::ToDoubleSeconds(ttft_);
    Json prefill = CompletedToJson(completed_);
    prefill.erase("event");
    result.update(prefill);
    if (flags_.generate > 0) result["generated"] = tokens_.Result();
    if (flags_.release) result["bytes_reclaimed"] = released_;
    console_.out << DumpJson(result) << std::endl;
  }

  const SubmitFlags& flags_;
  const Console& console_;
  ProgressPrinter progress_;
  TokenWriter tokens_;
  v1::PrefillCompleted completed_;
  absl::Duration ttft_;
  uint64_t released_ = 0;
};

int Detach(const SubmitFlags& submit, const Console& console) {
  v1::SubmitPrefillRequest request;
  *request.mutable_request() = submit.request;
  return CallAndShow<v1::SubmitPrefillResponse>(
      submit.common, console, kDetachLimit,
      [&](const auto& channel, grpc::ClientContext* context, v1::SubmitPrefillResponse* response) {
        if (!submit.traceparent.empty()) context->AddMetadata(kTraceparent, submit.traceparent);
        return v1::PrefillService::NewStub(channel)->SubmitPrefill(context, request, response);
      },
      [](const v1::SubmitPrefillResponse& response) {
        return Json{{"request_id", response.request_id()}, {"trace_id", response.trace_id()}};
      },
      [](const v1::SubmitPrefillResponse& response) { return Printable(response.request_id()) + "\n"; });
}

}  // namespace

int RunSubmit(absl::Span<const std::string> arguments, const Console& console) {
  SubmitFlags submit;
  FlagSet flags(
      "headwater submit --tokens=FILE [flags]\n\nPrefills one prompt and shows progress and the result.");
  Declare(&submit, &flags);
  int exit_code = 0;
  if (!ParseFlags("submit", &flags, arguments, 0, console, &exit_code)) return exit_code;
  const absl::Status status = Complete(flags, console.in, &submit);
  if (!status.ok()) return UsageError("submit", status.message(), console);
  return submit.detach ? Detach(submit, console) : SubmitRun(submit, console).Run();
}

}  // namespace headwater
