// Clients that cancel, leave, repeat themselves and come while the coordinator goes.
#include <optional>

#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

class SchedulerClientsTest : public ::testing::Test {
 protected:
  explicit SchedulerClientsTest() {
    cluster_.AddDecodeNode();
    cluster_.AddWorker("w0");
  }

  std::shared_ptr<RecordingWatcher> Run(const std::string& id) {
    const auto watcher = cluster_.Submit(MakeRequest(id, 10));
    cluster_.decode.AnswerAll();
    cluster_.TakeAssignment("w0");
    return watcher;
  }

  void FinishRunning() {
    cluster_.Complete("w0");
    cluster_.decode.AnswerAll();
  }

  void Cancel(const std::string& id) {
    cluster_.scheduler.Cancel(JobKey{"", id},
                              [this](const absl::StatusOr<bool>& result) { cancelled_ = result; });
  }

  FakeCluster cluster_;
  std::optional<absl::StatusOr<bool>> cancelled_;
};

TEST_F(SchedulerClientsTest, CancellingARunningRequestAnswersWhenAllIsReclaimed) {
  const auto watcher = Run("r");
  const auto other = cluster_.Submit(MakeRequest("other", 10));

  Cancel("r");
  EXPECT_TRUE(cluster_.TakeAbort("w0"));
  EXPECT_FALSE(cancelled_.has_value()) << "compute still runs";
  cluster_.Fail("w0", absl::CancelledError("aborted"));
  EXPECT_FALSE(cancelled_.has_value()) << "the session is still there";
  cluster_.decode.Answer(absl::OkStatus());

  ASSERT_TRUE(cancelled_.has_value());
  EXPECT_TRUE(**cancelled_);
  EXPECT_EQ(watcher->result().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ReasonOf(watcher->result()), v1::ERROR_REASON_CANCELLED);
  cluster_.decode.AnswerAll();
  EXPECT_EQ(cluster_.TakeAssignment("w0").request_id(), "other");
  FinishRunning();
  EXPECT_TRUE(other->result().ok()) << "nothing else is disturbed";
  EXPECT_TRUE(cluster_.decode.open_sessions.empty());
}

TEST_F(SchedulerClientsTest, CancellingAQueuedRequestRemovesItAtOnce) {
  Run("running");
  const auto watcher = cluster_.Submit(MakeRequest("queued", 10));

  Cancel("queued");

  ASSERT_TRUE(cancelled_.has_value());
  EXPECT_TRUE(**cancelled_);
  EXPECT_EQ(watcher->result().code(), absl::StatusCode::kCancelled);
  EXPECT_FALSE(cluster_.HasMessage("w0"));
}

TEST_F(SchedulerClientsTest, CancellingWhileTheSessionOpensFreesIt) {
  const auto watcher = cluster_.Submit(MakeRequest("r", 10));

  Cancel("r");
  EXPECT_FALSE(cancelled_.has_value());
  cluster_.decode.AnswerAll();

  EXPECT_TRUE(cancelled_.has_value());
  EXPECT_FALSE(cluster_.HasMessage("w0"));
  EXPECT_TRUE(cluster_.decode.open_sessions.empty());
  EXPECT_EQ(watcher->result().code(), absl::StatusCode::kCancelled);
}

TEST_F(SchedulerClientsTest, CancellingTooLateIsToldSo) {
  const auto watcher = Run("r");
  cluster_.Complete("w0");
  Cancel("r");
  EXPECT_FALSE(cancelled_.has_value());
  cluster_.decode.Answer(absl::OkStatus());

  ASSERT_TRUE(cancelled_.has_value());
  EXPECT_FALSE(**cancelled_) << "it was committed";
  EXPECT_TRUE(watcher->result().ok());
  cancelled_.reset();
  Cancel("r");
  EXPECT_FALSE(**cancelled_);
}

TEST_F(SchedulerClientsTest, CancellingWhileTheCommitFailsStopsTheRetries) {
  const auto watcher = Run("r");
  cluster_.Complete("w0");
  Cancel("r");
  cluster_.decode.Answer(absl::UnavailableError("away"));
  cluster_.decode.AnswerAll();
  EXPECT_TRUE(**cancelled_);
  EXPECT_EQ(watcher->result().code(), absl::StatusCode::kCancelled);
}

TEST_F(SchedulerClientsTest, CancellingAnUnknownRequestIsNotFound) {
  Cancel("nobody");
  ASSERT_TRUE(cancelled_.has_value());
  EXPECT_EQ(cancelled_->status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(cancelled_->status()), v1::ERROR_REASON_UNKNOWN_REQUEST);
}

TEST_F(SchedulerClientsTest, TheLastWatcherLeavingCancels) {
  const auto first = Run("r");
  const auto second = cluster_.Submit(MakeRequest("r", 10));
  EXPECT_TRUE(second->accepted()) << "attached";
  EXPECT_EQ(cluster_.scheduler.num_jobs(), 1u);

  cluster_.Detach("r", first);
  EXPECT_FALSE(cluster_.HasMessage("w0")) << "another call watches";
  cluster_.Detach("r", second);
  EXPECT_TRUE(cluster_.TakeAbort("w0"));
  cluster_.Fail("w0", absl::CancelledError("aborted"));
  cluster_.decode.AnswerAll();

  EXPECT_EQ(cluster_.scheduler.num_jobs(), 0u);
  EXPECT_FALSE(first->ended()) << "nobody listens any more";
}

