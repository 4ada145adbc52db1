// One request, several requests, queueing: the scheduler where nothing breaks.
#include "coordinator/scheduler.h"

#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "base/rpc/epoch_token.h"
#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

using Kind = FakeDecodeClient::Kind;

// As those before EpochToken: the session's own goes to workers.
TEST(SchedulerTest, ADecodeNodeThatKnowsNoTokensOfEpochsGetsThatOfTheSession) {
  FakeCluster cluster;
  v1::DecodeRegistration registration = MakeDecodeNode("d0");
  registration.clear_epoch_tokens();
  ASSERT_TRUE(cluster.scheduler.AddDecodeNode(registration, std::make_shared<FakeDecodeLink>()).ok());
  cluster.AddWorker("w0");
  const auto watcher = cluster.Submit(MakeRequest("r", 1000));
  ASSERT_EQ(cluster.decode.pending.size(), 1u);
  const v1::OpenSessionRequest open = cluster.decode.pending[0].open;
  EXPECT_FALSE(open.epoch_tokens());
  cluster.decode.Answer(absl::OkStatus());
  EXPECT_EQ(cluster.TakeAssignment("w0").destination().session_token(), open.session_token());
}

TEST(SchedulerTest, RunsAShortPromptOnOneWorker) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  cluster.AddWorker("w1");
  EXPECT_EQ(cluster.worker("w0").link->registrations, 1);

  const auto watcher = cluster.Submit(MakeRequest("r", 1000));

  ASSERT_TRUE(watcher->accepted());
  EXPECT_EQ(watcher->events[0].accepted().queue_position(), 0u);
  EXPECT_EQ(watcher->events[0].accepted().plan().world_size(), 1u);
  ASSERT_EQ(cluster.decode.pending.size(), 1u);
  const v1::OpenSessionRequest open = cluster.decode.pending[0].open;
  EXPECT_EQ(cluster.decode.pending[0].kv_address, "d0.kv:7080");
  EXPECT_EQ(open.epoch(), 1u);
  EXPECT_EQ(open.resume_layer(), 0u);
  EXPECT_EQ(open.layout().num_layers(), 4u);
  EXPECT_EQ(open.layout().num_tokens(), 1000u);
  EXPECT_EQ(open.layout().block_tokens(), 256u);
  EXPECT_EQ(open.layout().dtype(), v1::KV_DTYPE_BF16);
  EXPECT_FALSE(cluster.HasMessage("w0")) << "no work before the session is open";

  cluster.decode.Answer(absl::OkStatus());
  const auto assignment = cluster.TakeAssignment("w0");
  EXPECT_EQ(assignment.token_ids_size(), 1000);
  EXPECT_EQ(assignment.policy().name(), "dense");
  EXPECT_EQ(assignment.rendezvous_address(), "");
  EXPECT_EQ(assignment.destination().session_id(), open.session_id());
  EXPECT_TRUE(open.epoch_tokens());
  EXPECT_EQ(assignment.destination().session_token(),
            EpochToken(open.session_token(), open.session_id(), open.epoch()))
      << "that of the session stays with the coordinator";
  EXPECT_NE(open.session_token(), open.session_id());
  EXPECT_FALSE(cluster.HasMessage("w1"));

  cluster.Advance(absl::Seconds(2));
  cluster.Complete("w0");
  ASSERT_EQ(cluster.decode.pending.size(), 1u);
  const v1::CommitSessionRequest commit = cluster.decode.pending[0].commit;
  EXPECT_EQ(commit.first_token(), 42u);
  EXPECT_EQ(commit.token_ids_size(), 1000);
  EXPECT_EQ(commit.kv_digest(), std::string(16, '\1'));
  EXPECT_EQ(commit.session_token(), open.session_token());
  EXPECT_FALSE(watcher->ended()) << "nothing is done before the commit";
  cluster.decode.Answer(absl::OkStatus());

  ASSERT_TRUE(watcher->result().ok()) << watcher->result();
  const auto& completed = watcher->completed();
  EXPECT_EQ(completed.request_id(), "r");
  EXPECT_EQ(completed.epoch(), 1u);
  EXPECT_EQ(completed.retries(), 0u);
  EXPECT_EQ(completed.decode_node(), "d0");
  EXPECT_EQ(completed.decode_address(), "d0.decode:7080");
  EXPECT_EQ(completed.session_id(), open.session_id());
  EXPECT_EQ(completed.kv_digest(), "01010101010101010101010101010101");
  EXPECT_EQ(completed.stages().total().seconds(), 2);
  EXPECT_DOUBLE_EQ(completed.tokens_per_second(), 500);
  EXPECT_DOUBLE_EQ(completed.density(), 0.5);
  EXPECT_TRUE(watcher->violations.empty());
  EXPECT_EQ(cluster.scheduler.num_jobs(), 0u);
}

