// Epochs that go on from checkpoints of the epoch before, and those that cannot.
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_join.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

using Ids = std::vector<std::string>;

absl::Status Error(absl::StatusCode code, v1::ErrorReason reason) { return MakeError(code, reason, "test"); }
absl::Status WorkerLost() { return Error(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST); }
absl::Status UnknownSession() { return Error(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION); }

// Zigzag and blocks of 256 tokens, as the fixture's request is planned.
std::string Point(uint32_t layer, uint32_t epoch, uint32_t world_size,
                  const std::vector<uint32_t>& providers) {
  v1::ResumePoint point;
  point.set_layer(layer);
  point.set_epoch(epoch);
  point.set_world_size(world_size);
  point.set_partition(v1::PARTITION_ZIGZAG);
  point.set_block_tokens(256);
  point.mutable_providers()->Assign(providers.begin(), providers.end());
  return point.DebugString();
}

// A request of 4000 tokens of a model of 4 layers runs on all workers named.
class SchedulerResumeTest : public ::testing::Test {
 protected:
  void Start(const Ids& ids, const v1::WorkerRegistration& like = MakeWorker(""),
             const v1::PrefillRequest& request = MakeRequest("r", 4000)) {
    cluster_ = std::make_unique<FakeCluster>();
    decode_connection_ = cluster_->AddDecodeNode();
    for (const std::string& id : ids) {
      v1::WorkerRegistration registration = like;
      registration.set_worker_id(id);
      cluster_->AddWorker(registration);
    }
    watcher_ = cluster_->Submit(request);
    Assign(ids);
  }

  void Assign(const Ids& ids) {
    cluster_->decode.AnswerAll();
    for (const std::string& id : ids) cluster_->TakeAssignment(id);
  }

  void ReportAll(const Ids& ids, uint32_t layer) {
    for (const std::string& id : ids) cluster_->ReportCheckpoint(id, cluster_->CheckpointOf(id, layer));
  }

  // Those of `left` stop their ranks.
  void Lose(const Ids& lost, const Ids& left) {
    for (const std::string& id : lost) cluster_->Disconnect(id);
    for (const std::string& id : left) {
      EXPECT_TRUE(cluster_->TakeAbort(id)) << id;
      cluster_->Fail(id, absl::CancelledError("aborted"));
    }
  }

  // Of the session call that waits for its answer.
  uint32_t ResumeLayer() {
    EXPECT_EQ(cluster_->decode.pending.size(), 1u);
    return cluster_->decode.pending.empty() ? 99 : cluster_->decode.pending[0].open.resume_layer();
  }

  // The next epoch begins on `ids`, which all get this resume point; "": none.
  void ExpectAssigned(const Ids& ids, const std::string& point) {
    Assign(ids);
    for (const std::string& id : ids) {
      const v1::PrefillAssignment& assignment = cluster_->worker(id).assignment;
      EXPECT_EQ(assignment.plan().world_size(), ids.size());
      EXPECT_EQ(assignment.has_resume(), !point.empty());
      EXPECT_EQ(assignment.resume().DebugString(), point) << id;
    }
  }

  void ExpectAnew(const Ids& ids) {
    EXPECT_EQ(ResumeLayer(), 0u);
    ExpectAssigned(ids, "");
  }

  // The digest is 16 bytes of `digest`.
  void ExpectCompletes(const Ids& ids, char digest, uint64_t bytes, uint64_t blocks) {
    for (const std::string& id : ids) cluster_->Complete(id);
    cluster_->decode.AnswerAll();
    ASSERT_TRUE(watcher_->result().ok()) << watcher_->result();
    const v1::PrefillCompleted& completed = watcher_->completed();
    const std::string& committed = cluster_->decode.committed.at(completed.session_id()).kv_digest();
    EXPECT_EQ(committed, std::string(16, digest));
    EXPECT_EQ(completed.kv_digest(), absl::BytesToHexString(committed));
    EXPECT_EQ(completed.kv_bytes(), bytes);
    EXPECT_EQ(completed.kv_blocks(), blocks);
  }

