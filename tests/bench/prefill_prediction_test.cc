#include "bench/prefill_prediction.h"

#include <memory>

#include "gtest/gtest.h"

#include "bench/prefill_device.h"
#include "bench/prefill_job.h"
#include "model/presets.h"

namespace headwater {
namespace {

constexpr int64_t kTokens = 1 << 17;

class PrefillPredictionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto config = PresetConfig("llama-3-8b", kTokens);
    ASSERT_TRUE(config.ok()) << config.status();
    config_ = *config;
    speed_.linear = 700e12;
    speed_.attention = 600e12;
  }

  v1::PlanCost Predict(int ranks, double density = 1) {
    options_.gpus = ranks;
    auto job = MakeBenchJob(config_, RandomPrompt(config_, kTokens), v1::KV_DTYPE_BF16, {});
    EXPECT_TRUE(job.ok()) << job.status();
    if (ranks > 1) {
      job->strategy = options_.strategy == "ring" ? v1::STRATEGY_RING : v1::STRATEGY_ALLGATHER;
      job->partition = *PartitionTokens(kTokens, ranks, PartitionOf(options_), 256);
    }
    const auto cost = PredictPrefill(options_, config_, speed_, *job, density);
    EXPECT_TRUE(cost.has_value());
    return cost.value_or(v1::PlanCost());
  }

  PrefillBenchOptions options_;
  ModelConfig config_;
  ComputeSpeed speed_;
};

// 1.78e15 FLOP of linear layers, 4.36e15 of attention.
TEST_F(PrefillPredictionTest, OneRankComputes) {
  const v1::PlanCost cost = Predict(1);
  EXPECT_NEAR(cost.linear_s(), 1.779e15 / 700e12, 0.01);
  EXPECT_NEAR(cost.attention_s(), 4.363e15 / 600e12, 0.01);
  EXPECT_DOUBLE_EQ(cost.total_s(), cost.linear_s() + cost.attention_s());
  EXPECT_NEAR(Predict(1, 0.25).attention_s(), cost.attention_s() * 0.2516, 1e-6);
}

TEST_F(PrefillPredictionTest, RanksShareAndExchangeAtTheGivenRate) {
  const v1::PlanCost one = Predict(1), eight = Predict(8);
  EXPECT_NEAR(eight.linear_s(), one.linear_s() / 8, 1e-6);
  EXPECT_NEAR(eight.attention_s(), one.attention_s() / 8, 1e-6);
  // 7/8 of 4096 bytes a token in 32 layers, at 100 GB/s unless told; 128 steps of 30 us.
  const double bytes = 7.0 / 8 * kTokens * 4096 * 32;
  EXPECT_NEAR(eight.exchange_s(), bytes / 100e9 + 128 * 30e-6, 1e-6);
  EXPECT_EQ(eight.start_s(), 0);
  options_.link_gbytes_per_s = 250;
  EXPECT_NEAR(Predict(8).exchange_s(), bytes / 250e9 + 128 * 30e-6, 1e-6);
  options_.strategy = "ring";
  EXPECT_NEAR(Predict(8).exchange_s(), bytes / 250e9 + 7 * 128 * 30e-6, 1e-6);
}

TEST_F(PrefillPredictionTest, LastOfContiguousRanksHasMostPairs) {
  options_.partition = "contiguous";
  EXPECT_NEAR(Predict(2).attention_s(), Predict(1).attention_s() * 3 / 4, 1e-3);
}

TEST_F(PrefillPredictionTest, KvGoesOutOnlyWhereASinkTakesIt) {
  EXPECT_EQ(Predict(1).egress_s(), 0);
  options_.sink = "verify";
  options_.egress_gbytes_per_s = 2;
  EXPECT_NEAR(Predict(1).egress_s(), 4096.0 * 32 * kTokens / 2e9, 1e-6);
}

}  // namespace
}  // namespace headwater
