// The whole service, real processes on loopback: what a client sees.
#include <chrono>
#include <map>
#include <set>
#include <thread>
#include <tuple>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <grpcpp/client_context.h>

#include "base/rpc/grpc_status.h"
#include "tests/integration/cluster.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

std::string TinyModelDirectory() {
  static const std::string* const directory = [] {
    auto* path = new std::string(MakeTempDirectory());
    WriteTinyModel(TinyModel{}, *path);
    return path;
  }();
  return *directory;
}

// One cluster for all tests of this file: they must leave it undisturbed, and that is part of what they test.
Cluster& SharedCluster() {
  static Cluster cluster([] {
    ClusterOptions options;
    options.model_directory = TinyModelDirectory();
    options.coordinator_flags = {"--context_parallel_min_tokens=1024"};
    return options;
  }());
  return cluster;
}

class ServiceTest : public ::testing::Test {
 protected:
  void TearDown() override {
    if (HasFailure() && !logs_printed_) std::fprintf(stderr, "%s", SharedCluster().Logs().c_str());
    logs_printed_ = logs_printed_ || HasFailure();
  }

  static bool logs_printed_;
};
bool ServiceTest::logs_printed_ = false;

TEST_F(ServiceTest, PrefillsOnTwoWorkersStreamsTheCacheAndGenerates) {
  Cluster& cluster = SharedCluster();
  std::vector<v1::PrefillResponse> events;

  const auto completed = cluster.Prefill(MakeRequest(RandomTokens(1, 3000)),
                                         [&](const v1::PrefillResponse& event) { events.push_back(event); });

  ASSERT_TRUE(completed.ok()) << completed.status();
  EXPECT_TRUE(events.front().has_accepted());
  EXPECT_EQ(completed->plan().world_size(), 2u);
  EXPECT_EQ(completed->num_tokens(), 3000u);
  EXPECT_EQ(completed->kv_blocks(), 4u * 2 * 12);
  EXPECT_EQ(completed->kv_bytes(), uint64_t{3000} * 4 * 2 * 2 * 32 * 4);
  EXPECT_DOUBLE_EQ(completed->density(), 1.0);
  const auto tokens = cluster.Generate(*completed, 8);
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  ASSERT_EQ(tokens->size(), 8u);
  EXPECT_EQ(tokens->front(), completed->first_token());
  const auto reclaimed = cluster.Release(*completed);
  ASSERT_TRUE(reclaimed.ok()) << reclaimed.status();
  EXPECT_GE(*reclaimed, completed->kv_bytes());
  EXPECT_FALSE(cluster.Generate(*completed, 1).ok()) << "a released cache must be gone";
}

TEST(PlanByCostTest, WorkersStateTheirRatesAndAnExplanationShowsWhatWasMadeOfThem) {
  ClusterOptions options;
  options.model_directory = TinyModelDirectory();
  options.measure_rates = true;
  Cluster cluster(options);
  v1::PrefillRequest request = MakeRequest(RandomTokens(3, 3000));
  request.set_explain(true);
  v1::PlanExplanation explanation;

  const auto completed = cluster.Prefill(request, [&](const v1::PrefillResponse& event) {
    if (event.has_accepted()) explanation = event.accepted().explanation();
  });

  ASSERT_TRUE(completed.ok()) << completed.status() << cluster.Logs();
  EXPECT_GT(completed->plan().cost().linear_s(), 0);
  EXPECT_GT(completed->plan().cost().attention_s(), 0);
  EXPECT_GT(completed->plan().cost().egress_s(), 0);
  // Within what any machine is off by.
  EXPECT_LT(completed->plan().cost().total_s(), 60);
  ASSERT_EQ(explanation.candidates_size(), 1 + 3) << cluster.Logs();
  for (const v1::PlanCandidate& candidate : explanation.candidates()) {
    EXPECT_TRUE(candidate.has_cost());
    EXPECT_EQ(candidate.cost().exchange_s() > 0, candidate.world_size() > 1);
  }
  ASSERT_TRUE(cluster.Release(*completed).ok());
}

