// SubmitPrefill, WatchPrefill and GetPrefill over real gRPC.
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <grpcpp/grpcpp.h>

#include "base/rpc/grpc_status.h"
#include "coordinator/coordinator_server.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tests/coordinator/fakes.h"
#include "tests/coordinator/loopback.h"
#include "tests/support/dial.h"

namespace headwater::testing {
namespace {

class DetachedLoopbackTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto server = CoordinatorServer::Start({}, {"127.0.0.1:0", "", "", nullptr});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    stub_ = v1::PrefillService::NewStub(DialPlaintext(server_->address()));
    decode_ = std::make_unique<ScriptedDecodeNode>(server_->address(), "d0");
    ASSERT_TRUE(decode_->WaitUntilRegistered());
  }
  void AddWorker(ScriptedWorker::Script script) {
    worker_ = std::make_unique<ScriptedWorker>(server_->address(), "w0", std::move(script));
    ASSERT_TRUE(worker_->WaitUntilRegistered());
  }
  static void Limit(grpc::ClientContext* context) {
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  }
  absl::Status Submit(const v1::PrefillRequest& request, v1::SubmitPrefillResponse* response) {
    grpc::ClientContext context;
    Limit(&context);
    v1::SubmitPrefillRequest message;
    *message.mutable_request() = request;
    return FromGrpcStatus(stub_->SubmitPrefill(&context, message, response));
  }
  absl::Status Get(const std::string& id, v1::GetPrefillResponse* response) {
    grpc::ClientContext context;
    Limit(&context);
    v1::GetPrefillRequest request;
    request.set_request_id(id);
    return FromGrpcStatus(stub_->GetPrefill(&context, request, response));
  }
  std::pair<absl::Status, std::vector<v1::PrefillResponse>> Watch(const std::string& id) {
    grpc::ClientContext context;
    Limit(&context);
    v1::WatchPrefillRequest request;
    request.set_request_id(id);
    const auto reader = stub_->WatchPrefill(&context, request);
    std::vector<v1::PrefillResponse> events;
    v1::WatchPrefillResponse message;
    while (reader->Read(&message)) events.push_back(message.response());
    return {FromGrpcStatus(reader->Finish()), events};
  }

  std::unique_ptr<CoordinatorServer> server_;
  std::unique_ptr<v1::PrefillService::Stub> stub_;
  std::unique_ptr<ScriptedDecodeNode> decode_;
  std::unique_ptr<ScriptedWorker> worker_;
};

TEST_F(DetachedLoopbackTest, ASubmittedPromptEndsAndIsFoundAfterwards) {
  AddWorker(ScriptedWorker::CompleteAtOnce);
  v1::PrefillRequest request = MakeRequest("", 100);
  v1::SubmitPrefillResponse submitted;
  ASSERT_TRUE(Submit(request, &submitted).ok());
  EXPECT_FALSE(submitted.request_id().empty()) << "the coordinator names it";
  EXPECT_EQ(submitted.trace_id().size(), 32u);

  const auto [status, events] = Watch(submitted.request_id());
  EXPECT_TRUE(status.ok()) << status;
  ASSERT_FALSE(events.empty());
  EXPECT_EQ(events.back().completed().num_tokens(), 100u);
  v1::GetPrefillResponse last;
  ASSERT_TRUE(Get(submitted.request_id(), &last).ok());
  EXPECT_EQ(last.last().completed().session_id(), events.back().completed().session_id());

  // Once more is the same request, which has ended.
  request.set_request_id(submitted.request_id());
  v1::SubmitPrefillResponse again;
  ASSERT_TRUE(Submit(request, &again).ok());
  EXPECT_EQ(again.request_id(), submitted.request_id());
  EXPECT_EQ(decode_->num_committed(), 1u);
}

TEST_F(DetachedLoopbackTest, ItRunsOnWithoutWatchersUntilItIsCancelled) {
  AddWorker(ScriptedWorker::Stall);
  v1::SubmitPrefillResponse submitted;
  ASSERT_TRUE(Submit(MakeRequest("r", 10), &submitted).ok());
  ASSERT_TRUE(worker_->WaitForAssignments(1));
  {
    grpc::ClientContext context;
    v1::WatchPrefillRequest request;
    request.set_request_id("r");
    const auto reader = stub_->WatchPrefill(&context, request);
    v1::WatchPrefillResponse message;
    ASSERT_TRUE(reader->Read(&message));
    EXPECT_TRUE(message.response().has_accepted());
    context.TryCancel();
    reader->Finish();
  }
  // A hundred calls that ask again leave nothing behind and change nothing.
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(Submit(MakeRequest("r", 10), &submitted).ok());
  absl::SleepFor(absl::Milliseconds(200));
  EXPECT_EQ(server_->NumJobs(), 1u);
  v1::GetPrefillResponse last;
  ASSERT_TRUE(Get("r", &last).ok());
  EXPECT_TRUE(last.last().has_progress());

  grpc::ClientContext context;
  Limit(&context);
  v1::CancelPrefillRequest cancel;
  cancel.set_request_id("r");
  v1::CancelPrefillResponse cancelled;
  ASSERT_TRUE(stub_->CancelPrefill(&context, cancel, &cancelled).ok());
  EXPECT_TRUE(cancelled.cancelled());
  const auto [status, events] = Watch("r");
  EXPECT_TRUE(status.ok());
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(FromRpcStatus(events[0].failed().error()).code(), absl::StatusCode::kCancelled);
}

TEST_F(DetachedLoopbackTest, RefusalsSayWhy) {
  AddWorker(ScriptedWorker::CompleteAtOnce);
  v1::SubmitPrefillResponse submitted;
  EXPECT_EQ(ReasonOf(Submit(v1::PrefillRequest(), &submitted)), v1::ERROR_REASON_EMPTY_PROMPT);
  v1::PrefillRequest stranger = MakeRequest("s", 10);
  stranger.set_model("stranger");
  EXPECT_EQ(ReasonOf(Submit(stranger, &submitted)), v1::ERROR_REASON_UNKNOWN_MODEL);
  v1::GetPrefillResponse last;
  EXPECT_EQ(ReasonOf(Get("nobody", &last)), v1::ERROR_REASON_UNKNOWN_REQUEST);
  EXPECT_EQ(ReasonOf(Watch("nobody").first), v1::ERROR_REASON_UNKNOWN_REQUEST);
}

TEST_F(DetachedLoopbackTest, ACallThatEndsBeforeTheAnswerCancelsNothing) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
  v1::SubmitPrefillRequest message;
  *message.mutable_request() = MakeRequest("early", 10);
  message.mutable_request()->set_model("tiny");
  v1::SubmitPrefillResponse response;
  EXPECT_EQ(stub_->SubmitPrefill(&context, message, &response).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED)
      << "no worker serves its model yet";
  AddWorker(ScriptedWorker::CompleteAtOnce);
  const auto [status, events] = Watch("early");
  EXPECT_TRUE(status.ok()) << status;
  ASSERT_FALSE(events.empty());
  EXPECT_TRUE(events.back().has_completed());
}

}  // namespace
}  // namespace headwater::testing
