// Errors that peers report, and that travel on to clients.
#include <string>

#include "absl/strings/match.h"
#include "google/rpc/status.pb.h"

#include "base/rpc/grpc_status.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

void Run(absl::string_view input) {
  google::rpc::Status sent;
  if (sent.ParseFromArray(input.data(), static_cast<int>(input.size()))) {
    const absl::Status status = FromRpcStatus(sent);
    FUZZ_EXPECT(v1::ErrorReason_IsValid(ReasonOf(status)), "a reason of the closed set");
    const google::rpc::Status out = ToRpcStatus(status);
    FUZZ_EXPECT(out.code() >= 0 && out.code() <= 16, "a code of the closed set");
    FUZZ_EXPECT(FromRpcStatus(out).code() == status.code(), "codes survive the way");
    FUZZ_EXPECT(out.code() == 0 || out.details_size() >= 1, "an error says why");
  }
  const grpc::Status wire(grpc::StatusCode::ABORTED, "message", std::string(input));
  FUZZ_EXPECT(FromGrpcStatus(wire).code() == absl::StatusCode::kAborted, "details do not change the code");
}

std::vector<std::string> Seeds() {
  const absl::Status status =
      WithRetryAfter(MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_STALE_EPOCH, "epoch 3, not 4",
                               {{"field", "epoch"}}),
                     absl::Seconds(1));
  return {ToRpcStatus(status).SerializeAsString(), ToRpcStatus(absl::InternalError("x")).SerializeAsString(),
          ""};
}

const Registration kTarget({"rpc_status", Run, Seeds, Prototype<google::rpc::Status>});

}  // namespace
}  // namespace headwater::fuzz