  void ExpectCounts(double resumed, double lost) {
    EXPECT_EQ(cluster_->coordinator_metrics.resumed_epochs_total.Value(), resumed);
    EXPECT_EQ(cluster_->coordinator_metrics.lost_checkpoints_total.Value(), lost);
  }

  void TearDown() override {
    EXPECT_TRUE(cluster_->decode.violations.empty()) << cluster_->decode.violations.front();
    EXPECT_TRUE(watcher_->violations.empty()) << watcher_->violations.front();
  }

  std::unique_ptr<FakeCluster> cluster_;
  std::shared_ptr<RecordingWatcher> watcher_;
  uint64_t decode_connection_ = 0;
};

TEST_F(SchedulerResumeTest, TheSurvivorOfTwoGoesOnAlone) {
  Start({"w0", "w1"});
  ReportAll({"w0", "w1"}, 1);
  ReportAll({"w0", "w1"}, 2);
  Lose({"w1"}, {"w0"});

  EXPECT_EQ(ResumeLayer(), 2u);
  EXPECT_EQ(cluster_->decode.pending[0].open.epoch(), 2u);
  ExpectAssigned({"w0"}, Point(2, 1, 2, {0, 0}));
  EXPECT_EQ(watcher_->events.back().progress().layers_done(), 2u);
  EXPECT_EQ(watcher_->events.back().progress().bytes_acked(), 400u);
  cluster_->Advance(absl::Seconds(1));
  cluster_->Progress("w0", 3);
  EXPECT_EQ(watcher_->events.back().progress().tokens_per_second(), 1000);
  EXPECT_EQ(watcher_->events.back().progress().eta().seconds(), 1);
  cluster_->Advance(absl::Seconds(1));
  ExpectCompletes({"w0"}, 17 + 18 + 1, 2 * 200 + 4000, 2 * 2 + 8);
  EXPECT_EQ(watcher_->completed().resume_layer(), 2u);
  EXPECT_EQ(watcher_->completed().retries(), 1u);
  EXPECT_EQ(watcher_->completed().tokens_per_second(), 1000) << "half of the layers in 2 s";
  ExpectCounts(1, 0);
}

TEST_F(SchedulerResumeTest, OfThreeOneMayBeLostAndOfFourTwoThatAreNoNeighbours) {
  struct Row {
    Ids lost;
    Ids left;
    std::string point;
  };
  for (const Row& row : {Row{{"w1"}, {"w0", "w2"}, Point(2, 1, 3, {0, 1, 1})},
                         Row{{"w2"}, {"w0", "w1"}, Point(2, 1, 3, {0, 1, 0})},
                         Row{{"w0", "w2"}, {"w1", "w3"}, Point(2, 1, 4, {0, 0, 1, 1})},
                         Row{{"w1", "w3"}, {"w0", "w2"}, Point(2, 1, 4, {0, 1, 1, 0})},
                         Row{{"w1", "w2"}, {"w0", "w3"}, ""}, Row{{"w3", "w0"}, {"w1", "w2"}, ""}}) {
    Ids all = row.lost;
    all.insert(all.end(), row.left.begin(), row.left.end());
    SCOPED_TRACE(absl::StrJoin(all, ","));
    Start(all);
    ReportAll(all, 2);
    Lose(row.lost, row.left);
    const bool anew = row.point.empty();
    EXPECT_EQ(ResumeLayer(), anew ? 0u : 2u);
    ExpectAssigned(row.left, row.point);
    ExpectCounts(anew ? 0 : 1, anew ? 1 : 0);
  }
}

