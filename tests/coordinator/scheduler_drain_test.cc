// Workers that are asked to leave, or say that they do.
#include <memory>
#include <string>

#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

constexpr int kShort = 100;    // tokens: one worker
constexpr int kShared = 4000;  // both workers

class SchedulerDrainTest : public ::testing::Test {
 protected:
  SchedulerDrainTest() {
    cluster_.AddDecodeNode();
    cluster_.AddWorker("w0");
    cluster_.AddWorker("w1");
  }

  bool TakeDrain(const std::string& id) {
    const auto message = cluster_.worker(id).link->Next();
    return message != nullptr && message->has_drain();
  }
  void SayDraining(const std::string& id) {
    v1::ConnectRequest message;
    message.mutable_heartbeat()->set_draining(true);
    cluster_.scheduler.OnWorkerMessage(cluster_.worker(id).connection, message);
  }
  std::shared_ptr<RecordingWatcher> Start(const std::string& request_id, int num_tokens) {
    const auto watcher = cluster_.Submit(MakeRequest(request_id, num_tokens));
    cluster_.decode.AnswerAll();
    return watcher;
  }
  double Draining() { return cluster_.coordinator_metrics.draining_workers.Value(); }

  FakeCluster cluster_;
};

TEST_F(SchedulerDrainTest, ADrainedWorkerIsToldOnceAndGetsNothingNew) {
  const auto drained = cluster_.scheduler.DrainWorker("w0");
  ASSERT_TRUE(drained.ok()) << drained.status();
  EXPECT_EQ(drained->worker_id(), "w0");
  EXPECT_EQ(drained->incarnation(), "i1");
  EXPECT_TRUE(drained->draining());
  EXPECT_TRUE(TakeDrain("w0"));
  EXPECT_EQ(Draining(), 1);
  EXPECT_TRUE(cluster_.scheduler.DrainWorker("w0").ok());
  EXPECT_FALSE(cluster_.HasMessage("w0")) << "it knows";

  for (const char* id : {"a", "b"}) {
    const auto watcher = Start(id, kShort);
    EXPECT_FALSE(cluster_.HasMessage("w0"));
    cluster_.TakeAssignment("w1");
    cluster_.Complete("w1");
    cluster_.decode.AnswerAll();
    EXPECT_TRUE(watcher->result().ok()) << watcher->result();
  }
}

TEST_F(SchedulerDrainTest, WhatItComputesEndsThere) {
  const auto watcher = Start("r", kShared);
  cluster_.TakeAssignment("w0");
  cluster_.TakeAssignment("w1");

  const auto drained = cluster_.scheduler.DrainWorker("w1");
  ASSERT_TRUE(drained.ok());
  EXPECT_EQ(drained->num_requests(), 1u);
  EXPECT_GT(drained->num_tokens(), 0u);
  EXPECT_TRUE(TakeDrain("w1"));
  EXPECT_FALSE(cluster_.HasMessage("w0")) << "no abort";
  cluster_.Complete("w0");
  cluster_.Complete("w1");
  cluster_.decode.AnswerAll();

  ASSERT_TRUE(watcher->result().ok()) << watcher->result();
  EXPECT_EQ(watcher->completed().epoch(), 1u);
  cluster_.Disconnect("w1");
  EXPECT_EQ(Draining(), 0);
}

TEST_F(SchedulerDrainTest, AnAssignmentThatCrossesTheOrderGoesToAnother) {
  const auto watcher = cluster_.Submit(MakeRequest("r", kShort));
  ASSERT_EQ(cluster_.decode.pending.size(), 1u) << "the session opens";
  std::string chosen;
  const v1::ListWorkersResponse workers = cluster_.scheduler.ListWorkers();
  for (const auto& worker : workers.workers()) {
    if (worker.num_requests() > 0) chosen = worker.worker_id();
  }
  ASSERT_FALSE(chosen.empty());
  const std::string other = chosen == "w0" ? "w1" : "w0";
  ASSERT_TRUE(cluster_.scheduler.DrainWorker(chosen).ok());
  cluster_.decode.AnswerAll();
  EXPECT_TRUE(TakeDrain(chosen));
  cluster_.TakeAssignment(chosen);
  cluster_.Fail(chosen, MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING, "draining"));
  cluster_.decode.AnswerAll();

  cluster_.TakeAssignment(other);
  cluster_.Complete(other);
  cluster_.decode.AnswerAll();
  EXPECT_TRUE(watcher->result().ok()) << watcher->result();
}

TEST_F(SchedulerDrainTest, AHeartbeatThatSaysSoIsEnough) {
  SayDraining("w0");
  SayDraining("w0");
  EXPECT_EQ(Draining(), 1);
  EXPECT_TRUE(cluster_.scheduler.ListWorkers().workers(0).draining());
  EXPECT_FALSE(cluster_.HasMessage("w0")) << "it knows";
  const auto watcher = Start("r", kShared);
  EXPECT_FALSE(cluster_.HasMessage("w0"));
  EXPECT_EQ(cluster_.TakeAssignment("w1").plan().world_size(), 1u);
}

TEST_F(SchedulerDrainTest, WithAllDrainingRequestsWaitForANewWorker) {
  SayDraining("w0");
  SayDraining("w1");
  const auto watcher = Start("r", kShort);
  EXPECT_FALSE(watcher->ended());
  EXPECT_FALSE(cluster_.HasMessage("w0") || cluster_.HasMessage("w1"));
  cluster_.Disconnect("w0");
  EXPECT_EQ(Draining(), 1);

  cluster_.AddWorker(MakeWorker("w0", "i2"));
  EXPECT_FALSE(cluster_.scheduler.ListWorkers().workers(0).draining()) << "a new process";
  cluster_.decode.AnswerAll();
  cluster_.TakeAssignment("w0");
  cluster_.Complete("w0");
  cluster_.decode.AnswerAll();
  EXPECT_TRUE(watcher->result().ok()) << watcher->result();
}

TEST_F(SchedulerDrainTest, UnknownWorkersAreNamed) {
  const auto drained = cluster_.scheduler.DrainWorker("w9\n");
  EXPECT_EQ(drained.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(drained.status()), v1::ERROR_REASON_UNKNOWN_WORKER);
  EXPECT_EQ(drained.status().message().find('\n'), std::string::npos);
}

}  // namespace
}  // namespace headwater::testing
