#include "base/rpc/closed_text.h"

#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

// Empty: the text of the error is for the caller.
absl::string_view ClosedText(v1::ErrorReason reason) {
  switch (reason) {
    case v1::ERROR_REASON_UNSPECIFIED:
    case v1::ERROR_REASON_INTERNAL:
      return "an internal error";
    case v1::ERROR_REASON_WORKER_LOST:
      return "workers that computed the request were lost or failed";
    case v1::ERROR_REASON_DECODE_LOST:
    case v1::ERROR_REASON_UNKNOWN_SESSION:
      return "the decode node lost the cache, or was lost";
    case v1::ERROR_REASON_KV_STREAM_STALLED:
      return "the decode node took no KV for too long";
    case v1::ERROR_REASON_KV_CORRUPT:
      return "KV arrived damaged at the decode node";
    case v1::ERROR_REASON_MODEL_MISMATCH:
      return "the decode node has another model than the workers";
    case v1::ERROR_REASON_STALE_EPOCH:
      return "a later attempt at the request took its place";
    case v1::ERROR_REASON_CHECKPOINT_LOST:
      return "what the request was to go on from was lost";
    case v1::ERROR_REASON_NON_FINITE:
      return "the computation gave values that are not finite";
    default:
      return "";
  }
}

}  // namespace

absl::Status WithClosedText(const absl::Status& status) {
  const v1::ErrorReason reason = ReasonOf(status);
  const absl::string_view text = ClosedText(reason);
  if (status.ok() || text.empty()) return status;
  absl::Status closed =
      MakeError(status.code(), reason == v1::ERROR_REASON_UNSPECIFIED ? v1::ERROR_REASON_INTERNAL : reason,
                absl::StrCat(text, "; the log of the server says more"));
  status.ForEachPayload([&closed](absl::string_view url, const absl::Cord& payload) {
    if (absl::EndsWith(url, "/google.rpc.RetryInfo")) closed.SetPayload(url, payload);
  });
  return closed;
}

}  // namespace headwater
