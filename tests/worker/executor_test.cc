#include "worker/executor.h"

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/metrics.h"
#include "base/rpc/grpc_status.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"
#include "tests/worker/acked.h"
#include "tests/worker/assignments.h"
#include "tests/worker/gloo_group.h"
#include "tests/worker/receiver.h"

namespace headwater::testing {
namespace {

class ExecutorTest : public ::testing::Test {
 protected:
  ExecutorTest() : metrics_("test"), worker_metrics_(&metrics_) {}

  ExecutorOptions Options(int rank) {
    ExecutorOptions options;
    options.backend = fixture_.NewBackend();
    options.worker_id = absl::StrCat("w", rank);
    options.metrics = &worker_metrics_;
    options.collective_timeout = absl::Seconds(20);
    options.join_group = [this](const GroupSpec& spec, JobControl*) {
      return groups_.Join(spec.name, spec.rank, spec.world_size, spec.timeout, spec.connect_timeout);
    };
    return options;
  }
  v1::PrefillAssignment Make(int64_t tokens, int world, int rank) {
    v1::PrefillAssignment assignment = fixture_.Make(tokens, world, rank);
    assignment.mutable_destination()->set_kv_address(receiver_.address());
    return assignment;
  }
  static v1::ConnectRequest RunIn(PrefillExecutor* executor, const v1::PrefillAssignment& assignment) {
    JobControl control;
    return executor->Run(assignment, &control, [](const v1::RankProgress&) {});
  }
  void ExpectStored(const v1::PrefillAssignment& assignment) {
    const std::vector<int32_t> tokens(assignment.token_ids().begin(), assignment.token_ids().end());
    const auto expected = ForwardDense(fixture_.model(), tokens);
    ASSERT_TRUE(expected.ok());
    const auto kv = receiver_.store()->Acquire(assignment.destination().session_id());
    ASSERT_TRUE(kv.ok()) << kv.status();
    for (uint32_t layer = 0; layer < expected->k.size(); ++layer) {
      std::vector<float> k(expected->k[layer].size());
      std::memcpy(k.data(), (*kv)->Tensor(layer, KvKind::kK), k.size() * sizeof(float));
      EXPECT_LE(RelativeError(k, expected->k[layer]), 1e-5) << layer;
    }
    EXPECT_EQ((*kv)->first_token(), TopTokens(expected->logits, 1)[0].token);
  }

