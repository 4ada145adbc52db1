// The coordinator's services over real gRPC, with scripted workers and decode nodes.
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <grpcpp/grpcpp.h>

#include "base/rpc/grpc_status.h"
#include "coordinator/coordinator_server.h"
#include "headwater/v1/admin.grpc.pb.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tests/coordinator/fakes.h"
#include "tests/coordinator/loopback.h"
#include "tests/support/dial.h"

namespace headwater::testing {
namespace {

struct CallResult {
  std::vector<v1::PrefillResponse> events;
  absl::Status status;

  bool completed() const { return status.ok() && !events.empty() && events.back().has_completed(); }
  // Of the call, or of its failed event.
  absl::Status outcome() const {
    if (!status.ok() || events.empty() || !events.back().has_failed()) return status;
    return FromRpcStatus(events.back().failed().error());
  }
};

void SetDeadline(grpc::ClientContext* context) {
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(120));
}

class ServiceLoopbackTest : public ::testing::Test {
 protected:
  void Start(const CoordinatorOptions& options = {}) {
    auto server = CoordinatorServer::Start(options, {"127.0.0.1:0", "", "", nullptr});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = DialPlaintext(server_->address());
    prefill_ = v1::PrefillService::NewStub(channel_);
    decode_ = std::make_unique<ScriptedDecodeNode>(server_->address(), "d0");
    ASSERT_TRUE(decode_->WaitUntilRegistered());
  }

  void AddWorker(const std::string& id, ScriptedWorker::Script script = ScriptedWorker::CompleteAtOnce) {
    workers_[id] = std::make_unique<ScriptedWorker>(server_->address(), id, std::move(script));
    ASSERT_TRUE(workers_[id]->WaitUntilRegistered());
  }

  CallResult Prefill(const v1::PrefillRequest& request) {
    grpc::ClientContext context;
    SetDeadline(&context);
    const auto reader = prefill_->Prefill(&context, request);
    CallResult result;
    v1::PrefillResponse event;
    while (reader->Read(&event)) result.events.push_back(event);
    result.status = FromGrpcStatus(reader->Finish());
    return result;
  }

  absl::Status Cancel(const std::string& id, v1::CancelPrefillResponse* response) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::CancelPrefillRequest request;
    request.set_request_id(id);
    return FromGrpcStatus(prefill_->CancelPrefill(&context, request, response));
  }

