// What the live page gets to know of the scheduler, and how that is written.
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "base/rpc/grpc_status.h"
#include "coordinator/page/snapshot_json.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

using nlohmann::json;

json StateOf(const FakeCluster& cluster, const SnapshotLimits& limits = {}) {
  return json::parse(SnapshotJson(cluster.scheduler.TakeSnapshot(limits)));
}

void Say(FakeCluster* cluster, const std::string& id, v1::RankProgress progress) {
  const PlayedWorker& worker = cluster->worker(id);
  progress.set_request_id(worker.assignment.request_id());
  progress.set_epoch(worker.assignment.epoch());
  progress.set_rank(worker.assignment.rank());
  v1::ConnectRequest message;
  *message.mutable_progress() = std::move(progress);
  cluster->scheduler.OnWorkerMessage(worker.connection, message);
}

v1::RankProgress Layers(uint32_t done, const std::vector<float>& densities,
                        const std::vector<float>& recalls) {
  v1::RankProgress progress;
  progress.set_layers_done(done);
  progress.set_bytes_acked(1000);
  progress.set_bytes_total(4000);
  progress.mutable_layer_densities()->Add(densities.begin(), densities.end());
  progress.mutable_layer_recalls()->Add(recalls.begin(), recalls.end());
  return progress;
}

// One worker, one decode node, and a request that runs.
class PageSnapshotTest : public ::testing::Test {
 protected:
  void Start(const v1::PrefillRequest& request) {
    cluster_.AddDecodeNode();
    cluster_.AddWorker("w0");
    watcher_ = cluster_.Submit(request);
    cluster_.decode.AnswerAll();
    cluster_.TakeAssignment("w0");
  }
  json Running() { return StateOf(cluster_)["running"]["items"].at(0); }

  FakeCluster cluster_;
  std::shared_ptr<RecordingWatcher> watcher_;
};

TEST_F(PageSnapshotTest, AnEmptyClusterHasNothing) {
  const json state = StateOf(cluster_);
  for (const char* list : {"workers", "decode_nodes", "running", "waiting", "ended", "lost_workers"}) {
    EXPECT_EQ(state[list]["total"], 0) << list;
    EXPECT_EQ(state[list]["items"], json::array()) << list;
  }
  EXPECT_EQ(state["draining"], false);
}

TEST_F(PageSnapshotTest, ARunningRequestTellsLayersDensityRecallAndKv) {
  Start(MakeRequest("r", 100));
  cluster_.Advance(absl::Seconds(1));
  Say(&cluster_, "w0", Layers(2, {1, 0.25}, {-1, 0.5}));
  cluster_.Advance(absl::Seconds(1));

  const json running = Running();
  EXPECT_EQ(running["id"], "r");
  EXPECT_EQ(running["phase"], "running");
  EXPECT_EQ(running["tokens"], 100);
  EXPECT_EQ(running["layers_done"], 2);
  EXPECT_EQ(running["layers"], 4);
  EXPECT_EQ(running["in_epoch_s"], 2.0);
  EXPECT_EQ(running["eta_s"], 2.0);
  EXPECT_EQ(running["tokens_per_second"], 25.0);
  EXPECT_EQ(running["bytes_acked"], 1000);
  EXPECT_EQ(running["decode_node"], "d0");
  EXPECT_EQ(running["ranks"].at(0)["worker"], "w0");
  EXPECT_EQ(running["map"]["rows"].at(0)["name"], "w0");
  EXPECT_EQ(running["map"]["rows"].at(0)["density"], json({1.0, 0.25}));
  EXPECT_EQ(running["map"]["rows"].at(0)["recall"], json({nullptr, 0.5}));
}

