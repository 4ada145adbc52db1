// Workers that fail, and time that passes.
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "base/rpc/closed_text.h"
#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"
#include "tests/coordinator/scheduler_pair.h"

namespace headwater::testing {
namespace {

using Kind = FakeDecodeClient::Kind;

using SchedulerFaultsTest = SchedulerPairTest;

TEST_F(SchedulerFaultsTest, ALostWorkersPromptGoesOnInANewEpochOnTheLiving) {
  StartPair();
  cluster_->Progress("w0", 2);

  cluster_->Disconnect("w1");
  EXPECT_TRUE(cluster_->TakeAbort("w0"));
  EXPECT_TRUE(cluster_->decode.pending.empty()) << "w0 still sends";
  cluster_->Fail("w0", absl::CancelledError("aborted"));
  ASSERT_EQ(cluster_->decode.pending.size(), 1u);
  EXPECT_EQ(cluster_->decode.pending[0].open.epoch(), 2u);
  EXPECT_EQ(cluster_->decode.pending[0].open.session_id(), cluster_->decode.opened[0].session_id());
  EXPECT_TRUE(cluster_->decode.pending[0].open.epoch_tokens());
  EXPECT_EQ(cluster_->decode.pending[0].open.session_token(), cluster_->decode.opened[0].session_token());
  CompleteOn({"w0"});

  ASSERT_TRUE(watcher_->result().ok()) << watcher_->result();
  EXPECT_EQ(watcher_->completed().epoch(), 2u);
  EXPECT_EQ(watcher_->completed().retries(), 1u);
  EXPECT_EQ(watcher_->completed().plan().world_size(), 1u);
  const auto& progress = watcher_->events[watcher_->events.size() - 2].progress();
  EXPECT_EQ(progress.epoch(), 2u);
  EXPECT_EQ(progress.plan().world_size(), 1u) << "the client hears of the new plan";
}

TEST_F(SchedulerFaultsTest, ThreeMissedHeartbeatsLoseAWorker) {
  StartPair();
  cluster_->worker("w1").muted = true;

  cluster_->Advance(absl::Seconds(3.5));
  EXPECT_FALSE(cluster_->HasMessage("w0"));
  cluster_->Advance(absl::Seconds(0.5));

  EXPECT_TRUE(cluster_->TakeAbort("w0"));
  EXPECT_TRUE(cluster_->worker("w1").link->closed);
  EXPECT_EQ(ReasonOf(cluster_->worker("w1").link->close_status), v1::ERROR_REASON_WORKER_LOST);
}

TEST_F(SchedulerFaultsTest, AStandstillOfTheCoordinatorItselfLosesNoWorker) {
  StartPair();
  cluster_->Advance(absl::Seconds(1));

  cluster_->clock.Advance(absl::Minutes(1));
  cluster_->scheduler.Tick();

  EXPECT_FALSE(cluster_->worker("w0").link->closed);
  EXPECT_FALSE(cluster_->worker("w1").link->closed);
}

TEST_F(SchedulerFaultsTest, APeerReportsTheBrokenCollectiveBeforeTheLossIsSeen) {
  StartPair();

  cluster_->Fail("w0", WorkerLost());
  EXPECT_TRUE(cluster_->TakeAbort("w1"));
  EXPECT_TRUE(cluster_->decode.pending.empty()) << "w1 may still send";
  cluster_->Disconnect("w1");
  CompleteOn({"w0"});

  EXPECT_TRUE(watcher_->result().ok()) << watcher_->result();
}

TEST_F(SchedulerFaultsTest, ARankThatDoesNotAnswerAnAbortIsDisconnected) {
  StartPair();
  cluster_->Fail("w0", WorkerLost());

  cluster_->Advance(absl::Seconds(9.5));
  EXPECT_FALSE(cluster_->worker("w1").link->closed);
  cluster_->Advance(absl::Seconds(1));

  EXPECT_TRUE(cluster_->worker("w1").link->closed);
  CompleteOn({"w0"});
  EXPECT_EQ(watcher_->completed().plan().worker_ids(0), "w0");
}

TEST_F(SchedulerFaultsTest, AWorkerThatShutsDownGetsNothingNew) {
  StartPair();

  cluster_->Fail("w1", Error(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING));
  cluster_->Fail("w0", absl::CancelledError("aborted"));
  EXPECT_TRUE(cluster_->TakeAbort("w0"));
  CompleteOn({"w0"});

  EXPECT_EQ(watcher_->completed().plan().world_size(), 1u);
}

TEST_F(SchedulerFaultsTest, AllWorkersLostWaitsForANewOne) {
  StartPair();
  cluster_->Disconnect("w0");
  cluster_->Disconnect("w1");
  cluster_->Advance(absl::Seconds(29));
  EXPECT_FALSE(watcher_->ended());

  cluster_->AddWorker("w2");
  CompleteOn({"w2"});

  ASSERT_TRUE(watcher_->result().ok()) << watcher_->result();
  EXPECT_EQ(watcher_->completed().epoch(), 2u);
}

TEST_F(SchedulerFaultsTest, AllWorkersLostForTooLongFailsAndFreesTheSession) {
  StartPair();
  cluster_->Disconnect("w0");
  cluster_->Disconnect("w1");

  cluster_->Advance(absl::Seconds(31));
  EXPECT_FALSE(watcher_->ended()) << "the session is freed first";
  cluster_->decode.AnswerAll();

  EXPECT_EQ(watcher_->result().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_NO_WORKERS);
  EXPECT_TRUE(cluster_->decode.open_sessions.empty());
}

TEST_F(SchedulerFaultsTest, AWorkerThatNeverComesIsAnErrorInTime) {
  cluster_ = std::make_unique<FakeCluster>();
  cluster_->AddDecodeNode();
  watcher_ = cluster_->Submit(MakeRequest("r", 10));
  EXPECT_TRUE(watcher_->events.empty()) << "nothing to judge it by yet";

  cluster_->Advance(absl::Seconds(29.5));
  EXPECT_FALSE(watcher_->ended());
  cluster_->Advance(absl::Seconds(0.5));

  EXPECT_EQ(watcher_->result().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_NO_WORKERS);
  EXPECT_TRUE(watcher_->events.empty()) << "a rejection, not an event";
}

TEST_F(SchedulerFaultsTest, AWorkerThatComesInTimeIsWaitedFor) {
  cluster_ = std::make_unique<FakeCluster>();
  cluster_->AddDecodeNode();
  v1::PrefillRequest request = MakeRequest("r", 10);
  request.set_world_size(2);
  watcher_ = cluster_->Submit(request);
  cluster_->AddWorker("w0");
  EXPECT_TRUE(watcher_->events.empty()) << "two are wanted";
  cluster_->AddWorker("w1");
  EXPECT_TRUE(watcher_->accepted());
  CompleteOn({"w0", "w1"});
  EXPECT_TRUE(watcher_->result().ok()) << watcher_->result();
}

TEST_F(SchedulerFaultsTest, GivesUpAfterTheLastEpoch) {
  CoordinatorOptions options;
  options.max_epochs = 3;
  StartPair(options);

  for (int epoch = 1; epoch <= 3; ++epoch) {
    ASSERT_FALSE(watcher_->ended());
    cluster_->Fail("w0", WorkerLost());
    EXPECT_TRUE(cluster_->TakeAbort("w1"));
    cluster_->Fail("w1", absl::CancelledError("aborted"));
    cluster_->decode.AnswerAll();
    if (epoch == 3) break;
    cluster_->TakeAssignment("w0");
    cluster_->TakeAssignment("w1");
  }

  EXPECT_EQ(watcher_->result().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_WORKER_LOST);
  EXPECT_EQ(cluster_->decode.opened.size(), 3u);
  EXPECT_TRUE(cluster_->decode.open_sessions.empty());
}

// With the text where it names what the caller sent, and else with one of a closed list.
TEST_F(SchedulerFaultsTest, OtherFailuresReachTheClient) {
  struct Row {
    absl::StatusCode code;
    v1::ErrorReason reason;
  };
  for (const Row& row : {Row{absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_POLICY_PARAMETER},
                         Row{absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE},
                         Row{absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL},
                         Row{absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT}}) {
    SCOPED_TRACE(ReasonName(row.reason));
    StartPair();
    cluster_->Fail("w1", MakeError(row.code, row.reason, "what the worker said", {{"value", "-5"}}));
    EXPECT_TRUE(cluster_->TakeAbort("w0"));
    cluster_->Fail("w0", absl::CancelledError("aborted"));
    EXPECT_FALSE(watcher_->ended());
    cluster_->decode.AnswerAll();

    const absl::Status said = MakeError(row.code, row.reason, "what the worker said", {{"value", "-5"}});
    EXPECT_EQ(watcher_->result(), WithClosedText(said));
    EXPECT_EQ(watcher_->result() == said, row.reason == v1::ERROR_REASON_BAD_POLICY_PARAMETER ||
                                              row.reason == v1::ERROR_REASON_KV_MEMORY_FULL);
    EXPECT_TRUE(cluster_->decode.open_sessions.empty());
    EXPECT_EQ(cluster_->decode.opened.size(), 1u) << "no second epoch";
  }
}

TEST_F(SchedulerFaultsTest, APermanentFailureWinsOverItsEchoFromTheCollective) {
  StartPair();
  cluster_->Fail("w0", WorkerLost());
  cluster_->Fail("w1", Error(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE));
  cluster_->decode.AnswerAll();

  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_NON_FINITE) << watcher_->result();
}

TEST_F(SchedulerFaultsTest, AWorkerLostWhileTheSessionOpensCostsAnEpoch) {
  cluster_ = std::make_unique<FakeCluster>();
  cluster_->AddDecodeNode();
  cluster_->AddWorker("w0");
  cluster_->AddWorker("w1");
  watcher_ = cluster_->Submit(MakeRequest("r", 4000));
  cluster_->Disconnect("w1");
  EXPECT_FALSE(cluster_->HasMessage("w0")) << "it was never assigned, so there is nothing to abort";
  CompleteOn({"w0"});
  EXPECT_TRUE(watcher_->result().ok()) << watcher_->result();
}

TEST_F(SchedulerFaultsTest, ANewIncarnationTakesTheOldOnesPlace) {
  StartPair();
  const auto old_link = cluster_->worker("w1").link;
  const uint64_t old_connection = cluster_->worker("w1").connection;
  const auto old_assignment = cluster_->worker("w1").assignment;

  cluster_->AddWorker(MakeWorker("w1", "i2"));
  EXPECT_TRUE(old_link->closed);
  EXPECT_EQ(old_link->close_status.code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(cluster_->TakeAbort("w0"));
  cluster_->Fail("w0", absl::CancelledError("aborted"));
  cluster_->scheduler.OnWorkerClosed(old_connection);
  v1::ConnectRequest zombie;
  *zombie.mutable_failed()->mutable_error() = ToRpcStatus(absl::InternalError("zombie"));
  zombie.mutable_failed()->set_request_id("r");
  zombie.mutable_failed()->set_epoch(1);
  zombie.mutable_failed()->set_rank(1);
  cluster_->scheduler.OnWorkerMessage(old_connection, zombie);
  CompleteOn({"w0", "w1"});

  EXPECT_TRUE(watcher_->result().ok()) << watcher_->result();
  EXPECT_EQ(watcher_->completed().epoch(), 2u);
}

TEST_F(SchedulerFaultsTest, ReportsOfAnOlderEpochOrOfAnotherRankMeanNothing) {
  StartPair();
  auto stale = cluster_->CompletionOf("w0");
  cluster_->Fail("w0", WorkerLost());
  cluster_->TakeAbort("w1");
  cluster_->Fail("w1", absl::CancelledError("aborted"));
  cluster_->decode.AnswerAll();
  cluster_->TakeAssignment("w0");
  cluster_->TakeAssignment("w1");

  cluster_->Complete("w0", stale);
  stale.set_epoch(2);
  stale.set_rank(1);
  cluster_->Complete("w0", stale);
  stale.set_rank(7);
  cluster_->Complete("w0", stale);
  stale.set_rank(0);
  stale.set_request_id("other");
  cluster_->Complete("w0", stale);
  cluster_->Complete("w1");
  EXPECT_TRUE(cluster_->decode.pending.empty()) << "w0 has not completed";
  cluster_->Complete("w0");
  EXPECT_EQ(cluster_->decode.pending.size(), 1u);
}

TEST_F(SchedulerFaultsTest, CompletionsThatCannotBeTrueFailTheRequest) {
  const std::vector<void (*)(v1::RankCompleted*)> lies = {
      [](v1::RankCompleted* c) { c->set_kv_digest_share("short"); },
      [](v1::RankCompleted* c) { c->set_first_token(256); },
      [](v1::RankCompleted* c) { c->add_top_logprobs(); },
      [](v1::RankCompleted* c) { c->clear_first_token(); },
  };
  for (const auto lie : lies) {
    StartPair();
    auto report = cluster_->CompletionOf("w0");
    lie(&report);
    cluster_->Complete("w1");
    cluster_->Complete("w0", report);
    cluster_->decode.AnswerAll();
    EXPECT_EQ(watcher_->result().code(), absl::StatusCode::kInternal) << watcher_->result();
    EXPECT_TRUE(cluster_->decode.committed.empty());
  }
}

TEST_F(SchedulerFaultsTest, AFullOutboxIsALostWorker) {
  cluster_ = std::make_unique<FakeCluster>();
  cluster_->AddDecodeNode();
  cluster_->AddWorker("w0");
  cluster_->AddWorker("w1");
  cluster_->worker("w0").link->full = true;
  watcher_ = cluster_->Submit(MakeRequest("r", 4000));
  cluster_->decode.AnswerAll();
  EXPECT_TRUE(cluster_->worker("w0").link->closed);
  cluster_->TakeAssignment("w1");
  EXPECT_TRUE(cluster_->TakeAbort("w1"));
  cluster_->Fail("w1", absl::CancelledError("aborted"));
  CompleteOn({"w1"});
  EXPECT_TRUE(watcher_->result().ok()) << watcher_->result();
}

TEST_F(SchedulerFaultsTest, TheDeadlineEndsRunningAndQueuedRequests) {
  cluster_ = std::make_unique<FakeCluster>();
  cluster_->AddDecodeNode();
  cluster_->AddWorker("w0");
  v1::PrefillRequest request = MakeRequest("r", 10);
  request.mutable_deadline()->set_seconds(5);
  watcher_ = cluster_->Submit(request);
  request.set_request_id("queued");
  const auto queued = cluster_->Submit(request);
  cluster_->decode.AnswerAll();
  EXPECT_EQ(cluster_->TakeAssignment("w0").deadline_ms(), 5000u);

  cluster_->Advance(absl::Seconds(5));
  EXPECT_EQ(ReasonOf(queued->result()), v1::ERROR_REASON_DEADLINE) << queued->result();
  EXPECT_TRUE(cluster_->TakeAbort("w0"));
  cluster_->Fail("w0", absl::CancelledError("aborted"));
  cluster_->decode.AnswerAll();

  EXPECT_EQ(watcher_->result().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ReasonOf(watcher_->result()), v1::ERROR_REASON_DEADLINE);
}

TEST_F(SchedulerFaultsTest, TheQueueWaitIsBounded) {
  CoordinatorOptions options;
  options.max_queue_wait = absl::Seconds(20);
  StartPair(options);
  const auto queued = cluster_->Submit(MakeRequest("queued", 10));
  cluster_->Advance(absl::Seconds(19.5));
  EXPECT_FALSE(queued->ended());
  cluster_->Advance(absl::Seconds(0.5));
  EXPECT_EQ(queued->result().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(queued->result()), v1::ERROR_REASON_QUEUE_TIMEOUT);
}

}  // namespace
}  // namespace headwater::testing