TEST(SchedulerTest, ReportsOfAttentionReachTheClientAndAreChecked) {
  for (const bool good : {true, false}) {
    FakeCluster cluster;
    cluster.AddDecodeNode();
    cluster.AddWorker("w0");
    const auto watcher = cluster.Submit(MakeRequest("r", 1000));
    cluster.decode.Answer(absl::OkStatus());
    cluster.TakeAssignment("w0");
    auto report = cluster.CompletionOf("w0");
    report.mutable_attention()->set_recall_mean(0.97);
    report.mutable_attention()->set_policy("magic");
    v1::AttentionGroup* const group = report.mutable_attention()->add_groups();
    group->set_layer(3);
    group->set_kv_head(good ? 1 : 4096);
    group->set_density(0.1);
    group->set_fallback(v1::ATTENTION_FALLBACK_DENSE_RECALL);
    cluster.Complete("w0", report);
    cluster.decode.AnswerAll();

    if (!good) {
      EXPECT_EQ(watcher->result().code(), absl::StatusCode::kInternal) << watcher->result();
      continue;
    }
    ASSERT_TRUE(watcher->result().ok()) << watcher->result();
    const v1::AttentionReport& attention = watcher->completed().attention();
    EXPECT_EQ(attention.policy(), "dense");
    EXPECT_DOUBLE_EQ(attention.density(), 0.5);
    EXPECT_EQ(attention.recall_mean(), 0.97);
    EXPECT_EQ(attention.groups(0).fallback(), v1::ATTENTION_FALLBACK_DENSE_RECALL);
  }
}

TEST(SchedulerTest, RunsALongPromptOnAllWorkersAndAddsUpTheirReports) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  cluster.AddWorker("w1");
  v1::PrefillRequest request = MakeRequest("r", 4000);
  request.set_top_logprobs(1);
  request.set_strategy(v1::STRATEGY_ALLGATHER);

  const auto watcher = cluster.Submit(request);
  cluster.decode.Answer(absl::OkStatus());
  const auto first = cluster.TakeAssignment("w0");
  const auto second = cluster.TakeAssignment("w1");
  EXPECT_EQ(first.rank(), 0u);
  EXPECT_EQ(second.rank(), 1u);
  EXPECT_EQ(first.plan().partition(), v1::PARTITION_ZIGZAG);
  EXPECT_EQ(first.plan().strategy(), v1::STRATEGY_ALLGATHER);
  EXPECT_EQ(second.rendezvous_address(), MakeWorker("w0").rendezvous_address());
  auto report = cluster.CompletionOf("w0");
  report.mutable_stages()->mutable_linear()->set_seconds(3);
  report.mutable_stages()->mutable_egress_tail()->set_nanos(5);
  report.set_exchange_bytes(4);
  report.set_exchange_bytes_allgather(std::numeric_limits<uint64_t>::max());
  report.add_top_logprobs()->set_token_id(42);
  cluster.Complete("w0", report);
  EXPECT_TRUE(cluster.decode.pending.empty()) << "commit only when all ranks are done";
  report = cluster.CompletionOf("w1");
  report.mutable_stages()->mutable_linear()->set_seconds(2);
  report.mutable_stages()->mutable_egress_tail()->set_nanos(7);
  report.set_exchange_bytes(7);
  report.set_exchange_bytes_allgather(9);
  cluster.Complete("w1", report);
  cluster.decode.Answer(absl::OkStatus());

  ASSERT_TRUE(watcher->result().ok()) << watcher->result();
  const auto& completed = watcher->completed();
  EXPECT_EQ(completed.kv_digest(), "03030303030303030303030303030303");
  EXPECT_EQ(completed.kv_blocks(), 16u);
  EXPECT_EQ(completed.kv_bytes(), 8000u);
  EXPECT_EQ(completed.kv_blocks_resent(), 2u);
  EXPECT_EQ(completed.kv_stream_resumes(), 2u);
  EXPECT_EQ(completed.exchange_bytes(), 11u);
  EXPECT_EQ(completed.exchange_bytes_allgather(), std::numeric_limits<uint64_t>::max()) << "sums saturate";
  EXPECT_EQ(completed.plan().strategy(), v1::STRATEGY_ALLGATHER);
  EXPECT_EQ(completed.stages().linear().seconds(), 3);
  EXPECT_EQ(completed.stages().egress_tail().nanos(), 7);
  EXPECT_EQ(completed.plan().world_size(), 2u);
  EXPECT_EQ(completed.top_logprobs_size(), 1);
}

