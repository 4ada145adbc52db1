// Decode nodes that are away, forget, refuse or fall silent.
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"
#include "tests/coordinator/scheduler_pair.h"

namespace headwater::testing {
namespace {

using Kind = FakeDecodeClient::Kind;
using SchedulerDecodeFaultsTest = SchedulerPairTest;

TEST_F(SchedulerDecodeFaultsTest, AStalledStreamFailsTheRequestAsRetryable) {
  StartPair();
  cluster_->Fail("w0", Error(absl::StatusCode::kAborted, v1::ERROR_REASON_KV_STREAM_STALLED));
  cluster_->Fail("w1", absl::CancelledError("aborted"));
  EXPECT_EQ(cluster_->decode.pending.size(), 1u) << "an attempt to free the session";
  cluster_->decode.AnswerAll(absl::UnavailableError("away"));

  EXPECT_EQ(watcher_->result().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_DECODE_LOST);
}

TEST_F(SchedulerDecodeFaultsTest, ASessionThatTheNodeForgotIsOpenedAnewInANewEpoch) {
  for (const absl::Status& forgotten :
       {Error(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION),
        Error(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DECODE_LOST)}) {
    StartPair();
    cluster_->decode.open_sessions.clear();
    cluster_->Fail("w0", forgotten);
    cluster_->Fail("w1", absl::CancelledError("aborted"));
    EXPECT_TRUE(cluster_->TakeAbort("w1"));
    CompleteOn({"w0", "w1"});
    EXPECT_TRUE(watcher_->result().ok()) << watcher_->result();
    EXPECT_EQ(watcher_->completed().epoch(), 2u);
  }
}

TEST_F(SchedulerDecodeFaultsTest, ANodeThatForgetsEverySessionIsLostInTheEnd) {
  CoordinatorOptions options;
  options.max_epochs = 2;
  StartPair(options);
  for (int epoch = 1; epoch <= 2; ++epoch) {
    cluster_->Fail("w0", Error(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DECODE_LOST));
    EXPECT_TRUE(cluster_->TakeAbort("w1"));
    cluster_->Fail("w1", absl::CancelledError("aborted"));
    cluster_->decode.AnswerAll();
    if (epoch == 2) break;
    cluster_->TakeAssignment("w0");
    cluster_->TakeAssignment("w1");
  }
  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_DECODE_LOST) << watcher_->result();
}

TEST_F(SchedulerDecodeFaultsTest, ASessionForgottenAtTheCommitIsOpenedAnewInANewEpoch) {
  StartPair();
  cluster_->Complete("w0");
  cluster_->Complete("w1");
  cluster_->decode.open_sessions.clear();
  cluster_->decode.Answer(Error(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION));
  CompleteOn({"w0", "w1"});
  EXPECT_TRUE(watcher_->result().ok()) << watcher_->result();
  EXPECT_EQ(watcher_->completed().epoch(), 2u);
}

TEST_F(SchedulerDecodeFaultsTest, TheCommitIsRepeatedWhileTheNodeIsAway) {
  StartPair();
  cluster_->Complete("w0");
  cluster_->Complete("w1");
  for (int i = 0; i < 20; ++i) {
    cluster_->decode.AnswerAll(absl::UnavailableError("away"));
    cluster_->Advance(absl::Seconds(1));
  }
  EXPECT_FALSE(watcher_->ended());
  cluster_->decode.AnswerAll();
  EXPECT_TRUE(watcher_->result().ok()) << watcher_->result();
  EXPECT_EQ(watcher_->completed().epoch(), 1u);
}

TEST_F(SchedulerDecodeFaultsTest, ANodeAwayForLongerThanTheGraceFailsTheCommit) {
  StartPair();
  cluster_->Complete("w0");
  cluster_->Complete("w1");
  for (int i = 0; i < 32 && !watcher_->ended(); ++i) {
    cluster_->decode.AnswerAll(absl::UnavailableError("away"));
    cluster_->Advance(absl::Seconds(1));
  }
  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_DECODE_LOST) << watcher_->result();
}