  AssignmentFixture fixture_;
  GlooGroups groups_;
  Receiver receiver_;
  Metrics metrics_;
  WorkerMetrics worker_metrics_;
};

TEST_F(ExecutorTest, PrefillsOverTwoRanksIntoACacheThatCommits) {
  PrefillExecutor first(Options(0));
  PrefillExecutor second(Options(1));
  const v1::PrefillAssignment assignment = Make(200, 2, 0);
  receiver_.Open(assignment);
  v1::ConnectRequest results[2];
  std::thread peer([&] { results[1] = RunIn(&second, Make(200, 2, 1)); });
  results[0] = RunIn(&first, assignment);
  peer.join();

  for (const v1::ConnectRequest& result : results) {
    ASSERT_TRUE(result.has_completed()) << result.DebugString();
    EXPECT_GT(result.completed().kv_blocks(), 0u);
    EXPECT_EQ(result.completed().pairs_computed(), result.completed().pairs_possible());
    EXPECT_GE(result.completed().layer_densities_size(), fixture_.model().config().num_layers - 1);
    for (const float density : result.completed().layer_densities()) EXPECT_EQ(density, 1);
    EXPECT_EQ(result.completed().layer_recalls_size(), 0) << "nothing measured it";
    EXPECT_EQ(result.completed().exchange_bytes(), result.completed().exchange_bytes_allgather());
  }
  // Rank 0 has 104 tokens, rank 1 the other 96; in the last layer only rank 0 has a query.
  const ModelConfig& config = fixture_.model().config();
  const uint64_t token = 2 * sizeof(float) * static_cast<uint64_t>(config.num_kv_heads * config.head_dim);
  const auto layers = static_cast<uint64_t>(config.num_layers);
  EXPECT_EQ(results[0].completed().exchange_bytes(), layers * 96 * token);
  EXPECT_EQ(results[1].completed().exchange_bytes(), (layers - 1) * 104 * token);
  // Zigzag gives the last token to rank 0.
  EXPECT_TRUE(results[0].completed().has_first_token());
  EXPECT_FALSE(results[1].completed().has_first_token());
  const absl::Status committed =
      receiver_.Commit(assignment, {results[0].completed(), results[1].completed()});
  ASSERT_TRUE(committed.ok()) << committed;
  ExpectStored(assignment);
}

TEST_F(ExecutorTest, MeasuresTheGroupsLinkWhereItIsAskedTo) {
  PrefillExecutor first(Options(0));
  PrefillExecutor second(Options(1));
  for (const bool asked : {true, false}) {
    v1::PrefillAssignment assignments[2] = {Make(200, 2, 0), Make(200, 2, 1)};
    for (v1::PrefillAssignment& assignment : assignments) {
      assignment.set_measure_links(asked);
      assignment.set_request_id(asked ? "measured" : "plain");
    }
    receiver_.Open(assignments[0]);
    v1::ConnectRequest results[2];
    std::thread peer([&] { results[1] = RunIn(&second, assignments[1]); });
    results[0] = RunIn(&first, assignments[0]);
    peer.join();
    ASSERT_TRUE(results[0].has_completed() && results[1].has_completed()) << results[0].DebugString();
    const double link = results[0].completed().links().link_bytes_per_s();
    EXPECT_EQ(link > 1e5, asked) << link;
    EXPECT_EQ(results[1].completed().links().link_bytes_per_s(), link);
    EXPECT_EQ(results[0].completed().links().egress_bytes_per_s(), 0) << "of so few bytes";
    EXPECT_EQ(results[0].completed().has_links(), asked);
    ASSERT_TRUE(receiver_.Commit(assignments[0], {results[0].completed(), results[1].completed()}).ok());
    ExpectStored(assignments[0]);
  }
}

TEST_F(ExecutorTest, ARankWithoutTokensCompletesWithNothingToSend) {
  PrefillExecutor first(Options(0));
  PrefillExecutor second(Options(1));
  const v1::PrefillAssignment assignment = Make(10, 2, 0);
  receiver_.Open(assignment);
  v1::ConnectRequest empty;
  std::thread peer([&] { empty = RunIn(&second, Make(10, 2, 1)); });
  const v1::ConnectRequest result = RunIn(&first, assignment);
  peer.join();

  ASSERT_TRUE(result.has_completed()) << result.DebugString();
  ASSERT_TRUE(empty.has_completed()) << empty.DebugString();
  EXPECT_EQ(empty.completed().kv_blocks(), 0u);
  const absl::Status committed = receiver_.Commit(assignment, {result.completed(), empty.completed()});
  ASSERT_TRUE(committed.ok()) << committed;
  ExpectStored(assignment);
}

TEST_F(ExecutorTest, RunsOneJobAfterTheOtherInTheSameMemory) {
  PrefillExecutor executor(Options(1));
  uint32_t epoch = 1;
  for (const int64_t tokens : {150, 7, 300, 150}) {
    v1::PrefillAssignment assignment = Make(tokens, 1, 0);
    assignment.set_epoch(++epoch);
    assignment.set_top_logprobs(3);
    assignment.mutable_destination()->set_session_id(absl::StrCat("s", epoch));
    receiver_.Open(assignment);

    const v1::ConnectRequest result = RunIn(&executor, assignment);

    ASSERT_TRUE(result.has_completed()) << result.DebugString();
    EXPECT_EQ(result.completed().top_logprobs_size(), 3);
    EXPECT_EQ(result.completed().top_logprobs(0).token_id(), result.completed().first_token());
    EXPECT_EQ(result.completed().kv_bytes(), KvGeometry::Create(assignment.layout())->total_bytes());
    const absl::Status committed = receiver_.Commit(assignment, {result.completed()});
    ASSERT_TRUE(committed.ok()) << committed;
    ExpectStored(assignment);
  }
}

TEST_F(ExecutorTest, ReportsProgressAfterEveryLayer) {
  PrefillExecutor executor(Options(1));
  const v1::PrefillAssignment assignment = Make(64, 1, 0);
  receiver_.Open(assignment);
  std::vector<uint32_t> layers;
  JobControl control;

  const auto result = executor.Run(assignment, &control, [&](const v1::RankProgress& progress) {
    layers.push_back(progress.layers_done());
    EXPECT_EQ(progress.bytes_total(), KvGeometry::Create(assignment.layout())->total_bytes());
    EXPECT_LE(progress.bytes_acked(), progress.bytes_total());
  });

  ASSERT_TRUE(result.has_completed());
  ASSERT_EQ(layers.size(), static_cast<size_t>(fixture_.model().config().num_layers));
  for (size_t i = 0; i < layers.size(); ++i) EXPECT_EQ(layers[i], i + 1);
}

TEST_F(ExecutorTest, AnswersCancelledWhenCancelledOnTheWay) {
  PrefillExecutor executor(Options(1));
  const v1::PrefillAssignment assignment = Make(300, 1, 0);
  receiver_.Open(assignment);
  JobControl control;

  const auto result = executor.Run(assignment, &control, [&](const v1::RankProgress&) {
    control.Cancel(MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED, "enough"));
  });