TEST(SchedulerTest, ReportsProgressOfTheSlowestRankAtMostTenTimesASecond) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  cluster.AddWorker("w1");
  const auto watcher = cluster.Submit(MakeRequest("r", 4000));
  cluster.decode.Answer(absl::OkStatus());
  cluster.TakeAssignment("w0");
  cluster.TakeAssignment("w1");

  cluster.Advance(absl::Seconds(1));
  cluster.Progress("w0", 2);
  for (int i = 0; i < 100; ++i) cluster.Progress("w1", 1);
  EXPECT_EQ(watcher->CountProgress(), 1);
  cluster.Advance(absl::Milliseconds(100));

  ASSERT_EQ(watcher->CountProgress(), 2) << "the last state comes without another report";
  const auto& progress = watcher->events.back().progress();
  EXPECT_EQ(progress.layers_done(), 1u);
  EXPECT_EQ(progress.num_layers(), 4u);
  EXPECT_EQ(progress.bytes_acked(), 3000u);
  EXPECT_EQ(progress.bytes_total(), uint64_t{4000} * 4 * 2 * 2 * 32 * 2);
  EXPECT_DOUBLE_EQ(progress.density(), 0.5);
  EXPECT_NEAR(progress.tokens_per_second(), 4000 * 0.25 / 1.1, 0.1);
  EXPECT_NEAR(static_cast<double>(progress.eta().seconds()) + progress.eta().nanos() * 1e-9, 3.3, 0.001);
  cluster.Progress("w0", 1);
  cluster.Progress("w0", 5);
  cluster.Advance(absl::Milliseconds(100));
  EXPECT_EQ(watcher->CountProgress(), 2) << "going backwards or over the end is ignored";
}

TEST(SchedulerTest, PrefersHigherPriorityThenEarlierArrival) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  const auto running = cluster.Submit(MakeRequest("running", 10));
  const auto low = cluster.Submit(MakeRequest("low", 10));
  v1::PrefillRequest request = MakeRequest("high", 10);
  request.set_priority(5);
  const auto high = cluster.Submit(request);
  const auto late = cluster.Submit(MakeRequest("late", 10));
  EXPECT_EQ(low->events[0].accepted().queue_position(), 0u);
  EXPECT_EQ(high->events[0].accepted().queue_position(), 0u) << "ahead of low";
  EXPECT_EQ(late->events[0].accepted().queue_position(), 2u);

  for (const char* expected : {"running", "high", "low", "late"}) {
    cluster.decode.AnswerAll();
    EXPECT_EQ(cluster.TakeAssignment("w0").request_id(), expected);
    EXPECT_FALSE(cluster.HasMessage("w0")) << "one job at a time";
    cluster.Complete("w0");
    cluster.decode.AnswerAll();
  }
  EXPECT_EQ(cluster.scheduler.num_jobs(), 0u);
}

TEST(SchedulerTest, TheHeadReservesIdleWorkersSoThatShortJobsDoNotStarveIt) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  cluster.AddWorker("w1");
  cluster.Submit(MakeRequest("short1", 10));
  cluster.decode.AnswerAll();
  cluster.TakeAssignment("w0");
  cluster.Submit(MakeRequest("long", 4000));
  cluster.Submit(MakeRequest("short2", 10));
  cluster.decode.AnswerAll();
  EXPECT_FALSE(cluster.HasMessage("w1")) << "w1 is kept for the long one";

  cluster.Complete("w0");
  cluster.decode.AnswerAll();

  EXPECT_EQ(cluster.TakeAssignment("w0").request_id(), "long");
  EXPECT_EQ(cluster.TakeAssignment("w1").request_id(), "long");
}