TEST_F(ServiceTest, SamePlanTwiceGivesEqualDigestsAndAnyPlanTheSameTokens) {
  Cluster& cluster = SharedCluster();
  std::set<std::string> digests;
  std::set<std::vector<uint32_t>> texts;
  for (const auto& [world_size, partition, strategy] :
       {std::tuple(1u, v1::PARTITION_CONTIGUOUS, v1::STRATEGY_RING),
        std::tuple(2u, v1::PARTITION_ZIGZAG, v1::STRATEGY_UNSPECIFIED),
        std::tuple(2u, v1::PARTITION_CONTIGUOUS, v1::STRATEGY_ALLGATHER),
        std::tuple(2u, v1::PARTITION_STRIPED, v1::STRATEGY_SPARSE)}) {
    std::string first_digest;
    for (int run = 0; run < 2; ++run) {
      v1::PrefillRequest request = MakeRequest(RandomTokens(2, 2500));
      request.set_world_size(world_size);
      request.set_partition(partition);
      request.set_strategy(strategy);
      const auto completed = cluster.Prefill(request);
      ASSERT_TRUE(completed.ok()) << completed.status();
      if (run == 0) first_digest = completed->kv_digest();
      EXPECT_EQ(completed->kv_digest(), first_digest) << "world size " << world_size;
      const auto tokens = cluster.Generate(*completed, 6);
      ASSERT_TRUE(tokens.ok()) << tokens.status();
      texts.insert(*tokens);
      ASSERT_TRUE(cluster.Release(*completed).ok());
    }
  }
  EXPECT_EQ(texts.size(), 1u) << "every plan must lead to the same text";
}

TEST_F(ServiceTest, EveryStrategyGivesTheSameCacheAndSparseMovesLeast) {
  Cluster& cluster = SharedCluster();
  std::map<v1::Strategy, v1::PrefillCompleted> results;
  for (const auto strategy : {v1::STRATEGY_RING, v1::STRATEGY_ALLGATHER, v1::STRATEGY_SPARSE}) {
    v1::PrefillRequest request = MakeRequest(RandomTokens(2, 4000));
    request.set_world_size(2);
    request.set_partition(v1::PARTITION_CONTIGUOUS);
    request.set_strategy(strategy);
    request.mutable_policy()->set_name("a_shape");
    (*request.mutable_policy()->mutable_parameters())["window_tokens"] = 512;
    const auto completed = cluster.Prefill(request);
    ASSERT_TRUE(completed.ok()) << completed.status();
    EXPECT_EQ(completed->plan().strategy(), strategy);
    ASSERT_TRUE(cluster.Release(*completed).ok());
    results[strategy] = *completed;
  }
  const v1::PrefillCompleted& sparse = results[v1::STRATEGY_SPARSE];
  for (const auto& [strategy, completed] : results) {
    EXPECT_EQ(completed.kv_digest(), sparse.kv_digest());
    EXPECT_EQ(completed.exchange_bytes_allgather(), sparse.exchange_bytes_allgather());
    if (strategy != v1::STRATEGY_SPARSE) {
      EXPECT_EQ(completed.exchange_bytes(), completed.exchange_bytes_allgather());
    }
  }
  EXPECT_GT(sparse.exchange_bytes(), 0u);
  EXPECT_LT(sparse.exchange_bytes(), sparse.exchange_bytes_allgather() / 2);
}

TEST_F(ServiceTest, BatchOfMixedLengthsGivesTheResultsOfSingleRuns) {
  Cluster& cluster = SharedCluster();
  v1::BatchPrefillRequest batch;
  std::vector<v1::PrefillRequest> singles;
  for (int i = 0; i < 50; ++i) {
    const int length = i < 2 ? 1 + 3999 * i : 1 + (i * i * 977) % 4000;
    singles.push_back(MakeRequest(RandomTokens(100 + static_cast<uint64_t>(i), length)));
    *batch.add_items() = singles.back();
  }

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(240));
  const auto reader = cluster.prefill().BatchPrefill(&context, batch);
  std::map<uint32_t, v1::PrefillCompleted> results;
  v1::BatchPrefillResponse event;
  while (reader->Read(&event)) {
    ASSERT_FALSE(event.response().has_failed()) << event.response().failed().error().message();
    if (event.response().has_completed()) {
      EXPECT_TRUE(results.emplace(event.item(), event.response().completed()).second)
          << "two terminal events";
    }
  }
  ASSERT_TRUE(reader->Finish().ok());

  ASSERT_EQ(results.size(), 50u);
  for (const auto& [item, result] : results) {
    const auto single = cluster.Prefill(singles[item]);
    ASSERT_TRUE(single.ok()) << single.status();
    EXPECT_EQ(result.first_token(), single->first_token()) << "item " << item;
    // The same plan on the same backend: not only within 1e-3, but bitwise.
    EXPECT_EQ(result.kv_digest(), single->kv_digest()) << "item " << item;
    ASSERT_TRUE(cluster.Release(*single).ok());
    ASSERT_TRUE(cluster.Release(result).ok());
  }
}

