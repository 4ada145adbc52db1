#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include <grpcpp/client_context.h>

#include "base/clock.h"
#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "base/status_macros.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tools/cli/command.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/prefill_call.h"
#include "tools/cli/progress.h"
#include "tools/cli/request_flags.h"
#include "tools/cli/token_ids.h"

namespace headwater {
namespace {

constexpr uint64_t kMaxBatchFile = uint64_t{1} << 30;
constexpr size_t kMaxBatchBytes = 63 << 20;

class BatchRun {
 public:
  BatchRun(v1::BatchPrefillRequest batch, const CommonFlags& common, const Console& console)
      : batch_(std::move(batch)),
        common_(common),
        console_(console),
        results_(static_cast<size_t>(batch_.items_size()),
                 absl::UnavailableError("the stream ended without a result of this item")) {}

  int Run() {
    const absl::Status status = Stream();
    // Items that have a result keep it; the call's own error is that of the others.
    if (!status.ok()) {
      for (auto& [item, result] : Missing()) *result = status;
    }
    return Report(status);
  }

 private:
  absl::Status Stream() {
    HW_ASSIGN_OR_RETURN(const auto channel,
                        Connect(Role::kCoordinator, common_.coordinator, common_, console_));
    const auto stub = v1::PrefillService::NewStub(channel);
    start_ = Clock::Real()->Now();
    grpc::ClientContext context;
    // Leaving the call cancels its requests.
    const Interrupt::Scope scope(console_.interrupt, [&context](int) { context.TryCancel(); });
    const auto reader = stub->BatchPrefill(&context, batch_);
    v1::BatchPrefillResponse response;
    while (reader->Read(&response)) Show(response);
    return FromGrpcStatus(reader->Finish());
  }

  void Show(const v1::BatchPrefillResponse& response) {
    const v1::PrefillResponse& event = response.response();
    if (common_.json) {
      Json json = {{"item", response.item()}};
      json.update(EventToJson(event));
      console_.out << DumpJson(json) << std::endl;
    }
    if (response.item() >= results_.size() || !(event.has_completed() || event.has_failed())) return;
    const bool first = done_.insert({response.item(), true}).second;
    if (!first) return;
    absl::StatusOr<v1::PrefillCompleted>& result = results_[response.item()];
    if (event.has_completed()) {
      result = event.completed();
      ++succeeded_;
    } else {
      result = FailureOf(event.failed());
    }
    if (!common_.json) ShowItem(response.item(), result);
  }

  void ShowItem(uint32_t item, const absl::StatusOr<v1::PrefillCompleted>& result) {
    const std::string name =
        absl::StrCat("item ", item, " ", Printable(batch_.items(static_cast<int>(item)).request_id()));
    if (!result.ok()) {
      console_.out << "FAILED  " << name << "  " << DescribeError(result.status()) << std::flush;
      return;
    }
    console_.out << "ok      " << name << "  " << result->num_tokens() << " tokens, first token "
                 << result->first_token() << ", after " << RenderDuration(Clock::Real()->Now() - start_)
                 << ", KV " << RenderBytes(result->kv_bytes()) << ", session "
                 << Printable(result->session_id()) << std::endl;
  }

  std::map<uint32_t, absl::StatusOr<v1::PrefillCompleted>*> Missing() {
    std::map<uint32_t, absl::StatusOr<v1::PrefillCompleted>*> missing;
    for (uint32_t i = 0; i < results_.size(); ++i) {
      if (done_.count(i) == 0) missing[i] = &results_[i];
    }
    return missing;
  }

  int Report(const absl::Status& stream) {
    if (done_.empty() && !stream.ok()) return ReportError(stream, common_, console_);
    int exit_code = kExitOk;
    Json items = Json::array();
    for (uint32_t i = 0; i < results_.size(); ++i) {
      const auto& result = results_[i];
      if (!result.ok()) {
        const int code = ExitCodeOf(result.status());
        exit_code = exit_code == kExitOk || exit_code == code ? code : static_cast<int>(kExitOther);
        if (!common_.json && done_.count(i) == 0) ShowItem(i, result);
      }
      Json item = {{"item", i}, {"request_id", batch_.items(static_cast<int>(i)).request_id()}};
      item["ok"] = result.ok();
      if (result.ok()) {
        item["session_id"] = result->session_id();
        item["decode_address"] = result->decode_address();
        item["first_token"] = result->first_token();
        item["num_tokens"] = result->num_tokens();
        item["kv_digest"] = result->kv_digest();
      } else {
        item["error"] = ErrorToJson(result.status());
      }
      items.push_back(std::move(item));
    }
    if (console_.interrupt->raised()) exit_code = kExitInterrupted;
    if (common_.json) {
      Json json = {{"event", "result"}, {"ok", exit_code == kExitOk}, {"exit_code", exit_code}};
      json["succeeded"] = succeeded_;
      json["failed"] = results_.size() - succeeded_;
      json["items"] = std::move(items);
      console_.out << DumpJson(json) << std::endl;
    } else {
      console_.out << succeeded_ << " of " << results_.size() << " succeeded in "
                   << RenderDuration(Clock::Real()->Now() - start_) << std::endl;
    }
    return exit_code;
  }

  const v1::BatchPrefillRequest batch_;
  const CommonFlags& common_;
  const Console& console_;
  std::vector<absl::StatusOr<v1::PrefillCompleted>> results_;
  std::map<uint32_t, bool> done_;
  size_t succeeded_ = 0;
  absl::Time start_;
};

}  // namespace

int RunBatch(absl::Span<const std::string> arguments, const Console& console) {
  CommonFlags common;
  v1::PrefillRequest defaults;
  std::string requests_file;
  FlagSet flags(
      "headwater batch --requests=FILE.jsonl [flags]\n\n"
      "Prefills many prompts. Each line is an object: {\"token_ids\": [1, 2], \"request_id\": \"a\", ...}; "
      "its other\n"
      "keys are the flags below, which say what a line leaves out. The exit code is 0 only if all succeeded, "
      "and\n"
      "else that of the failures where they agree, or 1.");
  flags.String("requests", &requests_file,
               "file of requests, one JSON object a line; '-' reads standard input");
  DeclareRequestFlags(&defaults, &flags);
  DeclareCommon(&common, &flags);
  int exit_code = 0;
  if (!ParseFlags("batch", &flags, arguments, 0, console, &exit_code)) return exit_code;
  if (requests_file.empty()) return UsageError("batch", "--requests=FILE is required", console);
  const absl::StatusOr<std::string> text = ReadTextFile(requests_file, console.in, kMaxBatchFile);
  if (!text.ok()) return UsageError("batch", absl::StrCat("--requests: ", text.status().message()), console);
  absl::StatusOr<std::vector<v1::PrefillRequest>> requests = ParseBatch(*text, defaults);
  if (!requests.ok()) {
    return UsageError("batch", absl::StrCat("--requests: ", requests_file, ": ", requests.status().message()),
                      console);
  }
  v1::BatchPrefillRequest batch;
  for (v1::PrefillRequest& request : *requests) {
    if (request.request_id().empty()) request.set_request_id(RandomId());
    *batch.add_items() = std::move(request);
  }
  if (batch.ByteSizeLong() > kMaxBatchBytes) {
    return UsageError("batch",
                      absl::StrCat("--requests: the requests take ", batch.ByteSizeLong(),
                                   " bytes, the limit of one call is ", kMaxBatchBytes),
                      console);
  }
  return BatchRun(std::move(batch), common, console).Run();
}

}  // namespace headwater