TEST(SchedulerTest, TheHeadTakesFewerWorkersWhenItsReservationGetsOld) {
  CoordinatorOptions options;
  options.reserve_wait = absl::Seconds(10);
  FakeCluster cluster(options);
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  cluster.AddWorker("w1");
  cluster.Submit(MakeRequest("endless", 10));
  cluster.decode.AnswerAll();
  cluster.TakeAssignment("w0");
  const auto watcher = cluster.Submit(MakeRequest("long", 4000));

  cluster.Advance(absl::Seconds(9.5));
  cluster.decode.AnswerAll();
  EXPECT_FALSE(cluster.HasMessage("w1"));
  cluster.Advance(absl::Seconds(1));
  cluster.decode.AnswerAll();

  EXPECT_EQ(cluster.TakeAssignment("w1").plan().world_size(), 1u);
  ASSERT_EQ(watcher->CountProgress(), 1) << "the client hears of the other plan";
  EXPECT_EQ(watcher->events.back().progress().plan().world_size(), 1u);
}

TEST(SchedulerTest, UnplannableJobsDoNotHoldUpOthers) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  cluster.AddWorker("w1");
  v1::PrefillRequest pair = MakeRequest("pair", 10);
  pair.set_world_size(2);
  cluster.Submit(MakeRequest("first", 10));
  cluster.decode.AnswerAll();
  cluster.TakeAssignment("w0");
  cluster.Submit(pair);
  cluster.Disconnect("w1");
  cluster.Submit(MakeRequest("second", 10));

  cluster.Complete("w0");
  cluster.decode.AnswerAll();

  EXPECT_EQ(cluster.TakeAssignment("w0").request_id(), "second");
}

