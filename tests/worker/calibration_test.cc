#include "worker/calibration.h"

#include <memory>

#include "gtest/gtest.h"

#include "tests/model/dense_forward.h"
#include "tests/worker/hooked_model.h"
#include "worker/backend.h"
#include "worker/cpu_backend.h"

namespace headwater::testing {
namespace {

TEST(CalibrationTest, WorkOfIsTheFlopOfALayer) {
  ModelConfig config;
  config.hidden_size = 10;
  config.intermediate_size = 7;
  config.num_q_heads = 3;
  config.num_kv_heads = 1;
  config.head_dim = 5;
  const LayerWork work = WorkOf(config, 100);
  EXPECT_DOUBLE_EQ(work.linear, 2.0 * 100 * 10 * (15 + 5 + 5 + 15 + 3 * 7));
  EXPECT_DOUBLE_EQ(work.dense_attention, 4.0 * 15 * 100 * 100 / 2);
}

TEST(CalibrationTest, RatesHoldWhatWasMeasuredAndWhatRanksExchange) {
  ModelConfig config;
  config.num_kv_heads = 8;
  config.head_dim = 128;
  ComputeSpeed speed;
  speed.linear = 1e12;
  speed.attention = 2e12;
  const LinkRates links = DefaultLinkRates(false);
  const v1::ComputeRates rates = MakeComputeRates(speed, links, config, kernels::DType::kBF16);
  EXPECT_EQ(rates.linear_flops(), 1e12);
  EXPECT_EQ(rates.attention_flops(), 2e12);
  EXPECT_EQ(rates.link_bytes_per_s(), links.link_bytes_per_s);
  EXPECT_EQ(rates.egress_bytes_per_s(), links.egress_bytes_per_s);
  EXPECT_EQ(rates.exchange_bytes_per_token(), 2u * 8 * 128 * 2);
  EXPECT_EQ(MakeComputeRates(speed, links, config, kernels::DType::kF32).exchange_bytes_per_token(),
            2u * 8 * 128 * 4);
  EXPECT_GT(DefaultLinkRates(true).link_bytes_per_s, links.link_bytes_per_s);
}

class MeasureTest : public ::testing::Test {
 protected:
  MeasureTest()
      : model_(Model::Load({ReadGolden(GoldenNames()[0]).directory, kernels::DType::kF32, 0}).value()) {}

  CpuBackend MakeBackend(uint64_t budget_bytes) const {
    return CpuBackend(model_, MakeMemoryShape(*model_, 1, 3, 2), budget_bytes);
  }

  const std::shared_ptr<const Model> model_;
};

TEST_F(MeasureTest, BothWaysSeeAModelThatComputes) {
  CpuBackend backend = MakeBackend(1 << 30);
  const absl::StatusOr<ComputeSpeed> parts = backend.MeasureSpeed();
  const absl::StatusOr<ComputeSpeed> whole = MeasureRun(&backend, 256, absl::ZeroDuration());
  for (const auto& speed : {parts, whole}) {
    ASSERT_TRUE(speed.ok()) << speed.status();
    // From 1 MFLOP/s, which a sanitized build has, to more than any machine.
    for (const double rate : {speed->linear, speed->attention}) {
      EXPECT_GT(rate, 1e6);
      EXPECT_LT(rate, 1e17);
    }
  }
}

TEST_F(MeasureTest, AModelThatFailsHasNoSpeed) {
  HookedModel broken(model_.get());
  broken.before_attention_status = [](int32_t, int64_t) { return absl::DataLossError("test"); };
  EXPECT_TRUE(absl::IsDataLoss(MeasureModel(broken).status()));
}

TEST_F(MeasureTest, APromptThatDoesNotFitIsNotRun) {
  CpuBackend small = MakeBackend(model_->weight_bytes() + 1000);
  EXPECT_TRUE(absl::IsFailedPrecondition(MeasureRun(&small, 256, absl::ZeroDuration()).status()));
}

}  // namespace
}  // namespace headwater::testing