TEST_F(ServiceTest, BatchItemsFailOneByOne) {
  Cluster& cluster = SharedCluster();
  v1::BatchPrefillRequest batch;
  *batch.add_items() = MakeRequest(RandomTokens(3, 40));
  *batch.add_items() = MakeRequest({});
  *batch.add_items() = MakeRequest({1, 2, 256});

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  const auto reader = cluster.prefill().BatchPrefill(&context, batch);
  std::map<uint32_t, std::string> outcomes;
  v1::BatchPrefillResponse event;
  while (reader->Read(&event)) {
    if (event.response().has_completed()) {
      outcomes[event.item()] = "completed";
      EXPECT_TRUE(cluster.Release(event.response().completed()).ok());
    }
    if (event.response().has_failed()) {
      outcomes[event.item()] = ReasonName(ReasonOf(FromRpcStatus(event.response().failed().error())));
    }
  }

  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(outcomes, (std::map<uint32_t, std::string>{
                          {0, "completed"}, {1, "EMPTY_PROMPT"}, {2, "TOKEN_OUT_OF_RANGE"}}));
}

struct BadRequest {
  const char* name;
  void (*change)(v1::PrefillRequest*);
  absl::StatusCode code;
  v1::ErrorReason reason;
  const char* in_message;
};

const BadRequest kBadRequests[] = {
    {"empty prompt", [](v1::PrefillRequest* r) { r->clear_token_ids(); }, absl::StatusCode::kInvalidArgument,
     v1::ERROR_REASON_EMPTY_PROMPT, ""},
    {"token at vocab", [](v1::PrefillRequest* r) { r->set_token_ids(2, 256); },
     absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_TOKEN_OUT_OF_RANGE, "256"},
    {"prompt over the model's limit", [](v1::PrefillRequest* r) { r->mutable_token_ids()->Resize(65537, 1); },
     absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_PROMPT_TOO_LONG, "65537"},
    {"unknown policy", [](v1::PrefillRequest* r) { r->mutable_policy()->set_name("magic"); },
     absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_UNKNOWN_POLICY, "magic"},
    {"bad policy parameter",
     [](v1::PrefillRequest* r) {
       r->mutable_policy()->set_name("a_shape");
       (*r->mutable_policy()->mutable_parameters())["window_tokens"] = -5;
     },
     absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_POLICY_PARAMETER, "-5"},
    {"unknown decode node", [](v1::PrefillRequest* r) { r->set_decode_node("10.0.0.1:80"); },
     absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_DECODE_NODE, "10.0.0.1:80"},
    {"unknown model", [](v1::PrefillRequest* r) { r->set_model("gpt-9"); }, absl::StatusCode::kNotFound,
     v1::ERROR_REASON_UNKNOWN_MODEL, "gpt-9"},
    {"quality", [](v1::PrefillRequest* r) { r->mutable_quality()->set_min_recall(0.9); },
     absl::StatusCode::kUnimplemented, v1::ERROR_REASON_NOT_IMPLEMENTED, "quality"},
    {"quality out of range", [](v1::PrefillRequest* r) { r->mutable_quality()->set_min_recall(1.5); },
     absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD, "1.5"},
    {"request id", [](v1::PrefillRequest* r) { r->set_request_id("no spaces allowed"); },
     absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_REQUEST_ID, ""},
};

TEST_F(ServiceTest, BadRequestsAreRefusedWithReasonAndValueAndDisturbNothing) {
  Cluster& cluster = SharedCluster();
  for (const BadRequest& bad : kBadRequests) {
    v1::PrefillRequest request = MakeRequest(RandomTokens(4, 50));
    bad.change(&request);
    const auto result = cluster.Prefill(request);
    EXPECT_EQ(result.status().code(), bad.code) << bad.name << ": " << result.status();
    EXPECT_EQ(ReasonName(ReasonOf(result.status())), ReasonName(bad.reason))
        << bad.name << ": " << result.status();
    EXPECT_TRUE(absl::StrContains(result.status().message(), bad.in_message))
        << bad.name << ": " << result.status();
  }
  const auto good = cluster.Prefill(MakeRequest(RandomTokens(4, 50)));
  ASSERT_TRUE(good.ok()) << good.status();
  EXPECT_TRUE(cluster.Release(*good).ok());
}

