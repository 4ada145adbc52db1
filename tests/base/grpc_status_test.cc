#include "base/rpc/grpc_status.h"

#include "google/rpc/error_details.pb.h"
#include "gtest/gtest.h"

namespace headwater {
namespace {

absl::Status TooLong() {
  return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_PROMPT_TOO_LONG,
                   "5 tokens, at most 4", {{"value", "5"}, {"limit", "4"}});
}

TEST(GrpcStatusTest, CodeMessageReasonAndMetadataSurviveTheWire) {
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(TooLong()));

  EXPECT_EQ(back, TooLong());
  EXPECT_EQ(ReasonOf(back), v1::ERROR_REASON_PROMPT_TOO_LONG);
}

TEST(GrpcStatusTest, RpcStatusCarriesErrorInfoWithDomainAndLimit) {
  const google::rpc::Status wire = ToRpcStatus(TooLong());

  google::rpc::ErrorInfo info;
  ASSERT_EQ(wire.details_size(), 1);
  ASSERT_TRUE(wire.details(0).UnpackTo(&info));
  EXPECT_EQ(info.domain(), "headwater.v1");
  EXPECT_EQ(info.reason(), "PROMPT_TOO_LONG");
  EXPECT_EQ(info.metadata().at("limit"), "4");
}

TEST(GrpcStatusTest, RetryAfterIsRetryInfo) {
  const google::rpc::Status wire = ToRpcStatus(WithRetryAfter(TooLong(), absl::Milliseconds(1500)));

  google::rpc::RetryInfo info;
  bool found = false;
  for (const auto& detail : wire.details()) found = detail.UnpackTo(&info) || found;
  ASSERT_TRUE(found);
  EXPECT_EQ(info.retry_delay().seconds(), 1);
  EXPECT_EQ(info.retry_delay().nanos(), 500'000'000);
}

TEST(GrpcStatusTest, ErrorsWithoutAReasonGetInternal) {
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(absl::NotFoundError("gone")));

  EXPECT_EQ(back.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(back), v1::ERROR_REASON_INTERNAL);
}

TEST(GrpcStatusTest, HostileDetailsAndCodesAreIgnored) {
  const absl::Status garbage =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::ABORTED, "a", "\xFF\xFF not a proto"));
  EXPECT_EQ(garbage, absl::AbortedError("a"));

  google::rpc::Status wire;
  wire.set_code(4711);
  EXPECT_EQ(FromRpcStatus(wire).code(), absl::StatusCode::kUnknown);
}

TEST(GrpcStatusTest, OkStaysOk) {
  EXPECT_TRUE(FromGrpcStatus(ToGrpcStatus(absl::OkStatus())).ok());
  EXPECT_TRUE(FromRpcStatus(ToRpcStatus(absl::OkStatus())).ok());
}

}  // namespace
}  // namespace headwater
