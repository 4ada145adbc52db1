#include "coordinator/cost_model.h"

#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "coordinator/planner.h"
#include "coordinator/share_history.h"
#include "tests/coordinator/rates.h"

namespace headwater {
namespace {

using ::headwater::testing::MakeRates;
using ::headwater::testing::MakeShape;

// Nothing is sent. Of several ranks, zigzag.
CostInput Input(uint64_t num_tokens, uint32_t world_size = 1) {
  CostInput input;
  input.model = MakeShape();
  input.num_tokens = num_tokens;
  input.world_size = world_size;
  input.partition = world_size > 1 ? v1::PARTITION_ZIGZAG : v1::PARTITION_CONTIGUOUS;
  input.local_tokens = MaxLocalTokens(num_tokens, world_size, input.partition, 256);
  return input;
}

v1::PlanCost Cost(const CostInput& input, const v1::ComputeRates& rates = MakeRates()) {
  const std::optional<v1::PlanCost> cost = PredictCost(input, rates);
  EXPECT_TRUE(cost.has_value());
  return cost.value_or(v1::PlanCost());
}

v1::ComputeRates FastLink() {
  v1::ComputeRates rates = MakeRates();
  rates.set_link_bytes_per_s(1e18);
  return rates;
}

TEST(CostModelTest, CountsTheFlopOfAKnownShape) {
  const v1::PlanCost cost = Cost(Input(1000));

  // QKV of 32 layers, the rest of 31, in 400 TFLOP/s.
  const double qkv = 4096.0 * (4096 + 2 * 1024), rest = 4096.0 * (4096 + 3 * 14336);
  EXPECT_NEAR(cost.linear_s(), 2 * 1000 * (32 * qkv + 31 * rest) / 400e12, 1e-12);
  EXPECT_NEAR(cost.attention_s(), 31 * 4 * 4096.0 * (1000 * 1001 / 2) / 400e12, 1e-12);
  EXPECT_DOUBLE_EQ(cost.total_s(), cost.linear_s() + cost.attention_s());
}

TEST(CostModelTest, TwiceTheTokensTakeTwiceTheLinearAndFourTimesTheAttention) {
  const v1::PlanCost once = Cost(Input(65536)), twice = Cost(Input(131072));
  EXPECT_NEAR(twice.linear_s() / once.linear_s(), 2, 1e-9);
  EXPECT_NEAR(twice.attention_s() / once.attention_s(), 4, 1e-3);
  CostInput sparse = Input(131072);
  sparse.density = 0.25;
  EXPECT_NEAR(Cost(sparse).attention_s(), twice.attention_s() / 4, 1e-9);
  EXPECT_DOUBLE_EQ(Cost(sparse).linear_s(), twice.linear_s());
}

TEST(CostModelTest, ASparsePolicySearchesOnAGpu) {
  CostInput input = Input(65536);
  input.gpu = true;
  const double dense = Cost(input).attention_s();
  EXPECT_DOUBLE_EQ(dense, Cost(Input(65536)).attention_s());
  input.density = 0.01;
  EXPECT_NEAR(Cost(input).attention_s(), 0.0116 * dense, 1e-9);
}

TEST(CostModelTest, TwoEqualRanksWithAFastLinkTakeHalfTheTime) {
  const v1::PlanCost one = Cost(Input(65536), FastLink()), two = Cost(Input(65536, 2), FastLink());
  EXPECT_NEAR(two.linear_s(), one.linear_s() / 2, 1e-9);
  EXPECT_NEAR(two.attention_s(), one.attention_s() / 2, 1e-9);
  EXPECT_NEAR(two.total_s(), one.total_s() / 2, 1e-6);
}

TEST(CostModelTest, OfRunsTheLastRankHasMostPairs) {
  CostInput input = Input(65536, 2);
  const double zigzag = Cost(input).attention_s();
  input.partition = v1::PARTITION_CONTIGUOUS;
  EXPECT_NEAR(Cost(input).attention_s(), 1.5 * zigzag, 1e-3 * zigzag);
}

TEST(CostModelTest, TheExchangeIsNeverNegativeAndNeverMoreHiddenThanItIs) {
  for (const uint64_t tokens : {uint64_t{1}, uint64_t{300}, uint64_t{5000}, uint64_t{1} << 24}) {
    for (const uint32_t world_size : {1u, 2u, 3u, 256u}) {
      for (const auto strategy : {v1::STRATEGY_RING, v1::STRATEGY_ALLGATHER, v1::STRATEGY_SPARSE}) {
        for (const double link : {1.0, 1e9, 1e18}) {
          for (const bool gpu : {false, true}) {
            CostInput input = Input(tokens, world_size);
            input.strategy = strategy;
            input.gpu = gpu;
            input.kv_bytes_per_token = 1 << 17;
            v1::ComputeRates rates = MakeRates();
            rates.set_link_bytes_per_s(link);
            rates.set_exchange_step_s(1e-4);
            rates.set_group_start_s(0.1);
            SCOPED_TRACE(absl::StrCat(tokens, " tokens, ", world_size, " ranks, strategy ", strategy,
                                      ", link ", link, ", gpu ", gpu));
            const v1::PlanCost cost = Cost(input, rates);
            EXPECT_GE(cost.exchange_s(), 0);
            EXPECT_GE(cost.exchange_hidden_s(), 0);
            EXPECT_LE(cost.exchange_hidden_s(), cost.exchange_s());
            EXPECT_GE(cost.egress_hidden_s(), 0);
            EXPECT_LT(cost.egress_hidden_s(), cost.egress_s());
            EXPECT_GE(cost.total_s(), cost.linear_s() + cost.attention_s());
            EXPECT_EQ(cost.exchange_s() > 0, world_size > 1);
            EXPECT_EQ(cost.start_s() > 0, world_size > 1);
          }
        }
      }
    }
  }
}

TEST(CostModelTest, OnACpuAttentionHidesTheExchangeUpToItsLastChunk) {
  v1::ComputeRates rates = MakeRates();
  const v1::PlanCost fast = Cost(Input(65536, 2), rates);
  // All of it: half of attention takes longer.
  EXPECT_GT(fast.attention_s() / 2, fast.exchange_s());
  EXPECT_DOUBLE_EQ(fast.exchange_hidden_s(), fast.exchange_s());
  rates.set_link_bytes_per_s(1e9);
  const v1::PlanCost slow = Cost(Input(65536, 2), rates);
  // 32 layers of 32,768 tokens of 4,096 bytes.
  EXPECT_DOUBLE_EQ(slow.exchange_s(), 32.0 * 32768 * 4096 / 1e9);
  EXPECT_DOUBLE_EQ(slow.exchange_hidden_s(), slow.attention_s() / 2);
}

TEST(CostModelTest, OnAGpuTheLastPieceShowsAndARingTakesMoreSteps) {
  CostInput input = Input(65536, 4);
  input.gpu = true;
  v1::ComputeRates rates = MakeRates();
  const v1::PlanCost ring = Cost(input, rates);
  EXPECT_NEAR(ring.exchange_s() - ring.exchange_hidden_s(), ring.exchange_s() / 4, 1e-12);
  rates.set_exchange_step_s(1e-4);
  const double latency = Cost(input, rates).exchange_s() - ring.exchange_s();
  input.strategy = v1::STRATEGY_ALLGATHER;
  EXPECT_NEAR(latency, 32 * 4 * 3 * 1e-4, 1e-9);
  EXPECT_NEAR(Cost(input, rates).exchange_s() - ring.exchange_s(), latency / 3, 1e-9);
}

TEST(CostModelTest, SparseBringsWhatIsSelectedAndItsBitmaps) {
  CostInput input = Input(65536, 2);
  v1::ComputeRates rates = MakeRates();
  rates.set_link_bytes_per_s(1e9);
  input.strategy = v1::STRATEGY_ALLGATHER;
  const double all = Cost(input, rates).exchange_s();
  input.strategy = v1::STRATEGY_SPARSE;
  const double bitmaps = Cost(input, rates).exchange_s() - all;
  EXPECT_NEAR(bitmaps, 32 * 8 * 65536.0 / 128 / 8 / 1e9, 1e-12);
  input.selected = 0.5;
  EXPECT_NEAR(Cost(input, rates).exchange_s(), all / 2 + bitmaps, 1e-9);
}

TEST(CostModelTest, OfTheEgressTheLastLayersPartShowsAtLeast) {
  CostInput input = Input(65536);
  input.kv_bytes_per_token = 32 * 4096;
  v1::ComputeRates rates = MakeRates();
  const v1::PlanCost fast = Cost(input, rates);
  EXPECT_DOUBLE_EQ(fast.egress_s(), 65536.0 * 32 * 4096 / 5e9);
  EXPECT_NEAR(fast.egress_s() - fast.egress_hidden_s(), fast.egress_s() / 32, 1e-9);
  rates.set_egress_bytes_per_s(1e9);
  const v1::PlanCost slow = Cost(input, rates);
  const double compute = slow.linear_s() + slow.attention_s();
  EXPECT_NEAR(slow.total_s(), slow.egress_s() + compute / 32, 1e-9);
}

TEST(CostModelTest, NothingIsPredictedFromWhatIsNotKnown) {
  CostInput alone = Input(5000), pair = Input(5000, 2);
  alone.kv_bytes_per_token = pair.kv_bytes_per_token = 1000;
  using Clear = void (v1::ComputeRates::*)();
  for (const Clear clear : {&v1::ComputeRates::clear_linear_flops, &v1::ComputeRates::clear_attention_flops,
                            &v1::ComputeRates::clear_egress_bytes_per_s}) {
    v1::ComputeRates rates = MakeRates();
    (rates.*clear)();
    EXPECT_FALSE(PredictCost(alone, rates).has_value());
    EXPECT_FALSE(PredictCost(pair, rates).has_value());
  }
  for (const Clear clear :
       {&v1::ComputeRates::clear_link_bytes_per_s, &v1::ComputeRates::clear_exchange_bytes_per_token}) {
    v1::ComputeRates rates = MakeRates();
    (rates.*clear)();
    EXPECT_TRUE(PredictCost(alone, rates).has_value()) << "it exchanges nothing";
    EXPECT_FALSE(PredictCost(pair, rates).has_value());
  }
  for (const auto clear : {&v1::ServedModel::clear_hidden_size, &v1::ServedModel::clear_num_q_heads,
                           &v1::ServedModel::clear_intermediate_size}) {
    CostInput shapeless = alone;
    (shapeless.model.*clear)();
    EXPECT_FALSE(PredictCost(shapeless, MakeRates()).has_value());
  }
}

TEST(CostModelTest, AGroupIsAsFastAsItsSlowestPartsWhoeverComesFirst) {
  v1::ComputeRates a = MakeRates(), b = MakeRates();
  a.set_linear_flops(1e12);
  a.set_group_start_s(2);
  b.set_attention_flops(2e12);
  b.set_link_bytes_per_s(3e9);
  const v1::ComputeRates slower = SlowerOf(a, b);
  EXPECT_EQ(slower.SerializeAsString(), SlowerOf(b, a).SerializeAsString());
  EXPECT_EQ(slower.linear_flops(), 1e12);
  EXPECT_EQ(slower.attention_flops(), 2e12);
  EXPECT_EQ(slower.link_bytes_per_s(), 3e9);
  EXPECT_EQ(slower.group_start_s(), 2);
  b.clear_linear_flops();
  EXPECT_EQ(SlowerOf(a, b).linear_flops(), 0) << "one that is not known makes the group unknown";
}

TEST(ShareHistoryTest, KeepsTheLastSharesOfALengthAndPolicy) {
  ShareHistory history;
  EXPECT_EQ(history.Find("m", "probe", 1000).density, 1);
  history.SetDensity("m", "probe", 1000, 0.25);
  history.SetSelected("m", "probe", 600, 0.5);
  EXPECT_EQ(history.Find("m", "probe", 520).density, 0.25);
  EXPECT_EQ(history.Find("m", "probe", 1023).selected, 0.5);
  EXPECT_EQ(history.Find("m", "probe", 1024).density, 1) << "another length";
  EXPECT_EQ(history.Find("m", "flash", 1000).density, 1);
  EXPECT_EQ(history.Find("n", "probe", 1000).density, 1);
  history.SetDensity("m", "probe", 1000, std::numeric_limits<double>::quiet_NaN());
  history.SetDensity("m", "probe", 1000, 1.5);
  EXPECT_EQ(history.Find("m", "probe", 1000).density, 0.25);
}

TEST(ShareHistoryTest, HoldsItsSize) {
  ShareHistory history;
  for (size_t i = 0; i < ShareHistory::kMostKept; ++i) history.SetDensity("m", absl::StrCat(i), 1, 0.5);
  history.SetDensity("m", "one more", 1, 0.5);
  EXPECT_EQ(history.Find("m", "one more", 1).density, 1);
  history.SetDensity("m", "0", 1, 0.75);
  EXPECT_EQ(history.Find("m", "0", 1).density, 0.75);
}

}  // namespace
}  // namespace headwater