TEST(SchedulerTest, RefusesWhatTheQueueHasNoRoomFor) {
  CoordinatorOptions options;
  options.max_queue_requests = 2;
  options.max_queue_tokens = 100;
  FakeCluster cluster(options);
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  cluster.Submit(MakeRequest("running", 10));
  const auto first = cluster.Submit(MakeRequest("a", 60));
  const auto tokens = cluster.Submit(MakeRequest("b", 41));
  const auto second = cluster.Submit(MakeRequest("c", 40));
  const auto requests = cluster.Submit(MakeRequest("d", 1));

  EXPECT_TRUE(first->accepted());
  EXPECT_TRUE(second->accepted()) << "exactly at both limits";
  for (const auto& refused : {tokens, requests}) {
    EXPECT_EQ(refused->result().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(ReasonOf(refused->result()), v1::ERROR_REASON_QUEUE_FULL);
    EXPECT_TRUE(refused->result().GetPayload("type.googleapis.com/google.rpc.RetryInfo").has_value());
    EXPECT_TRUE(refused->events.empty());
  }
  EXPECT_TRUE(absl::StrContains(tokens->result().message(), "101 tokens")) << tokens->result();
}

TEST(SchedulerTest, RefusesWhatTheClusterCannotServe) {
  FakeCluster cluster;
  cluster.AddDecodeNode("d0");
  cluster.AddWorker("w0");
  struct Row {
    const char* name;
    void (*change)(v1::PrefillRequest*);
    absl::StatusCode code;
    v1::ErrorReason reason;
  };
  const Row rows[] = {
      {"model", [](v1::PrefillRequest* r) { r->set_model("gpt-9"); }, absl::StatusCode::kNotFound,
       v1::ERROR_REASON_UNKNOWN_MODEL},
      {"token", [](v1::PrefillRequest* r) { r->set_token_ids(0, 256); }, absl::StatusCode::kInvalidArgument,
       v1::ERROR_REASON_TOKEN_OUT_OF_RANGE},
      {"policy", [](v1::PrefillRequest* r) { r->mutable_policy()->set_name("magic"); },
       absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_UNKNOWN_POLICY},
      {"node", [](v1::PrefillRequest* r) { r->set_decode_node("1.2.3.4:80"); }, absl::StatusCode::kNotFound,
       v1::ERROR_REASON_UNKNOWN_DECODE_NODE},
      {"pool", [](v1::PrefillRequest* r) { r->set_decode_pool("none"); }, absl::StatusCode::kUnavailable,
       v1::ERROR_REASON_NO_DECODE_NODE},
      {"dtype", [](v1::PrefillRequest* r) { r->set_kv_dtype(v1::KV_DTYPE_F16); },
       absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED},
      {"memory", [](v1::PrefillRequest* r) { r->mutable_token_ids()->Resize(899'001, 1); },
       absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE},
  };
  for (const Row& row : rows) {
    v1::PrefillRequest request = MakeRequest("r", 3);
    row.change(&request);
    const auto watcher = cluster.Submit(request);
    EXPECT_EQ(watcher->result().code(), row.code) << row.name << ": " << watcher->result();
    EXPECT_EQ(ReasonOf(watcher->result()), row.reason) << row.name;
    EXPECT_TRUE(watcher->events.empty());
  }
  EXPECT_EQ(cluster.scheduler.num_jobs(), 0u);
  EXPECT_TRUE(cluster.Submit(MakeRequest("r", 3))->accepted()) << "a refused id is free";
}

TEST(SchedulerTest, ListsWorkersAndNodesWithWhatTheyDo) {
  FakeCluster cluster;
  cluster.AddDecodeNode("d0");
  cluster.AddWorker("w0");
  cluster.Submit(MakeRequest("r", 3));

  const auto workers = cluster.scheduler.ListWorkers();
  ASSERT_EQ(workers.workers_size(), 1);
  EXPECT_EQ(workers.workers(0).request_id(), "r");
  EXPECT_EQ(workers.workers(0).epoch(), 1u);
  const auto nodes = cluster.scheduler.ListDecodeNodes();
  ASSERT_EQ(nodes.decode_nodes_size(), 1);
  EXPECT_TRUE(nodes.decode_nodes(0).connected());
  EXPECT_EQ(nodes.decode_nodes(0).kv_address(), "d0.kv:7080");
}

TEST(SchedulerTest, CountsEveryRequestInTheMetrics) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker("w0");
  cluster.Submit(MakeRequest("a", 10));
  cluster.Submit(MakeRequest("b", 20));
  auto& metrics = cluster.coordinator_metrics;
  EXPECT_EQ(metrics.requests_running.Value(), 1);
  EXPECT_EQ(metrics.tokens_running.Value(), 10);
  EXPECT_EQ(metrics.requests_waiting.Value(), 1);
  EXPECT_EQ(metrics.tokens_waiting.Value(), 20);
  EXPECT_EQ(metrics.workers.Value(), 1);
  EXPECT_EQ(metrics.decode_nodes.Value(), 1);
  for (int i = 0; i < 2; ++i) {
    cluster.decode.AnswerAll();
    cluster.TakeAssignment("w0");
    cluster.Complete("w0");
    cluster.decode.AnswerAll();
  }
  EXPECT_EQ(metrics.requests_running.Value(), 0);
  EXPECT_EQ(metrics.tokens_running.Value(), 0);
  EXPECT_EQ(metrics.requests_waiting.Value(), 0);
  EXPECT_EQ(metrics.prompt_tokens_total.Value(), 30);
}

TEST(SchedulerTest, PoolsGiveTheNodeWithMostFreeBudget) {
  FakeCluster cluster;
  cluster.AddDecodeNode("d0");
  cluster.AddDecodeNode("d1");
  cluster.AddDecodeNode("other", "elsewhere");
  for (const char* id : {"w0", "w1", "w2"}) cluster.AddWorker(id);

  for (const char* id : {"a", "b", "c"}) cluster.Submit(MakeRequest(id, 100));

  ASSERT_EQ(cluster.decode.pending.size(), 3u);
  EXPECT_EQ(cluster.decode.pending[0].kv_address, "d0.kv:7080");
  EXPECT_EQ(cluster.decode.pending[1].kv_address, "d1.kv:7080");
  EXPECT_EQ(cluster.decode.pending[2].kv_address, "d0.kv:7080");
  cluster.decode.AnswerAll();
  cluster.TakeAssignment("w0");
  cluster.Complete("w0");
  cluster.decode.AnswerAll();
  cluster.Submit(MakeRequest("d", 100));
  ASSERT_EQ(cluster.decode.pending.size(), 1u);
  EXPECT_EQ(cluster.decode.pending[0].kv_address, "d1.kv:7080") << "d0 holds two, d1 one";
}

}  // namespace
}  // namespace headwater::testing
