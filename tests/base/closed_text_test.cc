#include "base/rpc/closed_text.h"

#include <set>
#include <string>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

constexpr char kText[] = "10.0.0.7:7080: /var/lib/headwater/kv/3: No space left on device; the limit is 4096";

TEST(WithClosedTextTest, EachReasonIsTheCallersOrHasOneText) {
  // Those whose text says what the caller sent, or where the service stands.
  const std::set<v1::ErrorReason> open = {
      v1::ERROR_REASON_EMPTY_PROMPT,
      v1::ERROR_REASON_TOKEN_OUT_OF_RANGE,
      v1::ERROR_REASON_PROMPT_TOO_LONG,
      v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE,
      v1::ERROR_REASON_UNKNOWN_POLICY,
      v1::ERROR_REASON_BAD_POLICY_PARAMETER,
      v1::ERROR_REASON_UNKNOWN_MODEL,
      v1::ERROR_REASON_UNKNOWN_DECODE_NODE,
      v1::ERROR_REASON_NO_DECODE_NODE,
      v1::ERROR_REASON_REQUEST_ID_CONFLICT,
      v1::ERROR_REASON_BAD_REQUEST_ID,
      v1::ERROR_REASON_UNKNOWN_REQUEST,
      v1::ERROR_REASON_CANCELLED,
      v1::ERROR_REASON_DEADLINE,
      v1::ERROR_REASON_QUEUE_FULL,
      v1::ERROR_REASON_QUEUE_TIMEOUT,
      v1::ERROR_REASON_NO_WORKERS,
      v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED,
      v1::ERROR_REASON_KV_MEMORY_FULL,
      v1::ERROR_REASON_NOT_IMPLEMENTED,
      v1::ERROR_REASON_BATCH_TOO_LARGE,
      v1::ERROR_REASON_DRAINING,
      v1::ERROR_REASON_SESSION_NOT_COMMITTED,
      v1::ERROR_REASON_CONTEXT_FULL,
      v1::ERROR_REASON_BAD_FIELD,
      v1::ERROR_REASON_SESSION_BUSY,
      v1::ERROR_REASON_TIME_BUDGET_TOO_SHORT,
      v1::ERROR_REASON_UNKNOWN_WORKER,
  };
  for (int i = 1; i < v1::ErrorReason_ARRAYSIZE; ++i) {
    ASSERT_TRUE(v1::ErrorReason_IsValid(i));
    const auto reason = static_cast<v1::ErrorReason>(i);
    const absl::Status error =
        WithRetryAfter(MakeError(absl::StatusCode::kUnavailable, reason, kText, {{"worker", "w7.internal"}}),
                       absl::Seconds(3));
    const absl::Status told = WithClosedText(error);
    if (open.contains(reason)) {
      EXPECT_EQ(told, error) << ReasonName(reason);
      continue;
    }
    EXPECT_EQ(told.code(), error.code()) << ReasonName(reason);
    EXPECT_EQ(ReasonOf(told), reason);
    const std::string wire = ToRpcStatus(told).DebugString();
    for (const char* const inside : {"10.0.0.7", "/var/lib", "No space", "4096", "w7.internal"}) {
      EXPECT_FALSE(absl::StrContains(wire, inside)) << ReasonName(reason) << " tells " << inside;
    }
    EXPECT_EQ(told.GetPayload("type.googleapis.com/google.rpc.RetryInfo"),
              error.GetPayload("type.googleapis.com/google.rpc.RetryInfo"));
  }
}

TEST(WithClosedTextTest, AnErrorWithoutAReasonIsInternal) {
  const absl::Status told = WithClosedText(absl::DataLossError(kText));
  EXPECT_EQ(told.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ReasonOf(told), v1::ERROR_REASON_INTERNAL);
  EXPECT_EQ(told.message(), "an internal error; the log of the server says more");
  EXPECT_TRUE(WithClosedText(absl::OkStatus()).ok());
}

}  // namespace
}  // namespace headwater