  ASSERT_TRUE(result.has_failed());
  const absl::Status status = FromRpcStatus(result.failed().error());
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_CANCELLED);
  EXPECT_EQ(result.failed().epoch(), 3u);
  // The executor is ready for the next one.
  v1::PrefillAssignment next = Make(30, 1, 0);
  next.mutable_destination()->set_session_id("s2");
  receiver_.Open(next);
  EXPECT_TRUE(RunIn(&executor, next).has_completed());
}

TEST_F(ExecutorTest, APeerThatIsCancelledMidRingEndsTheOtherRankAsWorkerLost) {
  PrefillExecutor first(Options(0));
  PrefillExecutor second(Options(1));
  receiver_.Open(Make(600, 2, 0));
  const absl::Time start = absl::Now();
  std::thread peer([&] {
    JobControl control;
    second.Run(Make(600, 2, 1), &control,
               [&](const v1::RankProgress&) { control.Cancel(absl::CancelledError("killed")); });
  });

  const v1::ConnectRequest result = RunIn(&first, Make(600, 2, 0));
  peer.join();

  ASSERT_TRUE(result.has_failed());
  const absl::Status status = FromRpcStatus(result.failed().error());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_WORKER_LOST);
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

// The first rank of two goes on alone with what both had.
TEST_F(ExecutorTest, GoesOnFromACheckpointWhereItsPeerWasLost) {
  const KvSender* senders[2] = {nullptr, nullptr};
  const auto options = [&](int rank) {
    ExecutorOptions made = Options(rank);
    made.checkpoint_layers = 1;
    made.make_sender = [&senders](const KvSenderOptions& sender, const KvGeometry& geometry) {
      auto created = KvSender::Create(sender, geometry);
      senders[sender.rank] = created.get();
      return created;
    };
    return made;
  };
  PrefillExecutor survivor(options(0));
  PrefillExecutor lost(options(1));
  receiver_.Open(Make(300, 2, 0));
  v1::RankCheckpoint last[2];
  const auto run = [&](PrefillExecutor* executor, int rank) {
    JobControl control;
    return executor->Run(Make(300, 2, rank), &control, [&, rank](const v1::RankProgress& progress) {
      if (progress.layers_done() == 1) WaitAckedBelow(senders[rank], 1);
      last[rank] = progress.checkpoint();
      if (rank == 1 && progress.layers_done() == 2) control.Cancel(absl::CancelledError("killed"));
    });
  };
  std::thread peer([&] { EXPECT_TRUE(run(&lost, 1).has_failed()); });
  EXPECT_TRUE(run(&survivor, 0).has_failed());
  peer.join();
  ASSERT_EQ(last[0].layer(), 1u);
  ASSERT_EQ(last[1].layer(), 1u);

  v1::PrefillAssignment assignment = Make(300, 1, 0);
  assignment.mutable_plan()->set_worker_ids(0, "w0");
  assignment.set_epoch(4);
  v1::ResumePoint* const resume = assignment.mutable_resume();
  resume->set_layer(1);
  resume->set_epoch(3);
  resume->set_world_size(2);
  resume->set_partition(v1::PARTITION_ZIGZAG);
  resume->set_block_tokens(16);
  resume->add_providers(0);
  resume->add_providers(0);
  receiver_.Open(assignment);
  const v1::ConnectRequest result = RunIn(&survivor, assignment);
  ASSERT_TRUE(result.has_completed()) << result.DebugString();
  const KvGeometry geometry = *KvGeometry::Create(assignment.layout());
  EXPECT_EQ(result.completed().kv_bytes() + last[0].kv_bytes() + last[1].kv_bytes(), geometry.total_bytes());
  EXPECT_EQ(result.completed().kv_blocks() + last[0].kv_blocks() + last[1].kv_blocks(),
            geometry.num_blocks());
  std::vector<v1::RankCompleted> shares(3);
  shares[0] = result.completed();
  shares[1].set_kv_digest_share(last[0].kv_digest_share());
  shares[2].set_kv_digest_share(last[1].kv_digest_share());
  const absl::Status committed = receiver_.Commit(assignment, shares);
  ASSERT_TRUE(committed.ok()) << committed;
  ExpectStored(assignment);

  assignment.set_epoch(5);
  const v1::ConnectRequest again = RunIn(&survivor, assignment);
  ASSERT_TRUE(again.has_failed());
  const absl::Status status = FromRpcStatus(again.failed().error());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_CHECKPOINT_LOST) << "a rank alone keeps nothing";
}