TEST_F(SchedulerResumeTest, ASecondLossAddsToTheFirstOnesSums) {
  Start({"w0", "w1", "w2"});
  ReportAll({"w0", "w1", "w2"}, 1);
  Lose({"w1"}, {"w0", "w2"});
  ExpectAssigned({"w0", "w2"}, Point(1, 1, 3, {0, 1, 1}));
  ReportAll({"w0", "w2"}, 1);
  ReportAll({"w0", "w2"}, 3);
  Lose({"w2"}, {"w0"});
  EXPECT_EQ(ResumeLayer(), 3u);
  ExpectAssigned({"w0"}, Point(3, 2, 2, {0, 0}));

  ExpectCompletes({"w0"}, (9 + 10 + 11) + (25 + 26) + 1, 3 * 100 + 2 * 300 + 4000, 3 + 2 * 3 + 8);
  EXPECT_EQ(watcher_->completed().resume_layer(), 3u);
  ExpectCounts(2, 0);
}

TEST_F(SchedulerResumeTest, ASecondLossBeforeANewCheckpointBeginsAnew) {
  Start({"w0", "w1", "w2"});
  ReportAll({"w0", "w1", "w2"}, 2);
  Lose({"w1"}, {"w0", "w2"});
  ExpectAssigned({"w0", "w2"}, Point(2, 1, 3, {0, 1, 1}));
  ReportAll({"w0", "w2"}, 1);  // below what they went on from
  Lose({"w2"}, {"w0"});
  ExpectAnew({"w0"});
  ExpectCompletes({"w0"}, 1, 4000, 8);
  EXPECT_EQ(watcher_->completed().resume_layer(), 0u);
  ExpectCounts(1, 1);
}

TEST_F(SchedulerResumeTest, ALossBeforeTheAssignmentsLeavesTheCheckpointsWhereTheyAre) {
  Start({"w0", "w1", "w2", "w3"});
  ReportAll({"w0", "w1", "w2", "w3"}, 2);
  Lose({"w1"}, {"w0", "w2", "w3"});
  EXPECT_EQ(ResumeLayer(), 2u);
  cluster_->Disconnect("w3");
  cluster_->decode.Answer(absl::OkStatus());
  EXPECT_EQ(ResumeLayer(), 2u);
  ExpectAssigned({"w0", "w2"}, Point(2, 1, 4, {0, 1, 1, 0}));
  ExpectCompletes({"w0", "w2"}, (17 + 18 + 19 + 20) + (1 + 2), 4 * 200 + 2 * 4000, 4 * 2 + 2 * 8);
  EXPECT_EQ(watcher_->completed().epoch(), 3u);
  ExpectCounts(1, 0);
}

TEST_F(SchedulerResumeTest, GoesOnFromTheHighestLayerThatAllReported) {
  Start({"w0", "w1"});
  ReportAll({"w0", "w1"}, 1);
  ReportAll({"w1", "w0"}, 2);
  ReportAll({"w0"}, 3);
  Lose({"w1"}, {"w0"});
  EXPECT_EQ(ResumeLayer(), 2u);
  ExpectAssigned({"w0"}, Point(2, 1, 2, {0, 0}));

  Start({"w0", "w1"});
  ReportAll({"w0", "w1"}, 1);
  ReportAll({"w0"}, 2);
  ReportAll({"w0"}, 3);
  Lose({"w1"}, {"w0"});
  ExpectAnew({"w0"});
  ExpectCounts(0, 0);
}

TEST_F(SchedulerResumeTest, ReportsOnTheWayWhenTheEpochIsGivenUpCount) {
  Start({"w0", "w1"});
  ReportAll({"w0"}, 2);
  cluster_->Fail("w0", WorkerLost());
  const int events = watcher_->CountProgress();
  ReportAll({"w1"}, 2);
  EXPECT_EQ(watcher_->CountProgress(), events);
  Lose({}, {"w1"});
  EXPECT_EQ(ResumeLayer(), 2u);
  ExpectAssigned({"w0", "w1"}, Point(2, 1, 2, {0, 1}));
}

