#include "coordinator/planner.h"

#include <numeric>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

// Room for `tokens` tokens of 1000 bytes beside 5000 fixed bytes.
PlanWorker Worker(const std::string& id, uint64_t tokens = 1'000'000) {
  PlanWorker worker;
  worker.worker_id = id;
  worker.memory.set_weight_bytes(700);
  worker.memory.set_fixed_bytes(5000);
  worker.memory.set_bytes_per_token(1000);
  worker.memory.set_budget_bytes(700 + 5000 + 1000 * tokens);
  return worker;
}

std::vector<PlanWorker> Workers(int count, uint64_t tokens = 1'000'000) {
  std::vector<PlanWorker> out;
  for (int i = 0; i < count; ++i) out.push_back(Worker(absl::StrCat("w", i), tokens));
  return out;
}

PlanSpec Spec(uint64_t num_tokens) {
  PlanSpec spec;
  spec.num_tokens = num_tokens;
  return spec;
}

TEST(PlannerTest, ChoosesTheNumberOfWorkersByLength) {
  struct Row {
    uint64_t num_tokens;
    int workers;
    uint32_t world_size;
  };
  for (const Row& row : {Row{1, 4, 1}, Row{2047, 4, 1}, Row{2048, 4, 4}, Row{2049, 4, 4}, Row{100'000, 1, 1},
                         Row{100'000, 3, 3}, Row{2048, 16, 4}, Row{8192, 16, 16}, Row{8191, 17, 16}}) {
    SCOPED_TRACE(absl::StrCat(row.num_tokens, " tokens, ", row.workers, " workers"));
    const auto plan = MakePlan(Spec(row.num_tokens), Workers(row.workers));
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(plan->world_size(), row.world_size);
    EXPECT_EQ(plan->worker_ids_size(), static_cast<int>(row.world_size));
    EXPECT_EQ(plan->partition(), row.world_size == 1 ? v1::PARTITION_CONTIGUOUS : v1::PARTITION_ZIGZAG);
  }
}

TEST(PlannerTest, LeavesTwoBlocksForEachUnlessRanksHoldOneRun) {
  PlanSpec spec = Spec(2048);
  for (const auto& [partition, world_size] :
       {std::pair(v1::PARTITION_CONTIGUOUS, 8u), {v1::PARTITION_ZIGZAG, 4u}, {v1::PARTITION_STRIPED, 4u}}) {
    spec.partition = partition;
    EXPECT_EQ(MakePlan(spec, Workers(16))->world_size(), world_size) << partition;
  }
}

TEST(PlannerTest, TakesTheStrategyAskedForAndTheRingUnlessOneIs) {
  for (const uint32_t world_size : {1u, 3u}) {
    PlanSpec spec = Spec(5000);
    spec.world_size = world_size;
    EXPECT_EQ(MakePlan(spec, Workers(4))->strategy(), v1::STRATEGY_RING);
    spec.strategy = v1::STRATEGY_SPARSE;
    EXPECT_EQ(MakePlan(spec, Workers(4))->strategy(), v1::STRATEGY_SPARSE);
  }
}

TEST(PlannerTest, BoundsTheTokensOfARank) {
  struct Row {
    uint64_t num_tokens;
    uint32_t world_size;
    v1::Partition partition;
    uint32_t block_tokens;
    uint64_t local;
  };
  constexpr auto kZigzag = v1::PARTITION_ZIGZAG;
  constexpr auto kContiguous = v1::PARTITION_CONTIGUOUS;
  constexpr auto kStriped = v1::PARTITION_STRIPED;
  for (const Row& row :
       {Row{1, 1, kContiguous, 256, 1}, Row{1, 4, kContiguous, 256, 1}, Row{1024, 4, kContiguous, 256, 256},
        Row{1025, 4, kContiguous, 256, 512}, Row{1024, 2, kZigzag, 256, 512},
        Row{1025, 2, kZigzag, 256, 1024}, Row{1024, 1, kZigzag, 256, 1024}, Row{300, 2, kZigzag, 16, 160},
        Row{uint64_t{1} << 24, 256, kZigzag, 16, 65536}, Row{1, 4, kStriped, 256, 1},
        Row{1025, 2, kStriped, 256, 768}, Row{300, 2, kStriped, 16, 160},
        // 130 blocks in 65 stripes of two, of which rank 0 has 33; the last one whole, then short.
        Row{2077, 2, kStriped, 16, 1056}, Row{2064, 2, kStriped, 16, 1040},
        Row{uint64_t{1} << 24, 256, kStriped, 16, 65536}}) {
    EXPECT_EQ(MaxLocalTokens(row.num_tokens, row.world_size, row.partition, row.block_tokens), row.local)
        << row.num_tokens << " over " << row.world_size;
  }
}

TEST(PlannerTest, RanksTogetherHoldAllTokens) {
  for (uint64_t tokens = 1; tokens < 5000; tokens += 37) {
    for (uint32_t world_size = 1; world_size <= 9; ++world_size) {
      for (const auto partition : {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED}) {
        const uint64_t local = MaxLocalTokens(tokens, world_size, partition, 32);
        EXPECT_GE(local * world_size, tokens);
        EXPECT_LE(local, tokens);
      }
    }
  }
}

TEST(PlannerTest, HoldsTheMemoryLimitToTheByte) {
  auto workers = Workers(1, 1000);
  const auto fits = MakePlan(Spec(1000), workers);
  ASSERT_TRUE(fits.ok()) << fits.status();
  EXPECT_EQ(fits->bytes_per_rank(), 1'005'000u);

  workers[0].memory.set_budget_bytes(workers[0].memory.budget_bytes() - 1);
  const auto refused = MakePlan(Spec(1000), workers);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(refused.status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  EXPECT_TRUE(absl::StrContains(refused.status().message(), "1005000")) << refused.status();
  EXPECT_TRUE(absl::StrContains(refused.status().message(), "1004999")) << refused.status();
}

TEST(PlannerTest, GroupsAndCheckpointsTakeTheirBytesToo) {
  auto workers = Workers(2, 1024);
  for (PlanWorker& worker : workers) worker.memory.set_group_bytes_per_token(500);
  PlanSpec spec = Spec(1024);
  spec.world_size = 1;
  const auto alone = MakePlan(spec, workers);
  spec.resumes = true;
  const auto resumed = MakePlan(spec, workers);
  spec.resumes = false;
  spec.world_size = 2;
  const auto group = MakePlan(spec, workers);
  spec.num_tokens = 2048;
  const auto large_group = MakePlan(spec, workers);

  ASSERT_TRUE(alone.ok()) << alone.status();
  EXPECT_EQ(alone->bytes_per_rank(), 1'029'000u);
  EXPECT_EQ(ReasonOf(resumed.status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  ASSERT_TRUE(group.ok()) << group.status();
  EXPECT_EQ(group->bytes_per_rank(), 5000 + 512 * 1500u);
  EXPECT_TRUE(absl::StrContains(large_group.status().message(),
                                "needs 1541000 bytes on each besides the weights; 1029000 are available"))
      << large_group.status();
}

TEST(PlannerTest, AGroupIsOfOneKindOfDeviceAndHasAStrategyOfItsOwn) {
  auto workers = Workers(4, 1024);
  for (PlanWorker& worker : workers) worker.device = "cpu";
  for (const size_t i : {size_t{1}, size_t{3}}) {
    workers[i].device = "cuda";
    workers[i].strategies = {v1::STRATEGY_ALLGATHER, v1::STRATEGY_RING};
  }
  PlanSpec spec = Spec(2048);
  spec.world_size = 2;
  auto plan = MakePlan(spec, workers);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->worker_ids(), ::testing::ElementsAre(workers[0].worker_id, workers[2].worker_id));
  EXPECT_EQ(plan->strategy(), v1::STRATEGY_RING);
  // The first kind has no room.
  workers[2].memory.set_budget_bytes(workers[2].memory.weight_bytes());
  plan = MakePlan(spec, workers);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->worker_ids(), ::testing::ElementsAre(workers[1].worker_id, workers[3].worker_id));
  EXPECT_EQ(plan->strategy(), v1::STRATEGY_ALLGATHER);
  // What a kind does not have is not asked of it; one worker exchanges nothing.
  spec.strategy = v1::STRATEGY_SPARSE;
  EXPECT_EQ(ReasonOf(MakePlan(spec, workers).status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  spec.world_size = 1;
  spec.num_tokens = 512;
  workers[0].memory.set_budget_bytes(workers[0].memory.weight_bytes());
  plan = MakePlan(spec, workers);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->worker_ids(), ::testing::ElementsAre(workers[1].worker_id));
  spec.world_size = 3;
  EXPECT_EQ(ReasonOf(MakePlan(spec, workers).status()), v1::ERROR_REASON_NO_WORKERS);
}

TEST(PlannerTest, WhatIsHeldOfOtherRanksTokensCountsInGroups) {
  auto workers = Workers(2, 1024);
  for (PlanWorker& worker : workers) worker.memory.set_group_bytes_per_prompt_token(300);
  PlanSpec spec = Spec(1024);
  spec.world_size = 1;
  EXPECT_EQ(MakePlan(spec, workers)->bytes_per_rank(), 1'029'000u);
  spec.world_size = 2;
  EXPECT_EQ(MakePlan(spec, workers)->bytes_per_rank(), 5000 + 512 * 1000 + 512 * 300u);
  for (PlanWorker& worker : workers) worker.memory.set_group_bytes_per_prompt_token(2001);
  EXPECT_EQ(ReasonOf(MakePlan(spec, workers).status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
}

TEST(PlannerTest, SpreadsAShortPromptThatFitsNoSingleWorker) {
  const auto plan = MakePlan(Spec(2000), Workers(4, 1100));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->world_size(), 2u);
}

TEST(PlannerTest, LeavesOutWorkersThatAreTooSmall) {
  const auto plan = MakePlan(Spec(4096), {Worker("a", 5000), Worker("b", 10), Worker("c", 5000)});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->world_size(), 2u);
  EXPECT_EQ(plan->worker_ids(0), "a");
  EXPECT_EQ(plan->worker_ids(1), "c");
}

TEST(PlannerTest, ReportsWhatTheWholeClusterLacks) {
  const auto plan = MakePlan(Spec(4096), Workers(4, 1023));
  EXPECT_EQ(ReasonOf(plan.status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  EXPECT_TRUE(absl::StrContains(plan.status().message(), "over 4 workers needs 1029000")) << plan.status();
  EXPECT_TRUE(absl::StrContains(plan.status().message(), "1028000 are available")) << plan.status();
}

TEST(PlannerTest, KeepsToAWishedWorldSize) {
  PlanSpec spec = Spec(100);
  spec.world_size = 3;
  const auto plan = MakePlan(spec, Workers(4));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->world_size(), 3u);
  EXPECT_EQ(plan->partition(), v1::PARTITION_ZIGZAG);
  spec.partition = v1::PARTITION_CONTIGUOUS;
  EXPECT_EQ(MakePlan(spec, Workers(4))->partition(), v1::PARTITION_CONTIGUOUS);
  const auto few = MakePlan(spec, Workers(2));
  EXPECT_EQ(few.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(few.status()), v1::ERROR_REASON_NO_WORKERS);
  spec.num_tokens = 3 * 256;
  EXPECT_EQ(ReasonOf(MakePlan(spec, Workers(3, 100)).status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
}

TEST(PlannerTest, PrefersTheFirstAndGivesTheSameSetTheSameRanks) {
  const auto single = MakePlan(Spec(10), {Worker("z"), Worker("a")});
  EXPECT_EQ(single->worker_ids(0), "z");
  const auto one_way = MakePlan(Spec(10000), {Worker("z"), Worker("a")});
  const auto other_way = MakePlan(Spec(10000), {Worker("a"), Worker("z")});
  EXPECT_EQ(one_way->SerializeAsString(), other_way->SerializeAsString());
}

TEST(PlannerTest, NoWorkersIsUnavailable) {
  PlanSpec spec = Spec(10);
  spec.policy = "headwater";
  spec.quality = true;
  const absl::Status status = MakePlan(spec, {}).status();
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_NO_WORKERS);
  EXPECT_TRUE(absl::StrContains(status.message(), "1 workers with policy headwater that serve a quality"))
      << status;
}

TEST(PlannerTest, HostileMemoryModelsDoNotOverflow) {
  PlanWorker worker = Worker("w");
  worker.memory.set_bytes_per_token(UINT64_MAX);
  worker.memory.set_group_bytes_per_token(UINT64_MAX);
  worker.memory.set_fixed_bytes(UINT64_MAX);
  EXPECT_EQ(ReasonOf(MakePlan(Spec(4'000'000), {worker}).status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  worker.memory.set_weight_bytes(UINT64_MAX);
  EXPECT_EQ(ReasonOf(MakePlan(Spec(1), {worker}).status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  PlanSpec spec = Spec(4'000'000);
  spec.resumes = true;
  EXPECT_EQ(ReasonOf(MakePlan(spec, {worker}).status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
}

TEST(PlannerTest, AWorkerHoldsWhatThePolicyLeavesRoomFor) {
  std::vector<PlanWorker> workers = Workers(2);
  workers[0].max_tokens = 9'000;
  workers[1].max_tokens = 20'000;
  PlanSpec spec;
  spec.num_tokens = 10'000;
  spec.world_size = 1;

  const auto plan = MakePlan(spec, workers);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->worker_ids(0), workers[1].worker_id);

  spec.num_tokens = 20'001;
  const absl::Status refused = MakePlan(spec, workers).status();
  EXPECT_EQ(ReasonOf(refused), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  EXPECT_EQ(
      refused.message(),
      "a prompt of 20001 tokens over 1 workers gives 20001 to one; under policy dense their memory holds "
      "20000");
}

TEST(PlannerTest, LeavesWorkersThatCannotBeInAGroupAlone) {
  std::vector<PlanWorker> workers = Workers(3);
  workers[0].max_world_size = workers[1].max_world_size = 1;
  PlanSpec spec;
  spec.num_tokens = 100'000;

  const auto alone = MakePlan(spec, workers);
  spec.world_size = 2;
  const auto two = MakePlan(spec, workers);
  workers[1].max_world_size = 2;
  const auto possible = MakePlan(spec, workers);

  ASSERT_TRUE(alone.ok()) << alone.status();
  EXPECT_EQ(alone->world_size(), 1u);
  EXPECT_EQ(two.status().code(), absl::StatusCode::kUnavailable) << two.status();
  EXPECT_TRUE(absl::StrContains(two.status().message(), "2 workers with policy dense are needed, 1 that can"))
      << two.status();
  ASSERT_TRUE(possible.ok()) << possible.status();
  EXPECT_EQ(possible->worker_ids(0), "w1");
  EXPECT_EQ(possible->worker_ids(1), "w2");
}

}  // namespace
}  // namespace headwater