TEST_F(SchedulerDecodeFaultsTest, TheRestartedNodesNewAddressIsUsed) {
  StartPair();
  cluster_->Complete("w0");
  cluster_->Complete("w1");
  cluster_->decode.Answer(absl::UnavailableError("away"));
  auto registration = MakeDecodeNode("d0");
  registration.set_incarnation("i2");
  registration.set_kv_address("moved:1");
  ASSERT_TRUE(cluster_->scheduler.AddDecodeNode(registration, std::make_shared<FakeDecodeLink>()).ok());
  cluster_->Advance(absl::Seconds(0.5));
  ASSERT_EQ(cluster_->decode.pending.size(), 1u);
  EXPECT_EQ(cluster_->decode.pending[0].kv_address, "moved:1");
}

TEST_F(SchedulerDecodeFaultsTest, AFailedCommitReachesTheClientAsItIs) {
  StartPair();
  cluster_->Complete("w0");
  cluster_->Complete("w1");
  cluster_->decode.Answer(Error(absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT));
  cluster_->decode.AnswerAll();
  EXPECT_EQ(watcher_->result().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(cluster_->decode.aborts, 1);
}

TEST_F(SchedulerDecodeFaultsTest, OpeningIsRepeatedWhileTheNodeIsAwayAndRefusalsAreFinal) {
  cluster_ = std::make_unique<FakeCluster>();
  cluster_->AddDecodeNode();
  cluster_->AddWorker("w0");
  watcher_ = cluster_->Submit(MakeRequest("r", 10));
  cluster_->decode.Answer(absl::UnavailableError("away"));
  EXPECT_TRUE(cluster_->decode.pending.empty());
  cluster_->Advance(absl::Seconds(0.5));
  cluster_->decode.Answer(Error(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL));
  cluster_->decode.AnswerAll();
  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_KV_MEMORY_FULL) << watcher_->result();
  EXPECT_EQ(cluster_->scheduler.ListWorkers().workers(0).request_id(), "") << "the worker is free";
}

TEST_F(SchedulerDecodeFaultsTest, ADecodeNodeStaysKnownForTheGraceAfterItsStreamEnds) {
  StartPair();
  const uint64_t connection = cluster_->AddDecodeNode("d1", "second");
  cluster_->scheduler.OnDecodeClosed(connection);
  EXPECT_FALSE(cluster_->scheduler.ListDecodeNodes().decode_nodes(1).connected());
  v1::PrefillRequest request = MakeRequest("late", 10);
  request.set_decode_node("d1");
  EXPECT_TRUE(cluster_->Submit(request)->accepted());
  cluster_->Advance(absl::Seconds(31));
  EXPECT_EQ(cluster_->scheduler.ListDecodeNodes().decode_nodes_size(), 1);
  request.set_request_id("later");
  EXPECT_EQ(ReasonOf(cluster_->Submit(request)->result()), v1::ERROR_REASON_UNKNOWN_DECODE_NODE);
}

TEST_F(SchedulerDecodeFaultsTest, ASilentDecodeNodeIsDisconnected) {
  StartPair();
  cluster_->decode_muted = true;
  cluster_->Advance(absl::Seconds(4));
  EXPECT_FALSE(cluster_->scheduler.ListDecodeNodes().decode_nodes(0).connected());
  EXPECT_FALSE(watcher_->ended()) << "its stream may come back";
}

// What ends with its deadline must not wait for a node that does not answer.
TEST_F(SchedulerDecodeFaultsTest, ASessionAtANodeThatIsAwayIsLeftToItsLeaseSoon) {
  v1::PrefillRequest request = MakeRequest("r", 4000);
  request.mutable_deadline()->set_seconds(1);
  for (const bool away : {false, true}) {
    SCOPED_TRACE(away);
    cluster_ = std::make_unique<FakeCluster>();
    const uint64_t node = cluster_->AddDecodeNode();
    cluster_->AddWorker("w0");
    watcher_ = cluster_->Submit(request);
    cluster_->decode.AnswerAll();
    cluster_->TakeAssignment("w0");
    if (away) cluster_->scheduler.OnDecodeClosed(node);
    cluster_->Advance(absl::Seconds(1.5));
    cluster_->Fail("w0", absl::CancelledError("aborted"));
    ASSERT_EQ(cluster_->decode.pending.size(), 1u);
    EXPECT_EQ(cluster_->decode.pending[0].kind, Kind::kAbort);
    EXPECT_EQ(cluster_->decode.pending[0].timeout, away ? absl::Milliseconds(500) : absl::Seconds(5));
    cluster_->decode.Answer(away ? absl::UnavailableError("away") : absl::OkStatus());
    EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_DEADLINE) << watcher_->result();
  }
}

}  // namespace
}  // namespace headwater::testing