TEST_F(SchedulerClientsTest, AClientThatComesBackWhileItsRequestIsCancelledStartsAnew) {
  const auto first = Run("r");
  cluster_.Detach("r", first);
  EXPECT_TRUE(cluster_.TakeAbort("w0"));
  const auto second = cluster_.Submit(MakeRequest("r", 10));
  EXPECT_TRUE(second->events.empty());
  cluster_.Fail("w0", absl::CancelledError("aborted"));
  cluster_.decode.AnswerAll();

  EXPECT_TRUE(second->accepted());
  cluster_.TakeAssignment("w0");
  FinishRunning();
  EXPECT_TRUE(second->result().ok()) << second->result();
}

TEST_F(SchedulerClientsTest, TheSameIdAndContentReplaysTheTerminalEvent) {
  const auto first = Run("r");
  FinishRunning();

  const auto again = cluster_.Submit(MakeRequest("r", 10));

  ASSERT_EQ(again->events.size(), 1u);
  EXPECT_EQ(again->events[0].SerializeAsString(), first->events.back().SerializeAsString());
  EXPECT_EQ(cluster_.decode.opened.size(), 1u) << "one execution";
}

TEST_F(SchedulerClientsTest, OtherContentUnderAnIdIsAConflict) {
  Run("r");
  const auto running = cluster_.Submit(MakeRequest("r", 11));
  FinishRunning();
  const auto ended = cluster_.Submit(MakeRequest("r", 12));
  v1::PrefillRequest request = MakeRequest("r", 12);
  request.set_tenant("other");
  const auto elsewhere = cluster_.Submit(request);

  for (const auto& conflict : {running, ended}) {
    EXPECT_EQ(conflict->result().code(), absl::StatusCode::kAlreadyExists);
    EXPECT_EQ(ReasonOf(conflict->result()), v1::ERROR_REASON_REQUEST_ID_CONFLICT);
  }
  EXPECT_TRUE(elsewhere->accepted()) << "ids are names within a tenant";
}

TEST_F(SchedulerClientsTest, FailuresThatAnotherTryMayNotHaveAreNotReplayed) {
  const auto permanent = Run("permanent");
  cluster_.Fail("w0", MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE, "nan"));
  cluster_.decode.AnswerAll();
  Run("transient");
  cluster_.Fail("w0", MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_KV_STREAM_STALLED, "away"));
  cluster_.decode.AnswerAll();

  EXPECT_EQ(cluster_.Submit(MakeRequest("permanent", 10))->result(), permanent->result());
  const auto again = cluster_.Submit(MakeRequest("transient", 10));
  EXPECT_TRUE(again->accepted());
  EXPECT_FALSE(again->ended());
}

TEST_F(SchedulerClientsTest, EndedIdsAreForgottenAfterTheRetention) {
  Run("r");
  FinishRunning();
  cluster_.Advance(absl::Minutes(10));
  EXPECT_TRUE(cluster_.Submit(MakeRequest("r", 10))->ended()) << "replayed at the limit";
  cluster_.Advance(absl::Seconds(1));
  EXPECT_TRUE(cluster_.Submit(MakeRequest("r", 11))->accepted()) << "the id is free";
}

TEST_F(SchedulerClientsTest, DrainingRefusesNewAndFinishesAccepted) {
  const auto running = Run("running");
  const auto queued = cluster_.Submit(MakeRequest("queued", 10));
  v1::PrefillRequest pair = MakeRequest("pair", 10);
  pair.set_world_size(2);
  const auto waiting = cluster_.Submit(pair);

  cluster_.scheduler.BeginDrain();
  const auto late = cluster_.Submit(MakeRequest("late", 10));
  FinishRunning();
  cluster_.TakeAssignment("w0");
  FinishRunning();

  for (const auto& refused : {waiting, late}) {
    EXPECT_EQ(refused->result().code(), absl::StatusCode::kUnavailable) << refused->result();
    EXPECT_EQ(ReasonOf(refused->result()), v1::ERROR_REASON_DRAINING);
  }
  EXPECT_TRUE(running->result().ok());
  EXPECT_TRUE(queued->result().ok());
  EXPECT_TRUE(cluster_.Submit(MakeRequest("running", 10))->result().ok()) << "replays go on";
}

TEST_F(SchedulerClientsTest, CuttingEndsAllInOrderAndEndAllAtOnce) {
  const auto first = Run("first");
  const auto queued = cluster_.Submit(MakeRequest("queued", 10));
  const absl::Status cut = MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING, "cut");

  cluster_.scheduler.CancelAll(cut);
  EXPECT_EQ(queued->result(), cut);
  EXPECT_FALSE(first->ended()) << "its rank has not stopped";
  cluster_.scheduler.EndAll(cut);

  EXPECT_EQ(first->result(), cut);
  EXPECT_TRUE(cluster_.worker("w0").link->closed);
  EXPECT_EQ(cluster_.scheduler.num_jobs(), 0u);
}

}  // namespace
}  // namespace headwater::testing