TEST_F(ExecutorTest, AnotherPromptTakesTheCheckpointsPlace) {
  ExecutorOptions options = Options(1);
  options.checkpoint_layers = 1;
  options.collective_timeout = absl::Seconds(5);
  PrefillExecutor executor(options);
  options.worker_id = "w0";
  options.backend = fixture_.NewBackend();
  PrefillExecutor first(options);
  receiver_.Open(Make(300, 2, 0));
  std::thread peer([&] {
    JobControl control;
    first.Run(Make(300, 2, 0), &control, [&](const v1::RankProgress& progress) {
      if (progress.layers_done() == 2) control.Cancel(absl::CancelledError("killed"));
    });
  });
  EXPECT_TRUE(RunIn(&executor, Make(300, 2, 1)).has_failed());
  peer.join();
  EXPECT_GT(worker_metrics_.checkpoint_bytes.Value(), 0);
  v1::PrefillAssignment other = Make(30, 1, 0);
  other.set_request_id("r2");
  other.mutable_destination()->set_session_id("s2");
  receiver_.Open(other);
  EXPECT_TRUE(RunIn(&executor, other).has_completed());
  EXPECT_EQ(worker_metrics_.checkpoint_bytes.Value(), 0);
}

TEST_F(ExecutorTest, APeerThatNeverComesIsWorkerLostAfterTheTimeout) {
  ExecutorOptions options = Options(0);
  options.collective_timeout = absl::Milliseconds(200);
  PrefillExecutor executor(options);
  const v1::PrefillAssignment assignment = Make(40, 2, 0);
  receiver_.Open(assignment);

  const v1::ConnectRequest result = RunIn(&executor, assignment);

  const absl::Status status = FromRpcStatus(result.failed().error());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_WORKER_LOST);
}

TEST_F(ExecutorTest, ADecodeNodeThatCannotBeReachedStallsTheStream) {
  ExecutorOptions options = Options(1);
  options.kv_stall_timeout = absl::Milliseconds(300);
  PrefillExecutor executor(options);
  v1::PrefillAssignment assignment = Make(200, 1, 0);
  assignment.mutable_destination()->set_kv_address("127.0.0.1:1");
  const absl::Time start = absl::Now();

  const v1::ConnectRequest result = RunIn(&executor, assignment);

  const absl::Status status = FromRpcStatus(result.failed().error());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_KV_STREAM_STALLED) << status;
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

TEST_F(ExecutorTest, PassesOnTheReceiversRefusal) {
  PrefillExecutor executor(Options(1));
  v1::PrefillAssignment assignment = Make(200, 1, 0);
  receiver_.Open(assignment);
  assignment.mutable_destination()->set_session_token("wrong");

  const v1::ConnectRequest result = RunIn(&executor, assignment);

  ASSERT_TRUE(result.has_failed());
  EXPECT_EQ(result.failed().error().code(), static_cast<int>(absl::StatusCode::kPermissionDenied))
      << result.DebugString();
}

TEST_F(ExecutorTest, RefusesABadAssignmentWithItsReason) {
  PrefillExecutor executor(Options(1));
  v1::PrefillAssignment assignment = Make(20, 1, 0);
  assignment.set_token_ids(3, 1 << 30);

  const v1::ConnectRequest result = RunIn(&executor, assignment);

  EXPECT_EQ(ReasonOf(FromRpcStatus(result.failed().error())), v1::ERROR_REASON_TOKEN_OUT_OF_RANGE);
}

TEST(SlowPeerAllowanceTest, GrowsWithTheWorkOfTheLargestRank) {
  AssignmentFixture fixture;
  const auto small = CheckAssignment(fixture.Make(20, 2, 1), fixture.context());
  const auto large = CheckAssignment(fixture.Make(2000, 2, 1), fixture.context());
  ASSERT_TRUE(small.ok() && large.ok());
  const ModelConfig& config = fixture.model().config();

  EXPECT_LT(SlowPeerAllowance(config, *small), absl::Milliseconds(100));
  EXPECT_GT(SlowPeerAllowance(config, *large), 50 * SlowPeerAllowance(config, *small));
}

}  // namespace
}  // namespace headwater::testing
