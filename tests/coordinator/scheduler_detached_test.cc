// Requests that go on although no call watches them.
#include <memory>
#include <string>

#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

class SchedulerDetachedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    cluster_.AddDecodeNode();
    cluster_.AddWorker("w0");
  }
  std::shared_ptr<RecordingWatcher> Submit(const v1::PrefillRequest& request, bool detached = true) {
    absl::StatusOr<PreparedRequest> prepared = PrepareRequest(request, cluster_.scheduler.options());
    EXPECT_TRUE(prepared.ok()) << prepared.status();
    prepared->detached = detached;
    auto watcher = std::make_shared<RecordingWatcher>();
    cluster_.scheduler.Submit(*prepared, watcher);
    return watcher;
  }
  std::shared_ptr<RecordingWatcher> Watch(const std::string& id, const std::string& tenant = "") {
    auto watcher = std::make_shared<RecordingWatcher>();
    cluster_.scheduler.Watch({tenant, id}, watcher);
    return watcher;
  }
  void Finish() {
    cluster_.decode.AnswerAll();
    cluster_.TakeAssignment("w0");
    cluster_.Complete("w0");
    cluster_.decode.AnswerAll();
  }

  FakeCluster cluster_;
};

TEST_F(SchedulerDetachedTest, GoesOnWhenItsCallEnds) {
  const auto submitted = Submit(MakeRequest("r", 100));
  EXPECT_TRUE(submitted->accepted());
  cluster_.Detach("r", submitted);
  EXPECT_EQ(cluster_.scheduler.num_jobs(), 1u);
  Finish();
  EXPECT_EQ(cluster_.scheduler.num_jobs(), 0u);
  EXPECT_FALSE(submitted->ended()) << "it had left";
  const auto watcher = Watch("r");
  EXPECT_TRUE(watcher->result().ok()) << watcher->result();
  EXPECT_EQ(watcher->events.size(), 1u) << "the end alone";
}

TEST_F(SchedulerDetachedTest, WatchersComeAndGo) {
  cluster_.Detach("r", Submit(MakeRequest("r", 100)));
  const auto first = Watch("r"), second = Watch("r");
  EXPECT_TRUE(first->accepted());
  cluster_.Detach("r", first);
  EXPECT_EQ(cluster_.scheduler.num_jobs(), 1u);
  Finish();
  EXPECT_FALSE(first->ended());
  EXPECT_TRUE(second->result().ok());
}

TEST_F(SchedulerDetachedTest, AWatcherDoesNotKeepWhatWasNotDetached) {
  const auto caller = Submit(MakeRequest("r", 100), false);
  const auto watcher = Watch("r");
  cluster_.Detach("r", caller);
  EXPECT_EQ(cluster_.scheduler.num_jobs(), 1u) << "somebody watches";
  cluster_.Detach("r", watcher);
  cluster_.decode.AnswerAll();
  cluster_.decode.AnswerAll();
  EXPECT_EQ(cluster_.scheduler.num_jobs(), 0u);
}

TEST_F(SchedulerDetachedTest, SubmittingARunningRequestDetachesIt) {
  const auto caller = Submit(MakeRequest("r", 100), false);
  const auto submitted = Submit(MakeRequest("r", 100));
  EXPECT_TRUE(submitted->accepted());
  cluster_.Detach("r", submitted);
  cluster_.Detach("r", caller);
  EXPECT_EQ(cluster_.scheduler.num_jobs(), 1u);
  Finish();
  EXPECT_TRUE(Watch("r")->result().ok());
}

TEST_F(SchedulerDetachedTest, OneThatFollowsAnAbandonedRequestIsStarted) {
  const auto caller = Submit(MakeRequest("r", 100), false);
  cluster_.decode.AnswerAll();
  cluster_.TakeAssignment("w0");
  cluster_.Detach("r", caller);
  EXPECT_TRUE(cluster_.TakeAbort("w0"));
  const auto submitted = Submit(MakeRequest("r", 100));
  cluster_.Detach("r", submitted);
  cluster_.Fail("w0", absl::CancelledError("aborted"));
  cluster_.decode.AnswerAll();  // frees the first's session
  cluster_.decode.AnswerAll();
  EXPECT_EQ(cluster_.TakeAssignment("w0").request_id(), "r");
  cluster_.Complete("w0");
  cluster_.decode.AnswerAll();
  EXPECT_TRUE(Watch("r")->result().ok());
}