  v1::ListWorkersResponse ListWorkers() {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::ListWorkersResponse response;
    const auto status =
        v1::AdminService::NewStub(channel_)->ListWorkers(&context, v1::ListWorkersRequest(), &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }

  // Polls, for conditions that only the service's own API shows.
  template <typename Condition>
  bool Eventually(Condition condition) {
    const absl::Time end = absl::Now() + absl::Seconds(10);
    while (!condition()) {
      if (absl::Now() > end) return false;
      absl::SleepFor(absl::Milliseconds(5));
    }
    return true;
  }

  std::unique_ptr<CoordinatorServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::PrefillService::Stub> prefill_;
  std::unique_ptr<ScriptedDecodeNode> decode_;
  std::map<std::string, std::unique_ptr<ScriptedWorker>> workers_;
};

TEST_F(ServiceLoopbackTest, APromptGoesThroughTwoWorkersToTheDecodeNode) {
  Start();
  AddWorker("w0");
  AddWorker("w1");

  const CallResult result = Prefill(MakeRequest("r", 5000));

  ASSERT_TRUE(result.completed()) << result.outcome();
  EXPECT_TRUE(result.events.front().has_accepted());
  const auto& completed = result.events.back().completed();
  EXPECT_EQ(completed.plan().world_size(), 2u);
  EXPECT_EQ(completed.first_token(), 4999u % 256);
  EXPECT_EQ(completed.kv_digest(), "04040404040404040404040404040404");
  const auto commit = decode_->committed(completed.session_id());
  EXPECT_EQ(commit.token_ids_size(), 5000);
  EXPECT_EQ(commit.first_token(), completed.first_token());
}

TEST_F(ServiceLoopbackTest, AnExplanationComesBackWhereItIsAskedFor) {
  Start();
  AddWorker("w0");
  AddWorker("w1");
  v1::PrefillRequest request = MakeRequest("explained", 5000);
  request.set_explain(true);

  const CallResult explained = Prefill(request);
  const CallResult plain = Prefill(MakeRequest("plain", 5000));

  ASSERT_TRUE(explained.completed()) << explained.outcome();
  const v1::PlanExplanation& explanation = explained.events.front().accepted().explanation();
  EXPECT_EQ(explanation.summary(),
            "2 workers, zigzag, ring; as many workers as are of use; nothing is predicted");
  ASSERT_EQ(explanation.candidates_size(), 3);
  EXPECT_TRUE(explanation.candidates(0).chosen());
  EXPECT_FALSE(explanation.candidates(0).has_cost());
  ASSERT_TRUE(plain.completed()) << plain.outcome();
  EXPECT_FALSE(plain.events.front().accepted().has_explanation());
}

TEST_F(ServiceLoopbackTest, ErrorsBeforeAcceptanceAreStatusesWithReasons) {
  Start();
  AddWorker("w0");
  const CallResult empty = Prefill(MakeRequest("r", 0));
  EXPECT_EQ(empty.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReasonOf(empty.status), v1::ERROR_REASON_EMPTY_PROMPT);
  v1::PrefillRequest request = MakeRequest("r", 3);
  request.set_decode_node("evil.example:1");
  const CallResult unknown = Prefill(request);
  EXPECT_EQ(unknown.status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(unknown.status), v1::ERROR_REASON_UNKNOWN_DECODE_NODE);
}

TEST_F(ServiceLoopbackTest, AKilledWorkersPromptIsRetriedOnTheLiving) {
  Start();
  AddWorker("w0", ScriptedWorker::Stall);
  AddWorker("w1", ScriptedWorker::Stall);
  CallResult result;
  std::thread caller([&] { result = Prefill(MakeRequest("r", 5000)); });
  EXPECT_TRUE(workers_["w0"]->WaitForAssignments(1));
  EXPECT_TRUE(workers_["w1"]->WaitForAssignments(1));
  AddWorker("w2");
  workers_["w0"]->Kill();
  workers_["w1"]->Kill();
  caller.join();

  ASSERT_TRUE(result.completed()) << result.outcome();
  // 3 where w1 answered the abort before it was killed, too.
  EXPECT_GE(result.events.back().completed().epoch(), 2u);
  EXPECT_LE(result.events.back().completed().epoch(), 3u);
  EXPECT_EQ(result.events.back().completed().plan().worker_ids(0), "w2");
}

TEST_F(ServiceLoopbackTest, ACallersTraceGoesOnToTheDecodeNodeUnderASpanOfOurs) {
  Start();
  AddWorker("w0");
  const std::string trace = "0af7651916cd43dd8448eb211c80319c", caller = "b7ad6b7169203331";
  grpc::ClientContext context;
  SetDeadline(&context);
  context.AddMetadata("traceparent", absl::StrCat("00-", trace, "-", caller, "-01"));
  const auto reader = prefill_->Prefill(&context, MakeRequest("r", 10));
  v1::PrefillResponse event;
  while (reader->Read(&event)) {
  }
  ASSERT_TRUE(reader->Finish().ok());
  EXPECT_EQ(event.completed().trace_id(), trace);
  const std::string passed_on = decode_->traceparent();
  EXPECT_EQ(passed_on.substr(0, 36), absl::StrCat("00-", trace, "-"));
  EXPECT_EQ(passed_on.substr(52), "-01");
  EXPECT_EQ(passed_on.find(caller), std::string::npos);
  EXPECT_TRUE(Prefill(MakeRequest("without", 10)).completed());
  EXPECT_EQ(decode_->traceparent().size(), 55u) << "a new trace";
  EXPECT_EQ(decode_->traceparent().find(trace), std::string::npos);
}

TEST_F(ServiceLoopbackTest, CancelAnswersWhenAllIsReclaimed) {
  Start();
  AddWorker("w0", ScriptedWorker::Stall);
  CallResult result;
  std::thread caller([&] { result = Prefill(MakeRequest("r", 10)); });
  EXPECT_TRUE(workers_["w0"]->WaitForAssignments(1));

  v1::CancelPrefillResponse response;
  EXPECT_TRUE(Cancel("r", &response).ok());
  EXPECT_TRUE(response.cancelled());
  EXPECT_EQ(decode_->num_open(), 0u);
  EXPECT_EQ(ListWorkers().workers(0).request_id(), "");
  caller.join();

  EXPECT_TRUE(result.status.ok()) << "accepted calls end with an event";
  EXPECT_EQ(result.outcome().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ReasonOf(Cancel("nobody", &response)), v1::ERROR_REASON_UNKNOWN_REQUEST);
}

TEST_F(ServiceLoopbackTest, ADisconnectingClientCancelsItsRequest) {
  Start();
  AddWorker("w0", ScriptedWorker::Stall);
  {
    grpc::ClientContext context;
    const auto reader = prefill_->Prefill(&context, MakeRequest("r", 10));
    EXPECT_TRUE(workers_["w0"]->WaitForAssignments(1));
    context.TryCancel();
    reader->Finish();
  }
  EXPECT_TRUE(workers_["w0"]->WaitForAborts(1));
  EXPECT_TRUE(Eventually([&] { return server_->NumJobs() == 0 && decode_->num_open() == 0; }));
}

TEST_F(ServiceLoopbackTest, TheCallsOwnDeadlineCancelsTheRequest) {
  Start();
  AddWorker("w0", ScriptedWorker::Stall);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
  const auto reader = prefill_->Prefill(&context, MakeRequest("r", 10));
  v1::PrefillResponse event;
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([&] { return server_->NumJobs() == 0; }));
}