TEST_F(SchedulerResumeTest, AWorkerThatRegisteredAnewHasForgotten) {
  Start({"w0", "w1"});
  ReportAll({"w0", "w1"}, 2);
  cluster_->AddWorker(MakeWorker("w1", "i2"));
  Lose({}, {"w0"});
  EXPECT_EQ(ResumeLayer(), 2u);
  ExpectAssigned({"w0", "w1"}, Point(2, 1, 2, {0, 0}));

  Start({"w0", "w1"});
  ReportAll({"w0", "w1"}, 2);
  cluster_->AddWorker(MakeWorker("w1", "i2"));
  cluster_->AddWorker(MakeWorker("w0", "i2"));
  ExpectAnew({"w0", "w1"});
  ExpectCounts(0, 1);
}

TEST_F(SchedulerResumeTest, ALostSessionBeginsAnew) {
  for (const absl::Status& lost :
       {UnknownSession(), Error(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DECODE_LOST)}) {
    for (const bool first : {true, false}) {
      Start({"w0", "w1"});
      ReportAll({"w0", "w1"}, 2);
      cluster_->Fail("w0", first ? lost : WorkerLost());
      cluster_->Fail("w1", first ? absl::CancelledError("aborted") : lost);
      EXPECT_TRUE(cluster_->TakeAbort("w1"));
      ExpectAnew({"w0", "w1"});
      ExpectCounts(0, 1);
    }
  }
  Start({"w0", "w1"});
  ReportAll({"w0", "w1"}, 2);
  for (const char* id : {"w0", "w1"}) cluster_->Complete(id);
  cluster_->decode.Answer(UnknownSession());
  ExpectAnew({"w0", "w1"});
}

TEST_F(SchedulerResumeTest, AnotherDecodeNodeBeginsAnew) {
  Start({"w0", "w1"});
  ReportAll({"w0", "w1"}, 2);
  cluster_->AddDecodeNode("d1");
  cluster_->scheduler.OnDecodeClosed(decode_connection_);
  cluster_->Advance(absl::Seconds(31));
  Lose({"w1"}, {"w0"});
  ExpectAnew({"w0"});
  EXPECT_EQ(cluster_->worker("w0").assignment.destination().decode_node(), "d1");
  ExpectCounts(0, 1);
}

TEST_F(SchedulerResumeTest, ANodeThatForgotTheSessionOpensItAnewInTheSameEpoch) {
  Start({"w0", "w1"});
  ReportAll({"w0", "w1"}, 2);
  Lose({"w1"}, {"w0"});
  EXPECT_EQ(ResumeLayer(), 2u);
  cluster_->decode.open_sessions.clear();
  cluster_->decode.Answer(UnknownSession());
  EXPECT_EQ(cluster_->decode.pending[0].open.epoch(), 2u);
  ExpectAnew({"w0"});
  ExpectCounts(0, 1);
  ExpectCompletes({"w0"}, 1, 4000, 8);
}

TEST_F(SchedulerResumeTest, AWorkerWithoutTheStateLeadsToAnEpochFromLayerZero) {
  for (const bool first : {true, false}) {
    Start({"w0", "w1", "w2"});
    ReportAll({"w0", "w1", "w2"}, 2);
    Lose({"w1"}, {"w0", "w2"});
    ExpectAssigned({"w0", "w2"}, Point(2, 1, 3, {0, 1, 1}));
    ReportAll({"w0", "w2"}, 2);
    const absl::Status lost = Error(absl::StatusCode::kUnavailable, v1::ERROR_REASON_CHECKPOINT_LOST);
    cluster_->Fail("w0", first ? lost : WorkerLost());
    cluster_->Fail("w2", first ? WorkerLost() : lost);
    EXPECT_TRUE(cluster_->TakeAbort("w2"));
    ExpectAnew({"w0", "w2"});
    ExpectCounts(1, 1);
    ExpectCompletes({"w0", "w2"}, 3, 8000, 16);
  }
}