TEST_F(SchedulerDetachedTest, CancelAndDeadlineEndIt) {
  v1::PrefillRequest request = MakeRequest("late", 100);
  request.mutable_deadline()->set_seconds(5);
  cluster_.Detach("late", Submit(request));
  cluster_.decode.AnswerAll();
  cluster_.TakeAssignment("w0");
  cluster_.Advance(absl::Seconds(6));
  EXPECT_TRUE(cluster_.TakeAbort("w0"));
  cluster_.Fail("w0", absl::CancelledError("aborted"));
  cluster_.decode.AnswerAll();
  EXPECT_EQ(Watch("late")->result().code(), absl::StatusCode::kDeadlineExceeded);

  cluster_.Detach("c", Submit(MakeRequest("c", 100)));
  cluster_.decode.AnswerAll();
  cluster_.TakeAssignment("w0");
  bool cancelled = false;
  cluster_.scheduler.Cancel({"", "c"}, [&](absl::StatusOr<bool> done) { cancelled = *done; });
  EXPECT_TRUE(cluster_.TakeAbort("w0"));
  cluster_.Fail("w0", absl::CancelledError("aborted"));
  cluster_.decode.AnswerAll();
  EXPECT_TRUE(cancelled);
  EXPECT_EQ(Watch("c")->result().code(), absl::StatusCode::kCancelled);
}

TEST_F(SchedulerDetachedTest, GetTellsTheLastEvent) {
  cluster_.Detach("r", Submit(MakeRequest("r", 100)));
  EXPECT_TRUE(cluster_.scheduler.Get({"", "r"})->has_accepted());
  cluster_.decode.AnswerAll();
  cluster_.TakeAssignment("w0");
  cluster_.Progress("w0", 1);
  const auto running = cluster_.scheduler.Get({"", "r"});
  ASSERT_TRUE(running.ok()) << running.status();
  EXPECT_EQ(running->progress().layers_done(), 1u);
  cluster_.Complete("w0");
  cluster_.decode.AnswerAll();
  EXPECT_EQ(cluster_.scheduler.Get({"", "r"})->completed().num_tokens(), 100u);
}

TEST_F(SchedulerDetachedTest, WhatIsNotKnownIsNotFound) {
  cluster_.Detach("r", Submit(MakeRequest("r", 100)));
  for (const JobKey& key : {JobKey{"", "other"}, JobKey{"another tenant", "r"}}) {
    const auto watcher = Watch(key.request_id, key.tenant);
    EXPECT_EQ(watcher->result().code(), absl::StatusCode::kNotFound);
    EXPECT_EQ(ReasonOf(watcher->result()), v1::ERROR_REASON_UNKNOWN_REQUEST);
    EXPECT_EQ(ReasonOf(cluster_.scheduler.Get(key).status()), v1::ERROR_REASON_UNKNOWN_REQUEST);
  }
  Finish();
  cluster_.Advance(cluster_.scheduler.options().retention + absl::Seconds(1));
  EXPECT_EQ(ReasonOf(Watch("r")->result()), v1::ERROR_REASON_UNKNOWN_REQUEST) << "forgotten";
}

TEST_F(SchedulerDetachedTest, OneThatWaitsForItsModelHasNoEventYet) {
  cluster_.Disconnect("w0");
  const auto submitted = Submit(MakeRequest("r", 100));
  EXPECT_FALSE(submitted->accepted());
  const auto last = cluster_.scheduler.Get({"", "r"});
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ(last->event_case(), v1::PrefillResponse::EVENT_NOT_SET);
  const auto watcher = Watch("r");
  cluster_.Detach("r", submitted);
  cluster_.AddWorker(MakeWorker("w0", "i2"));
  EXPECT_TRUE(watcher->accepted());
  Finish();
  EXPECT_TRUE(watcher->result().ok());
}

}  // namespace
}  // namespace headwater::testing
