// What the planner makes of predicted costs.
#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "coordinator/explain.h"
#include "coordinator/planner.h"
#include "tests/coordinator/rates.h"

namespace headwater {
namespace {

using ::headwater::testing::MakeRates;
using ::headwater::testing::MakeShape;

std::vector<PlanWorker> Workers(int count, const v1::ComputeRates& rates, const std::string& device = "cpu") {
  std::vector<PlanWorker> out;
  for (int i = 0; i < count; ++i) {
    PlanWorker& worker = out.emplace_back();
    worker.worker_id = absl::StrCat("w", i);
    worker.memory.set_budget_bytes(uint64_t{1} << 50);
    worker.memory.set_bytes_per_token(1000);
    worker.device = device;
    worker.rates = rates;
  }
  return out;
}

// Any length may be shared.
PlanSpec Spec(uint64_t num_tokens) {
  PlanSpec spec;
  spec.num_tokens = num_tokens;
  spec.context_parallel_min_tokens = 1;
  spec.model = MakeShape();
  return spec;
}

v1::PrefillPlan Plan(const PlanSpec& spec, const std::vector<PlanWorker>& workers,
                     v1::PlanExplanation* explanation = nullptr) {
  const auto plan = MakePlan(spec, workers, explanation);
  EXPECT_TRUE(plan.ok()) << plan.status();
  return plan.ok() ? *plan : v1::PrefillPlan();
}

TEST(PlannerCostTest, ShortPromptsTakeOneWorkerAndLongOnesAll) {
  v1::ComputeRates rates = MakeRates();
  rates.set_group_start_s(0.3);
  const auto workers = Workers(8, rates);
  for (const auto& [tokens, world_size] : {std::pair(2048, 1u), {8192, 1u}, {131072, 8u}, {1 << 20, 8u}}) {
    const v1::PrefillPlan plan = Plan(Spec(static_cast<uint64_t>(tokens)), workers);
    EXPECT_EQ(plan.world_size(), world_size) << tokens;
    EXPECT_GT(plan.cost().total_s(), 0);
  }
}

TEST(PlannerCostTest, ASlowLinkKeepsAPromptOnOneWorker) {
  v1::ComputeRates rates = MakeRates();
  EXPECT_EQ(Plan(Spec(16384), Workers(2, rates)).world_size(), 2u);
  rates.set_link_bytes_per_s(1e9);
  EXPECT_EQ(Plan(Spec(16384), Workers(2, rates)).world_size(), 1u);
  EXPECT_EQ(Plan(Spec(1 << 20), Workers(2, rates)).world_size(), 2u) << "attention hides the exchange";
}

TEST(PlannerCostTest, ALargerGroupHasToBeFivePercentFaster) {
  // Forming a group takes half of what one worker needs, but for a share of that time.
  const PlanSpec spec = Spec(65536);
  v1::ComputeRates rates = MakeRates();
  rates.set_link_bytes_per_s(1e18);
  const double alone = Plan(spec, Workers(1, rates)).cost().total_s();
  rates.set_group_start_s(alone * 0.46);
  v1::PlanExplanation explanation;
  EXPECT_EQ(Plan(spec, Workers(2, rates), &explanation).world_size(), 1u);
  ASSERT_EQ(explanation.candidates_size(), 4);
  EXPECT_LT(explanation.candidates(1).cost().total_s(), alone);
  EXPECT_TRUE(absl::StrContains(explanation.candidates(1).note(), "4.0 % faster; a larger group has to be 5"))
      << explanation.candidates(1).note();
  rates.set_group_start_s(alone * 0.44);
  EXPECT_EQ(Plan(spec, Workers(2, rates)).world_size(), 2u);
}

TEST(PlannerCostTest, GpusTakeAllgatherWhereTheRingsStepsCost) {
  auto workers = Workers(4, MakeRates(), "cuda");
  for (PlanWorker& worker : workers) worker.strategies = {v1::STRATEGY_RING, v1::STRATEGY_ALLGATHER};
  const PlanSpec spec = Spec(131072);
  EXPECT_EQ(Plan(spec, workers).strategy(), v1::STRATEGY_RING) << "as fast, and named first";
  for (PlanWorker& worker : workers) worker.rates.set_exchange_step_s(30e-6);
  EXPECT_EQ(Plan(spec, workers).strategy(), v1::STRATEGY_ALLGATHER);
  workers[2].strategies = {v1::STRATEGY_RING};
  EXPECT_EQ(Plan(spec, workers).strategy(), v1::STRATEGY_RING) << "not all have the other one";
}

TEST(PlannerCostTest, CpusTakeSparseWhereTheLinkIsSlowAndLittleIsSelected) {
  v1::ComputeRates rates = MakeRates();
  rates.set_link_bytes_per_s(1e9);
  PlanSpec spec = Spec(131072);
  spec.world_size = 2;
  spec.density = 0.05;
  EXPECT_EQ(Plan(spec, Workers(2, rates)).strategy(), v1::STRATEGY_RING);
  spec.selected = 0.1;
  EXPECT_EQ(Plan(spec, Workers(2, rates)).strategy(), v1::STRATEGY_SPARSE);
}

TEST(PlannerCostTest, KeepsWhatTheRequestSays) {
  v1::ComputeRates rates = MakeRates();
  rates.set_link_bytes_per_s(1e6);
  PlanSpec spec = Spec(4096);
  spec.world_size = 3;
  spec.partition = v1::PARTITION_STRIPED;
  spec.strategy = v1::STRATEGY_SPARSE;
  v1::PlanExplanation explanation;
  const v1::PrefillPlan plan = Plan(spec, Workers(4, rates), &explanation);
  EXPECT_EQ(plan.world_size(), 3u);
  EXPECT_EQ(plan.partition(), v1::PARTITION_STRIPED);
  EXPECT_EQ(plan.strategy(), v1::STRATEGY_SPARSE);
  ASSERT_EQ(explanation.candidates_size(), 1);
  EXPECT_TRUE(absl::StrContains(explanation.summary(), "as many workers as were asked for"))
      << explanation.summary();
}

TEST(PlannerCostTest, ShortPromptsStayOnOneWorkerWhateverTheyCost) {
  PlanSpec spec = Spec(131072);
  spec.context_parallel_min_tokens = 131073;
  EXPECT_EQ(Plan(spec, Workers(4, MakeRates())).world_size(), 1u);
}

TEST(PlannerCostTest, ARateThatIsNotKnownLeavesTheOldWay) {
  v1::ComputeRates rates = MakeRates();
  rates.set_group_start_s(60);  // one worker would be the choice
  auto workers = Workers(4, rates);
  ASSERT_EQ(Plan(Spec(65536), workers).world_size(), 1u);
  workers[3].rates.clear_link_bytes_per_s();
  EXPECT_EQ(Plan(Spec(65536), workers).world_size(), 4u);
  workers[3].rates.Clear();
  v1::PlanExplanation explanation;
  const v1::PrefillPlan plan = Plan(Spec(65536), workers, &explanation);
  EXPECT_EQ(plan.world_size(), 4u);
  EXPECT_EQ(plan.strategy(), v1::STRATEGY_RING);
  EXPECT_FALSE(plan.has_cost());
  EXPECT_TRUE(absl::StrContains(explanation.summary(), "nothing is predicted")) << explanation.summary();
  PlanSpec shapeless = Spec(65536);
  shapeless.model.clear_hidden_size();
  EXPECT_EQ(Plan(shapeless, Workers(4, rates)).world_size(), 4u);
}

TEST(PlannerCostTest, MemoryGoesBeforeCost) {
  v1::ComputeRates rates = MakeRates();
  rates.set_group_start_s(60);
  auto workers = Workers(4, rates);
  for (PlanWorker& worker : workers) worker.memory.set_budget_bytes(1000 * 20'000);
  v1::PlanExplanation explanation;
  EXPECT_EQ(Plan(Spec(65536), workers, &explanation).world_size(), 4u);
  ASSERT_EQ(explanation.candidates_size(), 6);
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(explanation.candidates(i).has_cost(), i < 3) << "three strategies of 4, and no room on 1 to 3";
  }
  EXPECT_TRUE(explanation.candidates(0).chosen());
}

TEST(PlannerCostTest, AGroupIsPredictedByItsSlowestWorker) {
  auto workers = Workers(2, MakeRates());
  workers[1].rates.set_attention_flops(1e12);
  const v1::PrefillPlan plan = Plan(Spec(131072), workers);
  EXPECT_EQ(plan.world_size(), 1u);
  EXPECT_EQ(plan.worker_ids(0), "w0");
}

TEST(PlannerCostTest, TheOrderOfEqualWorkersDoesNotChangeThePlan) {
  auto workers = Workers(3, MakeRates());
  workers[2].rates.set_linear_flops(300e12);
  const PlanSpec spec = Spec(1 << 20);
  const std::string plan = Plan(spec, workers).SerializeAsString();
  std::reverse(workers.begin(), workers.end());
  EXPECT_EQ(Plan(spec, workers).SerializeAsString(), plan);
}

TEST(PlannerCostTest, TheExplanationHoldsEveryCandidateAndOneChoice) {
  v1::PlanExplanation explanation;
  PlanSpec spec = Spec(131072);
  spec.density = 0.5;
  const v1::PrefillPlan plan = Plan(spec, Workers(3, MakeRates()), &explanation);
  EXPECT_EQ(explanation.density(), 0.5);
  ASSERT_EQ(explanation.candidates_size(), 1 + 3 + 3);
  int chosen = 0;
  for (const v1::PlanCandidate& candidate : explanation.candidates()) {
    EXPECT_FALSE(candidate.note().empty());
    if (!candidate.chosen()) continue;
    ++chosen;
    EXPECT_EQ(candidate.world_size(), plan.world_size());
    EXPECT_EQ(candidate.strategy(), plan.strategy());
    EXPECT_EQ(candidate.cost().total_s(), plan.cost().total_s());
  }
  EXPECT_EQ(chosen, 1);
  EXPECT_TRUE(absl::StrContains(explanation.summary(), DescribePlan(plan))) << explanation.summary();
  EXPECT_TRUE(absl::StrContains(explanation.candidates(5).note(), "as fast"))
      << explanation.candidates(5).note();
}

// Why a group does not exchange sparsely, and that it would hardly gain.
TEST(PlannerCostTest, TheExplanationNamesWhatIsNotOffered) {
  auto workers = Workers(2, MakeRates());
  for (PlanWorker& worker : workers) worker.strategies = {v1::STRATEGY_ALLGATHER, v1::STRATEGY_RING};
  v1::PlanExplanation explanation;
  const v1::PrefillPlan plan = Plan(Spec(1 << 20), workers, &explanation);
  ASSERT_EQ(plan.world_size(), 2u);
  const v1::PlanCandidate& last = explanation.candidates(explanation.candidates_size() - 1);
  EXPECT_EQ(last.strategy(), v1::STRATEGY_SPARSE);
  EXPECT_EQ(last.world_size(), 2u);
  EXPECT_FALSE(last.chosen());
  EXPECT_FALSE(last.has_cost());
  EXPECT_TRUE(absl::StrContains(last.note(), "do not offer it; no exchange at all would save"))
      << last.note();
  // One worker exchanges nothing.
  PlanSpec alone = Spec(1 << 20);
  alone.world_size = 1;
  Plan(alone, workers, &explanation);
  for (const v1::PlanCandidate& candidate : explanation.candidates()) {
    EXPECT_NE(candidate.strategy(), v1::STRATEGY_SPARSE);
  }
}

}  // namespace
}  // namespace headwater