TEST_F(PageSnapshotTest, LayersThatCannotBeTrueAreDropped) {
  Start(MakeRequest("r", 100));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  uint32_t done = 0;
  for (const std::vector<float>& densities :
       {std::vector<float>(5, 0.5f), {1.5f}, {-0.5f}, {nan}, std::vector<float>(100'000, 1.0f)}) {
    Say(&cluster_, "w0", Layers(++done > 4 ? 4 : done, densities, {}));
    EXPECT_EQ(Running()["map"]["rows"].at(0)["density"], json::array());
  }
  Say(&cluster_, "w0", Layers(4, {1, 1}, {0.5f}));
  EXPECT_EQ(Running()["map"]["rows"].at(0)["density"], json({1.0, 1.0}));
  EXPECT_EQ(Running()["map"]["rows"].at(0)["recall"], json::array());
}

TEST_F(PageSnapshotTest, WorkersAreIdleBusyDrainingOrSilent) {
  Start(MakeRequest("r", 100));
  cluster_.AddWorker("w1");
  cluster_.AddWorker("w2");
  cluster_.AddWorker("w3").muted = true;
  cluster_.Submit(MakeRequest("drained", 50));
  cluster_.decode.AnswerAll();
  std::string drained = cluster_.HasMessage("w1") ? "w1" : cluster_.HasMessage("w2") ? "w2" : "w3";
  cluster_.TakeAssignment(drained);
  cluster_.Fail(drained, MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING, "goodbye"));
  cluster_.Advance(absl::Seconds(3));

  const json state = StateOf(cluster_);
  std::map<std::string, std::string> states;
  for (const json& worker : state["workers"]["items"]) states[worker["id"]] = worker["state"];
  EXPECT_EQ(states["w0"], "busy");
  EXPECT_EQ(states[drained], drained == "w3" ? "silent" : "draining");
  EXPECT_EQ(states["w3"], "silent");
  EXPECT_EQ(state["workers_silent"], 1);
  EXPECT_EQ(state["workers_draining"], 1);
  // They want attention.
  EXPECT_NE(state["workers"]["items"].at(0)["state"], "busy");
  EXPECT_NE(state["workers"]["items"].at(0)["state"], "idle");
}

TEST_F(PageSnapshotTest, ALostWorkerIsRemembered) {
  Start(MakeRequest("r", 100));
  cluster_.Disconnect("w0");
  cluster_.Advance(absl::Seconds(5));
  const json state = StateOf(cluster_);
  EXPECT_EQ(state["workers"]["total"], 0);
  EXPECT_EQ(state["lost_workers"]["items"].at(0)["id"], "w0");
  EXPECT_EQ(state["lost_workers"]["items"].at(0)["ago_s"], 5.0);
  EXPECT_EQ(state["retries_total"], 1);
  EXPECT_EQ(state["waiting"]["items"].at(0)["id"], "r");
  for (int i = 0; i < 20; ++i) {
    cluster_.AddWorker("w0");
    cluster_.Disconnect("w0");
  }
  EXPECT_EQ(StateOf(cluster_)["lost_workers"]["items"].size(), 8u);
}

TEST_F(PageSnapshotTest, AnEndedRequestKeepsItsMapByKvHeadWhereTheWorkerKnowsIt) {
  Start(MakeRequest("r", 100));
  v1::RankCompleted completed = cluster_.CompletionOf("w0");
  for (uint32_t layer = 0; layer < 3; ++layer) {
    v1::AttentionGroup* const group = completed.mutable_attention()->add_groups();
    group->set_layer(layer);
    if (layer > 0) group->set_kv_head(1);
    group->set_density(0.5);
    if (layer == 2) group->set_recall(0.75);
  }
  cluster_.Complete("w0", completed);
  cluster_.decode.AnswerAll();
  ASSERT_TRUE(watcher_->ended());

  const json state = StateOf(cluster_);
  const json ended = state["ended"]["items"].at(0);
  EXPECT_EQ(ended["code"], "OK");
  EXPECT_EQ(ended["map"]["rows"].at(1)["name"], "KV head 1");
  // Layer 0 was told of all heads, the last layer of none.
  EXPECT_EQ(ended["map"]["rows"].at(0)["density"], json({0.5, nullptr, nullptr, nullptr}));
  EXPECT_EQ(ended["map"]["rows"].at(1)["density"], json({0.5, 0.5, 0.5, nullptr}));
  EXPECT_EQ(ended["map"]["rows"].at(1)["recall"], json({nullptr, nullptr, 0.75, nullptr}));
  EXPECT_EQ(state["completed_total"], 1);
  EXPECT_EQ(state["tokens_total"], 100);
}

TEST_F(PageSnapshotTest, ListsAreBoundedAndSayWhatIsLeftOut) {
  for (int i = 0; i < 5; ++i) cluster_.AddDecodeNode(absl::StrCat("d", i));
  for (int i = 0; i < 20; ++i) cluster_.AddWorker(absl::StrCat("w", i));
  for (int i = 0; i < 60; ++i) cluster_.Submit(MakeRequest(absl::StrCat("r", i), 100));
  cluster_.decode.AnswerAll();
  for (int i = 0; i < 20; ++i) {
    cluster_.TakeAssignment(absl::StrCat("w", i));
    Say(&cluster_, absl::StrCat("w", i), Layers(4, {1, 1, 1, 1}, {}));
  }
  const json state =
      StateOf(cluster_, {.workers = 7, .decode_nodes = 2, .running = 6, .waiting = 5, .cells = 10});
  for (const auto& [list, total, kept] : std::vector<std::tuple<std::string, int, int>>{
           {"workers", 20, 7}, {"decode_nodes", 5, 2}, {"running", 20, 6}, {"waiting", 40, 5}}) {
    EXPECT_EQ(state[list]["total"], total) << list;
    EXPECT_EQ(state[list]["items"].size(), kept) << list;
    EXPECT_EQ(state[list]["left_out"], total - kept) << list;
  }
  EXPECT_EQ(state["workers_busy"], 20);
  // Two maps of four cells have room.
  EXPECT_EQ(state["running"]["items"].at(1)["map"]["left_out"], false);
  EXPECT_EQ(state["running"]["items"].at(2)["map"]["left_out"], true);
  EXPECT_EQ(state["running"]["items"].at(2)["map"]["rows"], json::array());
}

TEST_F(PageSnapshotTest, NeitherTokensNorTokensOfSessionsAreTold) {
  v1::PrefillRequest request = MakeRequest("r", 4);
  for (int i = 0; i < 4; ++i) request.set_token_ids(i, static_cast<uint32_t>(201 + i));
  Start(request);
  const std::string written = SnapshotJson(cluster_.scheduler.TakeSnapshot({}));
  for (const char* token : {"201", "202", "203", "204"})
    EXPECT_FALSE(absl::StrContains(written, token)) << written;
  const auto& destination = cluster_.worker("w0").assignment.destination();
  ASSERT_FALSE(destination.session_token().empty());
  EXPECT_FALSE(absl::StrContains(written, "session_token"));
  EXPECT_FALSE(absl::StrContains(written, destination.session_id()));
  EXPECT_FALSE(absl::StrContains(written, "kv:7080")) << "addresses are not told either";
}

TEST(SnapshotJsonTest, TextIsEscapedAndCut) {
  Snapshot snapshot;
  WorkerView worker;
  worker.id = "</script><img src=x onerror=alert(1)>\"'\\\n\x01\x7f\xff\xe2\x80\xa8";
  worker.device = std::string(100'000, 'x');
  snapshot.workers.push_back(worker);
  snapshot.workers_total = 1;
  const std::string written = SnapshotJson(snapshot);
  EXPECT_LT(written.size(), 4000u);
  for (const char c : written) EXPECT_TRUE(c >= 0x20 && c < 0x7f) << static_cast<int>(c);
  const json back = json::parse(written)["workers"]["items"].at(0);
  EXPECT_EQ(back["id"], "</script><img src=x onerror=alert(1)>\"'\\\n\x01\x7f\xef\xbf\xbd\xe2\x80\xa8");
  EXPECT_EQ(back["device"], std::string(256, 'x'));
}

TEST(SnapshotJsonTest, WhatIsNoNumberIsNull) {
  Snapshot snapshot;
  RunningView running;
  running.tokens_per_second = std::numeric_limits<double>::infinity();
  running.density = std::numeric_limits<double>::quiet_NaN();
  running.in_epoch = absl::InfiniteDuration();
  snapshot.running.push_back(running);
  const json back = json::parse(SnapshotJson(snapshot))["running"]["items"].at(0);
  for (const char* field : {"tokens_per_second", "density", "in_epoch_s", "eta_s", "recall", "time_left_s"}) {
    EXPECT_TRUE(back[field].is_null()) << field << back[field];
  }
}

// 1,000 requests: 100 run on a worker of 80 layers each with density and recall of all layers, the others
// wait.
TEST(SnapshotCostTest, AThousandRequests) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  for (int i = 0; i < 100; ++i) {
    v1::WorkerRegistration registration = MakeWorker(absl::StrCat("w", i));
    registration.mutable_model()->set_num_layers(80);
    cluster.AddWorker(registration);
  }
  for (int i = 0; i < 1000; ++i) cluster.Submit(MakeRequest(absl::StrCat("request-", i), 100));
  cluster.decode.AnswerAll();
  for (int i = 0; i < 100; ++i) {
    const std::string id = absl::StrCat("w", i);
    cluster.TakeAssignment(id);
    Say(&cluster, id, Layers(80, std::vector<float>(80, 0.123f), std::vector<float>(80, 0.987f)));
  }
  absl::Duration taking = absl::InfiniteDuration(), writing = absl::InfiniteDuration();
  size_t size = 0;
  for (int i = 0; i < 10; ++i) {
    const absl::Time start = Clock::Real()->Now();
    const Snapshot snapshot = cluster.scheduler.TakeSnapshot({});
    const absl::Time taken = Clock::Real()->Now();
    size = SnapshotJson(snapshot).size();
    taking = std::min(taking, taken - start);
    writing = std::min(writing, Clock::Real()->Now() - taken);
    ASSERT_EQ(snapshot.running_total + snapshot.waiting_total, 1000u);
    ASSERT_EQ(snapshot.running.back().map.cells(), 160u);
  }
  RecordProperty("taking_us", static_cast<int>(absl::ToInt64Microseconds(taking)));
  std::printf("1000 requests: %s on the scheduler's thread, %s to write %zu bytes\n",
              absl::FormatDuration(taking).c_str(), absl::FormatDuration(writing).c_str(), size);
  EXPECT_LT(size, size_t{1} << 20);
  // Of a scheduler that ticks each 50 ms; sanitized builds are an order slower than this is quick.
  EXPECT_LT(taking, absl::Milliseconds(25));
}

}  // namespace
}  // namespace headwater::testing
