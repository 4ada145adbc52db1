// Plans by cost, and their explanation, as a client sees them.
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

#include "tests/coordinator/fakes.h"
#include "tests/coordinator/rates.h"

namespace headwater::testing {
namespace {

v1::WorkerRegistration MakeRated(const std::string& id) {
  v1::WorkerRegistration registration = MakeWorker(id);
  registration.mutable_model()->MergeFrom(MakeShape());
  *registration.mutable_rates() = MakeRates();
  return registration;
}

v1::PrefillRequest MakeExplained(const std::string& id, int num_tokens, const std::string& policy = "dense") {
  v1::PrefillRequest request = MakeRequest(id, num_tokens);
  request.mutable_policy()->set_name(policy);
  request.set_explain(true);
  return request;
}

TEST(SchedulerExplainTest, TheAcceptedEventSaysHowThePlanWasChosen) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  for (const char* id : {"w0", "w1"}) cluster.AddWorker(MakeRated(id));

  const auto watcher = cluster.Submit(MakeExplained("r", 60'000));

  ASSERT_TRUE(watcher->accepted());
  const v1::PrefillAccepted& accepted = watcher->events.front().accepted();
  EXPECT_EQ(accepted.plan().world_size(), 2u);
  EXPECT_EQ(accepted.explanation().density(), 1);
  ASSERT_EQ(accepted.explanation().candidates_size(), 1 + 3);
  EXPECT_GT(accepted.explanation().candidates(0).cost().total_s(), accepted.plan().cost().total_s());
  EXPECT_TRUE(accepted.explanation().candidates(1).chosen());
  EXPECT_GT(accepted.plan().cost().egress_s(), 0);
}

TEST(SchedulerExplainTest, WithoutTheWishThePlanComesAlone) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker(MakeRated("w0"));
  v1::PrefillRequest request = MakeExplained("r", 60'000);
  request.set_explain(false);

  const auto watcher = cluster.Submit(request);

  ASSERT_TRUE(watcher->accepted());
  EXPECT_TRUE(watcher->events.front().accepted().plan().has_cost());
  EXPECT_FALSE(watcher->events.front().accepted().has_explanation());
}

TEST(SchedulerExplainTest, APromptIsExpectedToReadWhatTheLastOneLikeItDid) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker(MakeRated("w0"));
  const auto density = [&](const std::string& id, const std::string& policy, bool own_parameters) {
    v1::PrefillRequest request = MakeExplained(id, 1000, policy);
    if (own_parameters) (*request.mutable_policy()->mutable_parameters())["window_tokens"] = 512;
    const auto watcher = cluster.Submit(request);
    EXPECT_TRUE(watcher->accepted());
    cluster.decode.AnswerAll();
    cluster.TakeAssignment("w0");
    cluster.Complete("w0");  // which says 50 of 100 pairs
    cluster.decode.AnswerAll();
    EXPECT_TRUE(watcher->result().ok()) << watcher->result();
    return watcher->events.front().accepted().explanation().density();
  };

  EXPECT_EQ(density("a", "a_shape", true), 1);
  EXPECT_EQ(density("b", "a_shape", false), 1) << "the one before had parameters of its own";
  EXPECT_EQ(density("c", "a_shape", false), 0.5);
  EXPECT_EQ(density("d", "a_shape", true), 1);
  EXPECT_EQ(density("e", "dense", false), 1);
}

TEST(SchedulerExplainTest, APlanThatChangesIsExplainedAnew) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  for (const char* id : {"w0", "w1"}) cluster.AddWorker(MakeRated(id));
  const auto watcher = cluster.Submit(MakeExplained("r", 60'000));
  cluster.decode.AnswerAll();
  for (const char* id : {"w0", "w1"}) cluster.TakeAssignment(id);

  cluster.Disconnect("w1");
  EXPECT_TRUE(cluster.TakeAbort("w0"));
  cluster.Fail("w0", absl::CancelledError("aborted"));
  cluster.decode.AnswerAll();
  ASSERT_EQ(cluster.TakeAssignment("w0").plan().world_size(), 1u);
  cluster.Progress("w0", 1);

  bool explained = false;
  for (const v1::PrefillResponse& event : watcher->events) {
    if (!event.progress().has_plan()) continue;
    explained = true;
    EXPECT_TRUE(absl::StrContains(event.progress().explanation().summary(), "1 worker"))
        << event.progress().explanation().summary();
  }
  EXPECT_TRUE(explained);
}

// Of a worker without rates the first plan knows nothing; of those that are left, one would be the fastest.
TEST(SchedulerExplainTest, WhatGoesOnFromACheckpointTakesAllThatHoldIt) {
  for (const bool checkpoint : {true, false}) {
    FakeCluster cluster;
    cluster.AddDecodeNode();
    for (const char* id : {"w0", "w1", "w2"}) {
      v1::WorkerRegistration registration = MakeRated(id);
      registration.mutable_rates()->set_group_start_s(60);
      if (registration.worker_id() == "w2") registration.clear_rates();
      cluster.AddWorker(registration);
    }
    cluster.Submit(MakeExplained("r", 60'000));
    cluster.decode.AnswerAll();
    for (const char* id : {"w0", "w1", "w2"}) {
      ASSERT_EQ(cluster.TakeAssignment(id).plan().world_size(), 3u);
      if (checkpoint) cluster.ReportCheckpoint(id, cluster.CheckpointOf(id, 2));
    }

    cluster.Disconnect("w2");
    for (const char* id : {"w0", "w1"}) {
      EXPECT_TRUE(cluster.TakeAbort(id));
      cluster.Fail(id, absl::CancelledError("aborted"));
    }
    cluster.decode.AnswerAll();

    const v1::PrefillAssignment next = cluster.TakeAssignment("w0");
    EXPECT_EQ(next.plan().world_size(), checkpoint ? 2u : 1u);
    EXPECT_EQ(next.has_resume(), checkpoint);
    EXPECT_EQ(next.plan().has_cost(), !checkpoint);
  }
}

}  // namespace
}  // namespace headwater::testing