TEST_F(ServiceTest, RepeatedIdReturnsTheResultAndOtherContentIsAConflict) {
  Cluster& cluster = SharedCluster();
  v1::PrefillRequest request = MakeRequest(RandomTokens(5, 300));
  request.set_request_id("twice");
  const auto first = cluster.Prefill(request);
  ASSERT_TRUE(first.ok()) << first.status();

  const auto second = cluster.Prefill(request);
  request.add_token_ids(7);
  const auto conflict = cluster.Prefill(request);

  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->session_id(), first->session_id()) << "one execution";
  EXPECT_EQ(conflict.status().code(), absl::StatusCode::kAlreadyExists) << conflict.status();
  EXPECT_EQ(ReasonOf(conflict.status()), v1::ERROR_REASON_REQUEST_ID_CONFLICT);
  EXPECT_TRUE(cluster.Release(*first).ok());
}

TEST_F(ServiceTest, CancelledRequestsEndAndLeaveNothingBehind) {
  Cluster& cluster = SharedCluster();
  v1::PrefillRequest request = MakeRequest(RandomTokens(6, 30000));
  request.set_request_id("cancel-me");
  bool asked = false;

  const auto result = cluster.Prefill(request, [&](const v1::PrefillResponse& event) {
    if (!event.has_progress() || asked) return;
    asked = true;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::CancelPrefillRequest cancel;
    cancel.set_request_id("cancel-me");
    v1::CancelPrefillResponse response;
    const absl::Status status = FromGrpcStatus(cluster.prefill().CancelPrefill(&context, cancel, &response));
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_TRUE(response.cancelled());
  });

  EXPECT_TRUE(asked) << "no progress event came";
  EXPECT_EQ(result.status().code(), absl::StatusCode::kCancelled) << result.status();
  const auto after = cluster.Prefill(MakeRequest(RandomTokens(7, 2000)));
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_TRUE(cluster.Release(*after).ok());
}

TEST_F(ServiceTest, ADisconnectingClientCancelsItsRequest) {
  Cluster& cluster = SharedCluster();
  v1::PrefillRequest request = MakeRequest(RandomTokens(8, 30000));
  request.set_request_id("walk-away");
  {
    grpc::ClientContext context;
    const auto reader = cluster.prefill().Prefill(&context, request);
    v1::PrefillResponse event;
    while (reader->Read(&event) && !event.has_progress()) {
    }
    context.TryCancel();
    reader->Finish();
  }
  const absl::Time end = absl::Now() + absl::Seconds(20);
  double running = 1;
  while (running != 0 && absl::Now() < end) {
    running = ReadMetric(cluster.coordinator_metrics_port(), "headwater_requests_running");
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_EQ(running, 0) << "the request goes on without a client";
}

TEST_F(ServiceTest, NothingLeaksWhenAllIsReleased) {
  Cluster& cluster = SharedCluster();
  const absl::Time end = absl::Now() + absl::Seconds(10);
  double active = -1;
  double committed = -1;
  double unacked = -1;
  while ((active != 0 || committed != 0 || unacked != 0) && absl::Now() < end) {
    active = ReadMetric(cluster.decode_metrics_port(), "headwater_kv_pool_bytes{state=\"active\"}");
    committed = ReadMetric(cluster.decode_metrics_port(), "headwater_kv_pool_bytes{state=\"committed\"}");
    unacked = ReadMetric(cluster.worker_metrics_port(0), "headwater_kv_unacked_bytes") +
              ReadMetric(cluster.worker_metrics_port(1), "headwater_kv_unacked_bytes");
    absl::SleepFor(absl::Milliseconds(50));
  }
  EXPECT_EQ(active, 0);
  EXPECT_EQ(committed, 0) << "every session of the tests above was released";
  EXPECT_EQ(unacked, 0);
}

}  // namespace
}  // namespace headwater::testing
