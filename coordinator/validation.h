// The one place where client input is checked. Every refusal is an error with ErrorInfo whose metadata names
// the field, its value and the limit.
#ifndef HW_COORDINATOR_VALIDATION_H_
#define HW_COORDINATOR_VALIDATION_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

#include "base/trace_context.h"
#include "coordinator/options.h"
#include "headwater/v1/prefill.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

inline constexpr size_t kMaxNameLength = 64;
inline constexpr uint32_t kDefaultBlockTokens = 256;
inline constexpr uint32_t kMinBlockTokens = 16;
inline constexpr uint32_t kMaxBlockTokens = 4096;
inline constexpr uint32_t kMaxWorldSize = 256;
inline constexpr int kMaxPolicyParameters = 32;
// The one that keeps a quality.
inline constexpr char kQualityPolicy[] = "headwater";

// 1 to `max_length` characters of [A-Za-z0-9._-].
bool IsName(absl::string_view text, size_t max_length = kMaxNameLength);

// At most 64 characters of peer-given text, escaped, for error messages and logs.
std::string Printable(absl::string_view text);

// A request that is well-formed by itself. Immutable, cheap to copy.
struct PreparedRequest {
  // With request_id and kv_dtype filled in where the client left them empty.
  std::shared_ptr<const v1::PrefillRequest> request;
  // SHA-256 of the request as the client sent it, without its id.
  std::string content_hash;
  uint32_t max_token_id = 0;
  uint64_t max_token_position = 0;
  TraceContext trace;
  // It goes on although nobody watches it.
  bool detached = false;
};

// All checks that need no knowledge of the cluster. O(tokens); thread-safe. traceparent, tracestate: the
// call's; see ContinueTrace().
absl::StatusOr<PreparedRequest> PrepareRequest(const v1::PrefillRequest& request,
                                               const CoordinatorOptions& options,
                                               absl::string_view traceparent = "",
                                               absl::string_view tracestate = "");

// Length and token range against the model, and `policy`, the request's or its workers' default, against
// those that every worker of the model has. UNIMPLEMENTED: a quality where they serve none. O(1) in the
// number of tokens.
absl::Status CheckAgainstModel(const PreparedRequest& prepared, const v1::ServedModel& model,
                               const std::vector<std::string>& policies, const std::string& policy,
                               bool serves_quality = false);

// Number of items, their tokens in sum, and distinct ids. Items are then judged one by one.
absl::Status CheckBatch(const v1::BatchPrefillRequest& batch, const CoordinatorOptions& options);

// UNIMPLEMENTED, NOT_IMPLEMENTED, naming `what`.
absl::Status NotImplemented(absl::string_view what);

}  // namespace headwater

#endif  // HW_COORDINATOR_VALIDATION_H_
