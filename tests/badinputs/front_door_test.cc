// Bad requests and registrations, sent to a live coordinator.
#include <memory>
#include <string>

#include "gtest/gtest.h"
#include <grpcpp/grpcpp.h>

#include "base/rpc/grpc_status.h"
#include "coordinator/coordinator_server.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "headwater/v1/worker.grpc.pb.h"
#include "tests/badinputs/cases.h"
#include "tests/coordinator/fakes.h"
#include "tests/coordinator/loopback.h"
#include "tests/support/dial.h"

namespace headwater::testing {
namespace {

TEST(CatalogueTest, HasAtLeastTwoHundredCases) {
  const size_t count = NumCases();
  std::printf("the catalogue has %zu bad inputs\n", count);
  EXPECT_GE(count, 300u);
}

class FrontDoorTest : public ::testing::Test {
 protected:
  void SetUp() override {
    CoordinatorOptions options;
    options.max_batch_items = 8;
    options.max_batch_tokens = 100;
    auto server = CoordinatorServer::Start(options, {"127.0.0.1:0", "", "", nullptr});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = DialPlaintext(server_->address());
    decode_ = std::make_unique<ScriptedDecodeNode>(server_->address(), "d0");
    ASSERT_TRUE(decode_->WaitUntilRegistered());
    worker_ = std::make_unique<ScriptedWorker>(server_->address(), "w0", ScriptedWorker::CompleteAtOnce);
    ASSERT_TRUE(worker_->WaitUntilRegistered());
    ExpectAlive();
  }

  void TearDown() override { ExpectAlive(); }

  static void Limit(grpc::ClientContext* context) {
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  }

  static v1::PrefillRequest Good() {
    v1::PrefillRequest request;
    for (const uint32_t token : {211u, 223u, 227u, 229u}) request.add_token_ids(token);
    return request;
  }

  // Of the call, or of the failed event that ends it.
  absl::Status Prefill(const v1::PrefillRequest& request) {
    const auto stub = v1::PrefillService::NewStub(channel_);
    grpc::ClientContext context;
    Limit(&context);
    const auto reader = stub->Prefill(&context, request);
    v1::PrefillResponse event, last;
    while (reader->Read(&event)) last = event;
    const absl::Status status = FromGrpcStatus(reader->Finish());
    return status.ok() && last.has_failed() ? FromRpcStatus(last.failed().error()) : status;
  }

  absl::Status Batch(const v1::BatchPrefillRequest& batch) {
    const auto stub = v1::PrefillService::NewStub(channel_);
    grpc::ClientContext context;
    Limit(&context);
    const auto reader = stub->BatchPrefill(&context, batch);
    v1::BatchPrefillResponse event;
    while (reader->Read(&event)) {
    }
    return FromGrpcStatus(reader->Finish());
  }

  absl::Status Connect(const v1::ConnectRequest& first) {
    const auto stub = v1::WorkerControlService::NewStub(channel_);
    grpc::ClientContext context;
    Limit(&context);
    const auto stream = stub->Connect(&context);
    stream->Write(first);
    v1::ConnectResponse response;
    if (stream->Read(&response)) context.TryCancel();
    return FromGrpcStatus(stream->Finish());
  }

  absl::Status Register(const v1::RegisterRequest& first) {
    const auto stub = v1::DecodeRegistryService::NewStub(channel_);
    grpc::ClientContext context;
    Limit(&context);
    const auto stream = stub->Register(&context);
    stream->Write(first);
    v1::RegisterResponse response;
    if (stream->Read(&response)) context.TryCancel();
    return FromGrpcStatus(stream->Finish());
  }

  void ExpectAlive() {
    const absl::Status status = Prefill(Good());
    EXPECT_TRUE(status.ok()) << status;
  }

  std::unique_ptr<CoordinatorServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<ScriptedDecodeNode> decode_;
  std::unique_ptr<ScriptedWorker> worker_;
};

TEST_F(FrontDoorTest, RefusesBadFieldsOfRequests) {
  ExpectRefusals(kPrefillCases, [this](const BadInput& bad) {
    v1::PrefillRequest request = Good();
    Override(bad.text, &request);
    return Prefill(request);
  });
}

TEST_F(FrontDoorTest, RefusesBadRequests) {
  ExpectRefusals(kPrefillWholeCases, [this](const BadInput& bad) {
    v1::PrefillRequest request;
    Override(bad.text, &request);
    return Prefill(request);
  });
}

// proto3 strings are UTF-8: a message with another one does not parse, which gRPC itself answers in its way.
TEST_F(FrontDoorTest, RefusesTextThatIsNotUtf8) {
  v1::PrefillRequest request = Good();
  request.set_model("\xff\xfe");
  EXPECT_EQ(Prefill(request).code(), absl::StatusCode::kUnimplemented);
}

TEST_F(FrontDoorTest, RefusesBadBatches) {
  ExpectRefusals(kBatchCases, [this](const BadInput& bad) {
    v1::BatchPrefillRequest batch;
    Override(bad.text, &batch);
    return Batch(batch);
  });
}

TEST_F(FrontDoorTest, RefusesBadWorkers) {
  ExpectRefusals(kWorkerCases, [this](const BadInput& bad) {
    v1::ConnectRequest first;
    *first.mutable_registration() = MakeWorker("w9");
    Override(bad.text, first.mutable_registration());
    return Connect(first);
  });
}

TEST_F(FrontDoorTest, RefusesBadDecodeNodes) {
  ExpectRefusals(kDecodeCases, [this](const BadInput& bad) {
    v1::RegisterRequest first;
    *first.mutable_registration() = MakeDecodeNode("d9");
    Override(bad.text, first.mutable_registration());
    return Register(first);
  });
}

// Messages that are well-formed and come at the wrong time.
TEST_F(FrontDoorTest, RefusesStreamsThatDoNotBeginWithARegistration) {
  v1::ConnectRequest heartbeat, progress, nothing;
  heartbeat.mutable_heartbeat();
  progress.mutable_progress()->set_request_id("r");
  for (const v1::ConnectRequest& first : {heartbeat, progress, nothing}) {
    const absl::Status status = Connect(first);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  }
  v1::RegisterRequest beat, empty;
  beat.mutable_heartbeat();
  for (const v1::RegisterRequest& first : {beat, empty}) {
    const absl::Status status = Register(first);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  }
}

}  // namespace
}  // namespace headwater::testing