TEST_F(ServiceLoopbackTest, TwoCallsWithOneIdAreOneExecution) {
  Start();
  AddWorker("w0", ScriptedWorker::Stall);
  CallResult first;
  std::thread caller([&] { first = Prefill(MakeRequest("r", 10)); });
  EXPECT_TRUE(workers_["w0"]->WaitForAssignments(1));
  grpc::ClientContext context;
  SetDeadline(&context);
  const auto second = prefill_->Prefill(&context, MakeRequest("r", 10));
  v1::PrefillResponse event;
  ASSERT_TRUE(second->Read(&event));
  EXPECT_TRUE(event.has_accepted()) << "attached";
  context.TryCancel();
  second->Finish();
  AddWorker("w1");
  workers_["w0"]->Kill();
  caller.join();

  ASSERT_TRUE(first.completed()) << "the other call's end did not cancel it: " << first.outcome();
  const CallResult replay = Prefill(MakeRequest("r", 10));
  ASSERT_TRUE(replay.completed());
  EXPECT_EQ(replay.events.size(), 1u);
  EXPECT_EQ(replay.events.back().completed().session_id(), first.events.back().completed().session_id());
  EXPECT_EQ(Prefill(MakeRequest("r", 11)).status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(decode_->num_committed(), 1u);
}

TEST_F(ServiceLoopbackTest, BatchItemsSucceedAndFailOneByOne) {
  Start();
  AddWorker("w0");
  AddWorker("w1");
  v1::BatchPrefillRequest batch;
  for (int i = 0; i < 40; ++i) *batch.add_items() = MakeRequest("", 1 + i * 40);
  *batch.add_items() = MakeRequest("empty", 0);
  *batch.add_items() = MakeRequest("model", 3);
  batch.mutable_items(41)->set_model("gpt-9");

  grpc::ClientContext context;
  SetDeadline(&context);
  const auto reader = prefill_->BatchPrefill(&context, batch);
  std::map<uint32_t, v1::PrefillResponse> ends;
  v1::BatchPrefillResponse event;
  while (reader->Read(&event)) {
    if (!event.response().has_completed() && !event.response().has_failed()) continue;
    EXPECT_TRUE(ends.emplace(event.item(), event.response()).second) << "two ends of item " << event.item();
  }
  const grpc::Status status = reader->Finish();

  EXPECT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(ends.size(), 42u);
  for (uint32_t i = 0; i < 40; ++i) {
    ASSERT_TRUE(ends[i].has_completed()) << i;
    EXPECT_EQ(ends[i].completed().num_tokens(), 1 + i * 40);
  }
  EXPECT_EQ(ends[40].failed().request_id(), "empty");
  EXPECT_EQ(ReasonOf(FromRpcStatus(ends[40].failed().error())), v1::ERROR_REASON_EMPTY_PROMPT);
  EXPECT_EQ(ReasonOf(FromRpcStatus(ends[41].failed().error())), v1::ERROR_REASON_UNKNOWN_MODEL);
  EXPECT_EQ(decode_->num_committed(), 40u);
}

TEST_F(ServiceLoopbackTest, ABatchOfOnlyBadItemsEndsWithTheirFailures) {
  Start();
  v1::BatchPrefillRequest batch;
  for (int i = 0; i < 3; ++i) *batch.add_items() = MakeRequest("", 0);
  grpc::ClientContext context;
  SetDeadline(&context);
  const auto reader = prefill_->BatchPrefill(&context, batch);
  v1::BatchPrefillResponse event;
  int failures = 0;
  while (reader->Read(&event)) failures += event.response().has_failed() ? 1 : 0;
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(failures, 3);
}

TEST_F(ServiceLoopbackTest, AbandonedBatchesLeaveNothing) {
  Start();
  AddWorker("w0", ScriptedWorker::Stall);
  v1::BatchPrefillRequest batch;
  for (int i = 0; i < 50; ++i) *batch.add_items() = MakeRequest("", 10);
  {
    grpc::ClientContext context;
    const auto reader = prefill_->BatchPrefill(&context, batch);
    EXPECT_TRUE(workers_["w0"]->WaitForAssignments(1));
    context.TryCancel();
    reader->Finish();
  }
  EXPECT_TRUE(Eventually([&] { return server_->NumJobs() == 0; }));
  EXPECT_EQ(decode_->num_open(), 0u);
}

TEST_F(ServiceLoopbackTest, ASlowReaderHoldsNobodyUpAndStillGetsItsEnd) {
  Start();
  AddWorker("w0", [](ScriptedWorker* worker, const v1::PrefillAssignment& assignment) {
    for (int i = 0; i < 200; ++i) ScriptedWorker::CompleteAtOnce(worker, assignment);
  });
  grpc::ClientContext context;
  SetDeadline(&context);
  const auto slow = prefill_->Prefill(&context, MakeRequest("slow", 10));
  EXPECT_TRUE(Eventually([&] { return decode_->num_committed() == 1; }));
  EXPECT_TRUE(Prefill(MakeRequest("quick", 10)).completed());
  v1::PrefillResponse event;
  v1::PrefillResponse last;
  while (slow->Read(&event)) last = event;
  EXPECT_TRUE(slow->Finish().ok());
  EXPECT_TRUE(last.has_completed());
}

TEST_F(ServiceLoopbackTest, StreamsThatBreakTheProtocolAreEnded) {
  Start();
  const auto ends_with = [&](const v1::ConnectRequest& first) {
    const auto stub = v1::WorkerControlService::NewStub(channel_);
    grpc::ClientContext context;
    SetDeadline(&context);
    const auto stream = stub->Connect(&context);
    stream->Write(first);
    v1::ConnectResponse response;
    while (stream->Read(&response)) {
    }
    return FromGrpcStatus(stream->Finish());
  };
  v1::ConnectRequest message;
  message.mutable_heartbeat();
  EXPECT_EQ(ends_with(message).code(), absl::StatusCode::kInvalidArgument);
  *message.mutable_registration() = MakeWorker("w9");
  message.mutable_registration()->set_protocol_version(99);
  const absl::Status version = ends_with(message);
  EXPECT_EQ(version.code(), absl::StatusCode::kFailedPrecondition) << version;
  EXPECT_EQ(ListWorkers().workers_size(), 0);
}

TEST_F(ServiceLoopbackTest, ASecondRegistrationTakesTheFirstOnesPlace) {
  Start();
  AddWorker("w0", ScriptedWorker::Stall);
  ScriptedWorker second(server_->address(), "w0", ScriptedWorker::CompleteAtOnce);
  EXPECT_TRUE(second.WaitUntilRegistered());
  EXPECT_EQ(workers_["w0"]->Finish().error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(ListWorkers().workers_size(), 1);
  EXPECT_TRUE(Prefill(MakeRequest("r", 10)).completed());
}

TEST_F(ServiceLoopbackTest, AWorkerThatLeavesIsForgotten) {
  Start();
  AddWorker("w0");
  workers_.clear();
  EXPECT_TRUE(Eventually([&] { return ListWorkers().workers_size() == 0; }));
}

TEST_F(ServiceLoopbackTest, StoppingEndsOpenCallsWithATerminalEvent) {
  Start();
  AddWorker("w0", ScriptedWorker::Stall);
  CallResult running;
  CallResult queued;
  std::thread first([&] { running = Prefill(MakeRequest("running", 10)); });
  EXPECT_TRUE(workers_["w0"]->WaitForAssignments(1));
  std::thread second([&] { queued = Prefill(MakeRequest("queued", 10)); });
  EXPECT_TRUE(Eventually([&] { return server_->NumJobs() == 2; }));

  server_->BeginDrain();
  EXPECT_EQ(ReasonOf(Prefill(MakeRequest("late", 10)).status), v1::ERROR_REASON_DRAINING);
  EXPECT_EQ(server_->Stop(absl::Seconds(10)), 2u);
  first.join();
  second.join();

  EXPECT_EQ(ReasonOf(running.outcome()), v1::ERROR_REASON_DRAINING) << running.outcome();
  EXPECT_EQ(ReasonOf(queued.outcome()), v1::ERROR_REASON_DRAINING) << queued.outcome();
  EXPECT_TRUE(running.events.front().has_accepted());
  EXPECT_EQ(decode_->num_open(), 0u) << "the session was freed in order";
}

}  // namespace
}  // namespace headwater::testing
