#include "decode/service.h"

#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <grpcpp/client_context.h>

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "tests/decode/engine_fixture.h"
#include "tests/support/dial.h"

namespace headwater::testing {
namespace {

using ::testing::ElementsAreArray;

class DecodeServiceTest : public ::testing::Test {
 protected:
  DecodeServiceTest()
      : engine_(fixture_.MakeEngine()),
        service_(MakeDecodeService(engine_.get())),
        server_(*StartServer("127.0.0.1:0", {service_.get()})),
        stub_(v1::DecodeService::NewStub(DialPlaintext(server_.address))) {}
  ~DecodeServiceTest() override {
    server_.server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
  }

  static void Limit(grpc::ClientContext* context) {
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  }

  absl::StatusOr<std::vector<int32_t>> Generate(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    Limit(&context);
    const auto reader = stub_->Generate(&context, request);
    std::vector<int32_t> ids;
    v1::GenerateResponse token;
    while (reader->Read(&token)) ids.push_back(static_cast<int32_t>(token.token_id()));
    const absl::Status status = FromGrpcStatus(reader->Finish());
    if (!status.ok()) return status;
    return ids;
  }

  absl::StatusOr<uint64_t> Release(const std::string& session_id) {
    grpc::ClientContext context;
    Limit(&context);
    v1::ReleaseRequest request;
    request.set_session_id(session_id);
    v1::ReleaseResponse response;
    const absl::Status status = FromGrpcStatus(stub_->Release(&context, request, &response));
    if (!status.ok()) return status;
    return response.bytes_reclaimed();
  }

  EngineFixture fixture_;
  std::unique_ptr<GenerationEngine> engine_;
  std::unique_ptr<grpc::Service> service_;
  RunningServer server_;
  std::unique_ptr<v1::DecodeService::Stub> stub_;
};

TEST_F(DecodeServiceTest, StreamsTokensAndGoesOn) {
  const std::vector<int32_t> expected = fixture_.Expected(fixture_.prompt_a, 20);

  const auto first = Generate(MakeGenerate("a", 16));
  const auto second = Generate(MakeGenerate("a", 4));

  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_THAT(*first, ElementsAreArray(expected.begin(), expected.begin() + 16));
  EXPECT_THAT(*second, ElementsAreArray(expected.begin() + 16, expected.end()));
}

TEST_F(DecodeServiceTest, StreamsMoreTokensThanMayWait) {
  const auto all = Generate(MakeGenerate("b", 300));

  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->size(), 300u);
}

TEST_F(DecodeServiceTest, CarriesReasonsOfErrors) {
  const auto unknown = Generate(MakeGenerate("nobody", 1));
  const auto bad = Generate(MakeGenerate("a", 0));

  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(unknown.status()), v1::ERROR_REASON_UNKNOWN_SESSION);
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReasonOf(bad.status()), v1::ERROR_REASON_BAD_FIELD);
}

TEST_F(DecodeServiceTest, AClientThatLeavesStopsItsGeneration) {
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, MakeGenerate("a", 2000));
  v1::GenerateResponse token;
  ASSERT_TRUE(reader->Read(&token));
  grpc::ClientContext second_context;
  const auto second = stub_->Generate(&second_context, MakeGenerate("a", 1));
  EXPECT_FALSE(second->Read(&token));
  EXPECT_EQ(second->Finish().error_code(), grpc::StatusCode::ABORTED);

  context.TryCancel();

  while (reader->Read(&token)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(engine_->WaitIdle(absl::Seconds(30)));
  const auto after = Generate(MakeGenerate("a", 1));
  EXPECT_TRUE(after.ok()) << "the session is free again: " << after.status();
}

TEST_F(DecodeServiceTest, ASlowClientsGenerationRestsAndIsCompleteInTheEnd) {
  grpc::ClientContext context;
  Limit(&context);
  const auto reader = stub_->Generate(&context, MakeGenerate("a", 1500));
  const auto other = Generate(MakeGenerate("b", 5));
  EXPECT_TRUE(other.ok()) << other.status();

  v1::GenerateResponse token;
  uint64_t position = fixture_.prompt_a.tokens.size();
  while (reader->Read(&token)) EXPECT_EQ(token.position(), position++);

  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(position, fixture_.prompt_a.tokens.size() + 1500);
}

TEST_F(DecodeServiceTest, ReleaseWhileGeneratingEndsTheStream) {
  grpc::ClientContext context;
  Limit(&context);
  const auto reader = stub_->Generate(&context, MakeGenerate("a", 2000));
  v1::GenerateResponse token;
  ASSERT_TRUE(reader->Read(&token));

  const auto bytes = Release("a");

  while (reader->Read(&token)) {
  }
  const absl::Status ended = FromGrpcStatus(reader->Finish());
  EXPECT_EQ(ended.code(), absl::StatusCode::kNotFound) << ended;
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_GT(*bytes, 0u);
  EXPECT_EQ(fixture_.caches.store()->usage().sessions, 1u);
  EXPECT_EQ(*Release("nobody"), 0u);
  EXPECT_EQ(Release("").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(DecodeServiceTest, ShutdownEndsStreamsInTime) {
  grpc::ClientContext context;
  Limit(&context);
  const auto reader = stub_->Generate(&context, MakeGenerate("a", 2000));
  v1::GenerateResponse token;
  ASSERT_TRUE(reader->Read(&token));
  std::thread client([&] {
    while (reader->Read(&token)) {
    }
    reader->Finish();
  });

  server_.server->Shutdown(std::chrono::system_clock::now());

  client.join();
  EXPECT_TRUE(engine_->WaitIdle(absl::Seconds(30)));
}

}  // namespace
}  // namespace headwater::testing