TEST_F(SchedulerResumeTest, WorkersOfTheLastEpochArePreferred) {
  v1::PrefillRequest request = MakeRequest("r", 4000);
  request.set_world_size(2);
  Start({"w0", "w1"}, MakeWorker(""), request);
  for (const char* id : {"w2", "w3"}) cluster_->AddWorker(id);
  cluster_->Advance(absl::Seconds(1));
  ReportAll({"w0", "w1"}, 2);
  Lose({"w0"}, {"w1"});
  EXPECT_EQ(ResumeLayer(), 2u);
  ExpectAssigned({"w1", "w2"}, Point(2, 1, 2, {0, 0}));
}

TEST_F(SchedulerResumeTest, ASurvivorWithAnotherJobIsWaitedForNoLongerThanAnyOtherAndHasForgotten) {
  for (const bool busy : {true, false}) {
    Start({"w0", "w1"});
    ReportAll({"w0", "w1"}, 2);
    v1::PrefillRequest urgent = MakeRequest("urgent", 10);
    urgent.set_priority(1);
    cluster_->Submit(urgent);
    Lose({"w1"}, {"w0"});
    Assign({"w0"});
    EXPECT_EQ(cluster_->worker("w0").assignment.request_id(), "urgent");
    if (busy) {
      cluster_->AddWorker("w2");
      cluster_->Advance(cluster_->scheduler.options().reserve_wait);
    } else {
      cluster_->Complete("w0");
      cluster_->decode.Answer(absl::OkStatus());
    }
    ExpectAnew({busy ? "w2" : "w0"});
    ExpectCounts(0, 1);
  }
}

TEST_F(SchedulerResumeTest, ReportsThatCannotBeTrueMeanNothing) {
  const std::vector<void (*)(v1::RankCheckpoint*)> lies = {
      [](v1::RankCheckpoint* c) { c->set_layer(0); },
      [](v1::RankCheckpoint* c) { c->set_layer(5); },
      [](v1::RankCheckpoint* c) { c->set_layer(1); },
      [](v1::RankCheckpoint* c) { c->set_kv_digest_share("short"); },
  };
  for (const auto lie : lies) {
    Start({"w0", "w1"});
    ReportAll({"w0", "w1"}, 2);
    v1::RankCheckpoint untrue = cluster_->CheckpointOf("w0", 3);
    lie(&untrue);
    cluster_->ReportCheckpoint("w0", untrue);
    ReportAll({"w1"}, 3);
    Lose({"w1"}, {"w0"});
    ExpectAssigned({"w0"}, Point(2, 1, 2, {0, 0}));
  }
  Start({"w0"});
  ReportAll({"w0"}, 2);  // alone
  cluster_->Fail("w0", WorkerLost());
  ExpectAnew({"w0"});
}

TEST_F(SchedulerResumeTest, APromptThatFitsOnlyWithoutACheckpointBeginsAnew) {
  v1::WorkerRegistration small = MakeWorker("");
  small.mutable_memory()->set_group_bytes_per_token(1000);
  // 4000 tokens of 1000 bytes on one, or 2048 of 2000 on each of two.
  small.mutable_memory()->set_budget_bytes(100'000'000 + 1'000'000 + 5'000'000);
  Start({"w0", "w1"}, small);
  ReportAll({"w0", "w1"}, 2);
  Lose({"w1"}, {"w0"});
  ExpectAnew({"w0"});
  EXPECT_EQ(cluster_->worker("w0").assignment.plan().bytes_per_rank(), 5'000'000u);
  ExpectCounts(0, 1);
}

TEST_F(SchedulerResumeTest, APackedPromptBeginsAnew) {
  v1::WorkerRegistration packing = MakeWorker("");
  packing.set_max_packed_prompts(4);
  packing.set_max_packed_tokens(1000);
  v1::PrefillRequest request = MakeRequest("r", 600);
  request.set_world_size(2);
  Start({"w0", "w1"}, packing, request);
  ReportAll({"w0", "w1"}, 2);
  Lose({"w1"}, {"w0"});
  ExpectAnew({"w0"});
  ExpectCounts(0, 1);
}

}  // namespace
}  // namespace headwater::testing
