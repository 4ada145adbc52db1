#include "tools/cli/exit_code.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "google/rpc/error_details.pb.h"

#include "base/rpc/grpc_status.h"

namespace headwater {

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kAlreadyExists:
      return kExitRefused;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kAborted:
      return kExitRetryable;
    case absl::StatusCode::kCancelled:
      return kExitCancelled;
    default:
      return kExitOther;
  }
}

std::map<std::string, std::string> ErrorMetadata(const absl::Status& status) {
  std::map<std::string, std::string> metadata;
  google::rpc::ErrorInfo info;
  const auto info_bytes = status.GetPayload("type.googleapis.com/google.rpc.ErrorInfo");
  if (info_bytes.has_value() && info.ParseFromString(std::string(*info_bytes))) {
    for (const auto& [key, value] : info.metadata()) metadata[key] = value;
  }
  google::rpc::RetryInfo retry;
  const auto retry_bytes = status.GetPayload("type.googleapis.com/google.rpc.RetryInfo");
  if (retry_bytes.has_value() && retry.ParseFromString(std::string(*retry_bytes))) {
    metadata["retry_after"] = absl::FormatDuration(absl::Seconds(retry.retry_delay().seconds()) +
                                                   absl::Nanoseconds(retry.retry_delay().nanos()));
  }
  return metadata;
}

std::string Printable(absl::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return out;
}

std::string DescribeError(const absl::Status& status) {
  std::string out = absl::StatusCodeToString(status.code());
  const v1::ErrorReason reason = ReasonOf(status);
  if (reason != v1::ERROR_REASON_UNSPECIFIED) absl::StrAppend(&out, " ", ReasonName(reason));
  absl::StrAppend(&out, ": ", Printable(status.message()), "\n");
  for (const auto& [key, value] : ErrorMetadata(status)) {
    absl::StrAppend(&out, "  ", Printable(key), ": ", Printable(value), "\n");
  }
  return out;
}

}  // namespace headwater
