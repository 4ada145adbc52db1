// The plain data of the coordinator: registrations, cluster, destinations, requests, events, sums.
#include <cmath>
#include <limits>
#include <utility>

#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "coordinator/cluster_state.h"
#include "coordinator/destination.h"
#include "coordinator/event_queue.h"
#include "coordinator/registration.h"
#include "coordinator/request_table.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

TEST(RegistrationTest, RefusesWorkersThatCannotBe) {
  EXPECT_TRUE(CheckRegistration(MakeWorker("w")).ok());
  const std::vector<std::pair<const char*, void (*)(v1::WorkerRegistration*)>> changes = {
      {"protocol", [](auto* r) { r->set_protocol_version(99); }},
      {"no id", [](auto* r) { r->set_worker_id(""); }},
      {"bad id", [](auto* r) { r->set_worker_id("a b"); }},
      {"no incarnation", [](auto* r) { r->set_incarnation(""); }},
      {"no address", [](auto* r) { r->set_rendezvous_address(""); }},
      {"no port", [](auto* r) { r->set_rendezvous_address("host:"); }},
      {"port over 65535", [](auto* r) { r->set_rendezvous_address("host:65536"); }},
      {"no host", [](auto* r) { r->set_rendezvous_address(":80"); }},
      {"no device", [](auto* r) { r->set_device(""); }},
      {"no model", [](auto* r) { r->clear_model(); }},
      {"model name with space", [](auto* r) { r->mutable_model()->set_name("a b"); }},
      {"no fingerprint", [](auto* r) { r->mutable_model()->set_fingerprint(""); }},
      {"vocab 0", [](auto* r) { r->mutable_model()->set_vocab_size(0); }},
      {"vocab too large", [](auto* r) { r->mutable_model()->set_vocab_size((1 << 24) + 1); }},
      {"positions 0", [](auto* r) { r->mutable_model()->set_max_position(0); }},
      {"layers 0", [](auto* r) { r->mutable_model()->set_num_layers(0); }},
      {"layers 4097", [](auto* r) { r->mutable_model()->set_num_layers(4097); }},
      {"heads 4097", [](auto* r) { r->mutable_model()->set_num_kv_heads(4097); }},
      {"head_dim 4097", [](auto* r) { r->mutable_model()->set_head_dim(4097); }},
      {"budget 0", [](auto* r) { r->mutable_memory()->set_budget_bytes(0); }},
      {"weights over budget", [](auto* r) { r->mutable_memory()->set_weight_bytes(1'000'000'001); }},
      {"tokens cost nothing", [](auto* r) { r->mutable_memory()->set_bytes_per_token(0); }},
      {"tokens of a group cost too much",
       [](auto* r) { r->mutable_memory()->set_group_bytes_per_token((uint64_t{1} << 32) + 1); }},
      {"fixed bytes without bound", [](auto* r) { r->mutable_memory()->set_fixed_bytes(UINT64_MAX); }},
      {"no policy", [](auto* r) { r->clear_policies(); }},
      {"bad policy", [](auto* r) { r->add_policies("\x01"); }},
      {"another default policy", [](auto* r) { r->set_default_policy("magic"); }},
      {"bytes of a prompt's token",
       [](auto* r) { r->mutable_memory()->set_group_bytes_per_prompt_token((uint64_t{1} << 32) + 1); }},
      {"an unknown strategy", [](auto* r) { r->add_strategies(v1::STRATEGY_UNSPECIFIED); }},
      {"limits of another policy", [](auto* r) { r->add_policy_limits()->set_name("magic"); }},
      {"packs one prompt",
       [](auto* r) {
         r->set_max_packed_prompts(1);
         r->set_max_packed_tokens(100);
       }},
      {"packs prompts without tokens", [](auto* r) { r->set_max_packed_prompts(2); }},
      {"packs tokens without prompts", [](auto* r) { r->set_max_packed_tokens(100); }},
      {"packs 257 prompts",
       [](auto* r) {
         r->set_max_packed_prompts(257);
         r->set_max_packed_tokens(100);
       }},
      {"packs too many tokens",
       [](auto* r) {
         r->set_max_packed_prompts(2);
         r->set_max_packed_tokens((1 << 20) + 1);
       }},
      {"hidden size too large", [](auto* r) { r->mutable_model()->set_hidden_size((1 << 24) + 1); }},
      {"query heads 4097", [](auto* r) { r->mutable_model()->set_num_q_heads(4097); }},
      {"intermediate size too large",
       [](auto* r) { r->mutable_model()->set_intermediate_size((1 << 24) + 1); }},
      {"exchange bytes too many",
       [](auto* r) { r->mutable_rates()->set_exchange_bytes_per_token((1 << 24) + 1); }},
  };
  for (const auto& [name, change] : changes) {
    auto registration = MakeWorker("w");
    change(&registration);
    EXPECT_EQ(ReasonOf(CheckRegistration(registration)), v1::ERROR_REASON_BAD_FIELD) << name;
  }
}

TEST(RegistrationTest, RatesAreFiniteAndWithinTheirBounds) {
  using Set = void (v1::ComputeRates::*)(double);
  const auto check = [](Set set, double value) {
    auto registration = MakeWorker("w");
    (registration.mutable_rates()->*set)(value);
    return CheckRegistration(registration);
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const auto& [set, most] : {std::pair<Set, double>(&v1::ComputeRates::set_linear_flops, 1e18),
                                  {&v1::ComputeRates::set_attention_flops, 1e18},
                                  {&v1::ComputeRates::set_link_bytes_per_s, 1e18},
                                  {&v1::ComputeRates::set_egress_bytes_per_s, 1e18},
                                  {&v1::ComputeRates::set_exchange_step_s, 60},
                                  {&v1::ComputeRates::set_group_start_s, 60}}) {
    for (const double good : {0.0, 1.0, most}) EXPECT_TRUE(check(set, good).ok()) << good;
    for (const double bad : {-1.0, most * 1.01, kInfinity, -kInfinity, std::nan("")}) {
      EXPECT_EQ(ReasonOf(check(set, bad)), v1::ERROR_REASON_BAD_FIELD) << bad << " of " << most;
    }
  }
  EXPECT_FALSE(check(&v1::ComputeRates::set_linear_flops, 1e-300).ok());
  EXPECT_EQ(check(&v1::ComputeRates::set_linear_flops, -5).message(),
            "registration: rates.linear_flops is -5; 0 or 1 to 1e+18 is wanted");
}

TEST(RegistrationTest, TakesAPackedPassUpToItsLimits) {
  for (const auto& [prompts, tokens] : {std::pair(2u, 1u), std::pair(256u, 1u << 20)}) {
    auto registration = MakeWorker("w");
    registration.set_max_packed_prompts(prompts);
    registration.set_max_packed_tokens(tokens);
    EXPECT_TRUE(CheckRegistration(registration).ok()) << prompts;
  }
}

TEST(RegistrationTest, RefusesDecodeNodesThatCannotBe) {
  EXPECT_TRUE(CheckRegistration(MakeDecodeNode("d")).ok());
  const std::vector<std::pair<const char*, void (*)(v1::DecodeRegistration*)>> changes = {
      {"protocol", [](auto* r) { r->set_protocol_version(0); }},
      {"no id", [](auto* r) { r->set_decode_node(""); }},
      {"no incarnation", [](auto* r) { r->set_incarnation(""); }},
      {"bad pool", [](auto* r) { r->set_pool("a/b"); }},
      {"no kv address", [](auto* r) { r->set_kv_address(""); }},
      {"no decode address", [](auto* r) { r->set_decode_address("x"); }},
      {"no fingerprint", [](auto* r) { r->set_model_fingerprint(""); }},
      {"no dtype", [](auto* r) { r->clear_kv_dtypes(); }},
      {"unspecified dtype", [](auto* r) { r->add_kv_dtypes(v1::KV_DTYPE_UNSPECIFIED); }},
      {"budget 0", [](auto* r) { r->set_kv_budget_bytes(0); }},
  };
  for (const auto& [name, change] : changes) {
    auto registration = MakeDecodeNode("d");
    change(&registration);
    EXPECT_EQ(ReasonOf(CheckRegistration(registration)), v1::ERROR_REASON_BAD_FIELD) << name;
  }
  auto poolless = MakeDecodeNode("d", "");
  EXPECT_TRUE(CheckRegistration(poolless).ok());
}

Worker WorkerOf(const v1::WorkerRegistration& registration) {
  Worker worker;
  worker.registration = registration;
  return worker;
}

TEST(ClusterStateTest, PoliciesOfAModelAreThoseThatSomeOfItsWorkersHave) {
  ClusterState cluster;
  auto other = MakeWorker("w1");
  other.clear_policies();
  other.add_policies("flash");
  other.add_policies("dense");
  ASSERT_TRUE(cluster.AddWorker(WorkerOf(MakeWorker("w0"))).ok());
  EXPECT_EQ(cluster.FindModel("tiny")->policies, (std::vector<std::string>{"a_shape", "dense"}));
  ASSERT_TRUE(cluster.AddWorker(WorkerOf(other)).ok());
  EXPECT_EQ(cluster.FindModel("tiny")->policies, (std::vector<std::string>{"a_shape", "dense", "flash"}));
  EXPECT_FALSE(cluster.FindModel("huge").has_value());
}

TEST(ClusterStateTest, WhatARequestGetsThatNamesNoPolicyIsWhatAllWorkersHave) {
  ClusterState cluster;
  const auto add = [&](const std::string& id, const std::string& by_default, uint64_t dense_below) {
    auto worker = MakeWorker(id);
    worker.add_policies("headwater");
    worker.set_default_policy(by_default);
    worker.set_serves_quality(true);
    v1::PolicyLimit* const limit = worker.add_policy_limits();
    limit->set_name("headwater");
    limit->set_max_tokens(5000);
    limit->set_dense_below_tokens(dense_below);
    ASSERT_TRUE(cluster.AddWorker(WorkerOf(worker)).ok());
  };
  add("w0", "headwater", 8192);
  add("w1", "headwater", 4096);
  EXPECT_EQ(cluster.FindModel("tiny")->default_policy, "headwater");
  EXPECT_EQ(cluster.FindModel("tiny")->dense_below.at("headwater"), 4096u);
  EXPECT_EQ(cluster.FindModel("tiny")->dense_below.at("dense"), UINT64_MAX);
  EXPECT_TRUE(cluster.FindModel("tiny")->serves_quality);
  EXPECT_EQ(cluster.LivingWorkers({"tiny", "headwater"})[0].max_tokens, 5000u);
  EXPECT_EQ(cluster.LivingWorkers({"tiny", "headwater", false, false})[0].max_tokens, 0u);
  EXPECT_EQ(cluster.LivingWorkers({"tiny", "dense"})[0].max_tokens, 0u);

  ASSERT_TRUE(cluster.AddWorker(WorkerOf(MakeWorker("w2"))).ok());
  EXPECT_EQ(cluster.FindModel("tiny")->default_policy, "dense");
  EXPECT_EQ(cluster.FindModel("tiny")->dense_below.at("headwater"), 4096u) << "w2 does not have it";
  EXPECT_TRUE(cluster.FindModel("tiny")->serves_quality) << "two of three do";
}

TEST(ClusterStateTest, APolicyMayHaveSmallerGroups) {
  ClusterState cluster;
  auto worker = MakeWorker("w0");
  worker.set_max_world_size(8);
  worker.add_policies("headwater");
  worker.add_policy_limits()->set_name("headwater");
  worker.mutable_policy_limits(0)->set_max_world_size(1);
  ASSERT_TRUE(cluster.AddWorker(WorkerOf(worker)).ok());
  EXPECT_EQ(cluster.LivingWorkers({"tiny", "headwater"})[0].max_world_size, 1u);
  EXPECT_EQ(cluster.LivingWorkers({"tiny", "headwater", false, false})[0].max_world_size, 1u);
  EXPECT_EQ(cluster.LivingWorkers({"tiny", "dense"})[0].max_world_size, 8u);
}

TEST(ClusterStateTest, HandsOutWorkersThatHaveWhatIsNeeded) {
  ClusterState cluster;
  auto searches = MakeWorker("searches"), serves = MakeWorker("serves");
  searches.add_policies("headwater");
  serves.add_policies("headwater");
  serves.set_serves_quality(true);
  for (const auto& registration : {MakeWorker("plain"), searches, serves}) {
    ASSERT_TRUE(cluster.AddWorker(WorkerOf(registration)).ok());
  }
  const auto ids = [&](const WorkerNeeds& needs) {
    std::vector<std::string> all;
    for (const PlanWorker& worker : cluster.LivingWorkers(needs)) all.push_back(worker.worker_id);
    EXPECT_EQ(cluster.FreeWorkers(needs, nullptr).size(), all.size());
    return all;
  };
  EXPECT_EQ(ids({"tiny", "dense"}), (std::vector<std::string>{"plain", "searches", "serves"}));
  EXPECT_EQ(ids({"tiny", "headwater"}), (std::vector<std::string>{"searches", "serves"}));
  EXPECT_EQ(ids({"tiny", "headwater", true}), std::vector<std::string>{"serves"});
  EXPECT_TRUE(ids({"huge", "dense"}).empty());
}

TEST(ClusterStateTest, OneNameMeansOneModel) {
  ClusterState cluster;
  auto other = MakeWorker("w1");
  other.mutable_model()->set_fingerprint("sha256:other");
  ASSERT_TRUE(cluster.AddWorker(WorkerOf(MakeWorker("w0"))).ok());
  EXPECT_EQ(ReasonOf(cluster.AddWorker(WorkerOf(other))), v1::ERROR_REASON_MODEL_MISMATCH);
  EXPECT_EQ(cluster.workers().size(), 1u);
  cluster.RemoveWorker("w0");
  EXPECT_TRUE(cluster.AddWorker(WorkerOf(other)).ok()) << "once the old model is gone";
  EXPECT_TRUE(cluster.WasServed("tiny"));
}

TEST(ClusterStateTest, AWorkerThatDoesNotStateTheShapeServesTheSameModel) {
  ClusterState cluster;
  v1::WorkerRegistration stated = MakeWorker("new"), old = MakeWorker("old");
  for (v1::WorkerRegistration* const one : {&stated, &old}) {
    one->mutable_model()->clear_hidden_size();
    one->mutable_model()->clear_num_q_heads();
    one->mutable_model()->clear_intermediate_size();
  }
  stated.mutable_model()->set_hidden_size(4096);
  stated.mutable_model()->set_num_q_heads(32);
  stated.mutable_model()->set_intermediate_size(14336);
  EXPECT_TRUE(cluster.AddWorker(WorkerOf(old)).ok());
  EXPECT_TRUE(cluster.AddWorker(WorkerOf(stated)).ok());
  // Nor does a later version's that states more.
  v1::WorkerRegistration later = MakeWorker("later");
  *later.mutable_model() = stated.model();
  later.mutable_model()->GetReflection()->MutableUnknownFields(later.mutable_model())->AddVarint(999, 7);
  EXPECT_TRUE(cluster.AddWorker(WorkerOf(later)).ok());
  // What is stated must be the same.
  stated.set_worker_id("other");
  stated.mutable_model()->set_hidden_size(2048);
  EXPECT_EQ(ReasonOf(cluster.AddWorker(WorkerOf(stated))), v1::ERROR_REASON_MODEL_MISMATCH);
}

TEST(ClusterStateTest, HandsOutTheLongestIdleWorkerFirstAndNoDrainingOne) {
  ClusterState cluster;
  for (const char* id : {"a", "b", "c", "d"}) {
    ASSERT_TRUE(cluster.AddWorker(WorkerOf(MakeWorker(id))).ok());
  }
  cluster.FindWorker("a")->idle_since = absl::FromUnixSeconds(9);
  cluster.FindWorker("b")->idle_since = absl::FromUnixSeconds(3);
  const uint64_t version = cluster.version();
  cluster.SetDraining(cluster.FindWorker("c"));
  EXPECT_NE(cluster.version(), version);
  cluster.FindWorker("d")->Hold("r", {1, 1, 10, false});
  const auto idle = cluster.FreeWorkers({"tiny", "dense"}, nullptr);
  ASSERT_EQ(idle.size(), 2u);
  EXPECT_EQ(idle[0].worker_id, "b");
  EXPECT_EQ(idle[1].worker_id, "a");
  EXPECT_EQ(cluster.LivingWorkers({"tiny", "dense"}).size(), 3u);
}

TEST(ClusterStateTest, AWorkerHoldsTwoPassesOfPackablePromptsOrOneOther) {
  Worker worker = WorkerOf(MakeWorker("w"));
  worker.registration.set_max_packed_prompts(2);
  worker.registration.set_max_packed_tokens(100);
  EXPECT_TRUE(worker.HasRoomFor({"a", 100}));
  EXPECT_FALSE(worker.HasRoomFor({"a", 101})) << "more than a pass";
  worker.Hold("a", {1, 1, 100, true});
  EXPECT_FALSE(worker.HasRoomFor({"a", 1})) << "another tenant's request of that name";
  worker.Hold("b", {2, 1, 60, true});
  EXPECT_TRUE(worker.HasRoomFor({"c", 40}));
  EXPECT_FALSE(worker.HasRoomFor({"c", 41}));
  worker.Hold("c", {3, 1, 20, true});
  worker.Hold("d", {4, 1, 10, true});
  EXPECT_FALSE(worker.HasRoomFor({"e", 1})) << "four prompts are two passes";

  EXPECT_FALSE(worker.Release("a", 2, absl::Now())) << "not its serial";
  for (const auto& [id, serial] :
       {std::pair("a", 1), std::pair("b", 2), std::pair("c", 3), std::pair("d", 4)}) {
    EXPECT_TRUE(worker.Release(id, static_cast<uint64_t>(serial), absl::FromUnixSeconds(serial))) << id;
  }
  EXPECT_EQ(worker.held_tokens, 0u);
  EXPECT_EQ(worker.idle_since, absl::FromUnixSeconds(4));
  worker.Hold("long", {5, 1, 4000, false});
  EXPECT_FALSE(worker.HasRoomFor({"a", 1})) << "it has a prompt that runs alone";
}

TEST(ClusterStateTest, PrefersTheWorkerThatHoldsTheFewestTokens) {
  ClusterState cluster;
  for (const char* id : {"a", "b", "c", "alone"}) {
    auto registration = MakeWorker(id);
    if (std::string(id) != "alone") {
      registration.set_max_packed_prompts(4);
      registration.set_max_packed_tokens(100);
    }
    ASSERT_TRUE(cluster.AddWorker(WorkerOf(registration)).ok());
  }
  cluster.FindWorker("a")->Hold("r1", {1, 1, 50, true});
  cluster.FindWorker("b")->Hold("r2", {2, 1, 10, true});
  cluster.FindWorker("b")->Hold("r3", {3, 1, 10, true});
  cluster.FindWorker("c")->Hold("r4", {4, 1, 99, true});
  cluster.FindWorker("alone")->Hold("r5", {5, 1, 1, false});
  const PackedPrompt prompt{"r", 100};
  std::vector<std::string> ids;
  for (const PlanWorker& worker : cluster.FreeWorkers({"tiny", "dense"}, &prompt))
    ids.push_back(worker.worker_id);
  EXPECT_EQ(ids, (std::vector<std::string>{"b", "a", "c"}));
  EXPECT_TRUE(cluster.FreeWorkers({"tiny", "dense"}, nullptr).empty());
}

class DestinationTest : public ::testing::Test {
 protected:
  DestinationTest() {
    layout_.set_num_layers(4);
    layout_.set_num_kv_heads(2);
    layout_.set_head_dim(32);
    layout_.set_num_tokens(100);
    layout_.set_dtype(v1::KV_DTYPE_BF16);
    layout_.set_model_fingerprint("sha256:tiny");
  }

  DecodeNode& Add(const v1::DecodeRegistration& registration) {
    DecodeNode node;
    node.registration = registration;
    node.connected = true;
    EXPECT_TRUE(cluster_.AddDecodeNode(node).ok());
    return *cluster_.FindDecodeNode(registration.decode_node());
  }

  v1::ErrorReason Refusal() { return ReasonOf(PickDecodeNode(request_, layout_, cluster_).status()); }

  ClusterState cluster_;
  v1::KvLayout layout_;
  v1::PrefillRequest request_;
};

TEST_F(DestinationTest, CountsTheBytesOfACache) {
  EXPECT_EQ(KvBytes(layout_), 100u * 4 * 2 * 2 * 32 * 2);
  layout_.set_dtype(v1::KV_DTYPE_F32);
  EXPECT_EQ(KvBytes(layout_), 100u * 4 * 2 * 2 * 32 * 4);
}

TEST_F(DestinationTest, HoldsTheBudgetToTheByte) {
  auto node = MakeDecodeNode("d");
  node.set_kv_budget_bytes(KvBytes(layout_));
  Add(node);
  EXPECT_TRUE(PickDecodeNode(request_, layout_, cluster_).ok());
  layout_.set_num_tokens(101);
  EXPECT_EQ(Refusal(), v1::ERROR_REASON_KV_MEMORY_FULL);
  request_.set_decode_node("d");
  EXPECT_EQ(Refusal(), v1::ERROR_REASON_KV_MEMORY_FULL);
}

TEST_F(DestinationTest, ChecksModelDtypeAndPositions) {
  auto node = MakeDecodeNode("d");
  node.set_max_position(99);
  Add(node);
  EXPECT_EQ(Refusal(), v1::ERROR_REASON_PROMPT_TOO_LONG);
  layout_.set_dtype(v1::KV_DTYPE_F16);
  EXPECT_EQ(Refusal(), v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED);
  layout_.set_model_fingerprint("other");
  EXPECT_EQ(Refusal(), v1::ERROR_REASON_MODEL_MISMATCH);
}

TEST_F(DestinationTest, PrefersConnectedNodesThenFreeBudget) {
  Add(MakeDecodeNode("a")).kv_bytes_used = 500;
  Add(MakeDecodeNode("b")).kv_bytes_used = 400;
  Add(MakeDecodeNode("c")).connected = false;
  EXPECT_EQ(*PickDecodeNode(request_, layout_, cluster_), "b");
  cluster_.FindDecodeNode("b")->unreported_bytes = 200;
  EXPECT_EQ(*PickDecodeNode(request_, layout_, cluster_), "a");
  cluster_.FindDecodeNode("a")->kv_bytes_used = UINT64_MAX;
  EXPECT_EQ(cluster_.FindDecodeNode("a")->FreeBytes(), 0u) << "a lie of a heartbeat does not wrap around";
}

v1::PrefillResponse Progress(uint32_t layers_done, bool with_plan) {
  v1::PrefillResponse event;
  event.mutable_progress()->set_layers_done(layers_done);
  if (with_plan) event.mutable_progress()->mutable_plan()->set_world_size(7);
  return event;
}

TEST(EventQueueTest, CoalescesProgressOfAnItemAndDropsNothingElse) {
  EventQueue queue;
  v1::PrefillResponse accepted;
  accepted.mutable_accepted();
  v1::PrefillResponse failed;
  failed.mutable_failed();
  const auto push = [&](uint32_t item, const v1::PrefillResponse& event) {
    queue.Push(item, std::make_shared<const v1::PrefillResponse>(event));
  };
  for (uint32_t item = 0; item < 2; ++item) push(item, accepted);
  push(0, Progress(1, true));
  for (uint32_t i = 2; i < 1000; ++i) push(i % 2, Progress(i, false));
  push(0, failed);
  EXPECT_EQ(queue.size(), 5u);

  EXPECT_TRUE(queue.Pop()->event->has_accepted());
  EXPECT_TRUE(queue.Pop()->event->has_accepted());
  const auto latest = queue.Pop();
  EXPECT_EQ(latest->item, 0u);
  EXPECT_EQ(latest->event->progress().layers_done(), 998u);
  EXPECT_EQ(latest->event->progress().plan().world_size(), 7u) << "an announced plan is not lost";
  push(0, Progress(1000, false));
  EXPECT_EQ(queue.Pop()->event->progress().layers_done(), 999u);
  EXPECT_TRUE(queue.Pop()->event->has_failed());
  EXPECT_EQ(queue.Pop()->event->progress().layers_done(), 1000u);
  EXPECT_FALSE(queue.Pop().has_value());
}

TEST(RequestTableTest, ForgetsTheOldestBeyondItsSizeAndAge) {
  RequestTable table(absl::Seconds(10), 2);
  const absl::Time start = absl::FromUnixSeconds(100);
  const auto terminal = std::make_shared<const v1::PrefillResponse>();
  for (const char* id : {"a", "b", "c", "running"}) table.Start(JobKey{"", id}, "hash", 1);
  table.End(JobKey{"", "a"}, terminal, false, start);
  table.End(JobKey{"", "b"}, terminal, false, start + absl::Seconds(5));
  table.End(JobKey{"", "c"}, terminal, false, start + absl::Seconds(6));
  EXPECT_EQ(table.Find(JobKey{"", "a"}), nullptr) << "one too many";
  EXPECT_NE(table.Find(JobKey{"", "b"}), nullptr);
  EXPECT_EQ(table.Find(JobKey{"tenant", "b"}), nullptr);
  table.Expire(start + absl::Seconds(15.5));
  EXPECT_EQ(table.Find(JobKey{"", "b"}), nullptr);
  EXPECT_NE(table.Find(JobKey{"", "c"}), nullptr);
  table.Expire(start + absl::Hours(1));
  EXPECT_NE(table.Find(JobKey{"", "running"}), nullptr);
  EXPECT_EQ(table.size(), 1u);
}

TEST(RequestTableTest, AnIdUsedAnewIsNotForgottenWithItsOldRecord) {
  RequestTable table(absl::Seconds(10), 10);
  const absl::Time start = absl::FromUnixSeconds(100);
  table.Start(JobKey{"", "a"}, "hash", 1);
  table.End(JobKey{"", "a"}, std::make_shared<const v1::PrefillResponse>(), true, start);
  table.Forget(JobKey{"", "a"});
  table.Start(JobKey{"", "a"}, "hash", 2);
  table.Expire(start + absl::Minutes(1));
  ASSERT_NE(table.Find(JobKey{"", "a"}), nullptr);
  EXPECT_EQ(table.Find(JobKey{"", "a"})->serial, 2u);
}

TEST(JobTest, DigestsAddUpModulo2To128LittleEndian) {
  const std::string ones(16, '\xff');
  std::string one(16, '\0');
  one[0] = 1;
  EXPECT_EQ(AddDigests(ones, one), std::string(16, '\0'));
  std::string low(16, '\0');
  low[7] = '\x80';
  std::string carried(16, '\0');
  carried[8] = 1;
  EXPECT_EQ(AddDigests(low, low), carried) << "the carry crosses the 64-bit words";
}

TEST(JobTest, CutsWhatPeersSayToASize) {
  absl::Status status = absl::InternalError(std::string(1 << 20, 'x'));
  for (int i = 0; i < 20; ++i)
    status.SetPayload(absl::StrCat("type.googleapis.com/p", i), absl::Cord("small"));
  status.SetPayload("type.googleapis.com/big", absl::Cord(std::string(1 << 20, 'y')));
  const absl::Status bounded = Bounded(status);
  EXPECT_EQ(bounded.code(), absl::StatusCode::kInternal);
  EXPECT_LE(bounded.message().size(), 2048u);
  EXPECT_LE(ToRpcStatus(bounded).ByteSizeLong(), 16'384u);
}

}  // namespace
}  // namespace headwater::testing
