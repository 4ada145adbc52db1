// Errors on the wire: absl::Status <-> grpc::Status with google.rpc.ErrorInfo, and the closed set of reasons.
#ifndef HW_BASE_RPC_GRPC_STATUS_H_
#define HW_BASE_RPC_GRPC_STATUS_H_

#include <initializer_list>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "google/rpc/status.pb.h"
#include <grpcpp/support/status.h>

#include "headwater/v1/prefill.pb.h"

namespace headwater {

// A status with an ErrorInfo payload: domain "headwater.v1", reason without the prefix "ERROR_REASON_", and
// the variable parts as metadata.
absl::Status MakeError(absl::StatusCode code, v1::ErrorReason reason, absl::string_view message,
                       std::initializer_list<std::pair<absl::string_view, std::string>> metadata = {});

// Adds google.rpc.RetryInfo, for RESOURCE_EXHAUSTED and UNAVAILABLE.
absl::Status WithRetryAfter(absl::Status status, absl::Duration retry_after);

// The reason in the payload; UNSPECIFIED: none, or one that this build does not know.
v1::ErrorReason ReasonOf(const absl::Status& status);
// "EMPTY_PROMPT"; for labels and JSON.
std::string ReasonName(v1::ErrorReason reason);

// Lossless for code, message and payloads. A non-OK status without a reason gets INTERNAL, UNSPECIFIED being
// no reason.
grpc::Status ToGrpcStatus(const absl::Status& status);
google::rpc::Status ToRpcStatus(const absl::Status& status);

// Codes outside the canonical range become UNKNOWN.
absl::Status FromGrpcStatus(const grpc::Status& status);
absl::Status FromRpcStatus(const google::rpc::Status& status);

}  // namespace headwater

#endif  // HW_BASE_RPC_GRPC_STATUS_H_
