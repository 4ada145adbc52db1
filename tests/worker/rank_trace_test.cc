#include "worker/rank_trace.h"

#include "gtest/gtest.h"

namespace headwater::testing {
namespace {

absl::Time At(int64_t micros) { return absl::FromUnixMicros(1'000'000 + micros); }

LayerTimes Layer(int32_t layer, absl::Time begin) {
  LayerTimes times;
  times.layer = layer;
  times.begin = begin;
  return times;
}

TEST(RankTraceTest, CountsFromTheReceiptOfTheAssignment) {
  LayerTimes second = Layer(2, At(700));
  second.egress_stall = absl::Microseconds(5);
  second.project = absl::Microseconds(10);
  second.exchange = absl::Microseconds(20);
  second.attention = absl::Microseconds(30);
  second.mlp = absl::Microseconds(40);
  std::vector<KvLayerTimes> sent(3);
  sent[2] = {At(705), At(900)};

  const v1::RankTrace trace = MakeRankTrace({Layer(1, At(400)), second}, sent, At(100), At(300), At(1000));

  EXPECT_EQ(trace.begin_us(), 200u);
  EXPECT_EQ(trace.end_us(), 900u);
  ASSERT_EQ(trace.layers_size(), 2);
  EXPECT_EQ(trace.layers(0).start_us(), 300u);
  EXPECT_EQ(trace.layers(0).egress_end_us(), 0u) << "it sent no block";
  const v1::LayerTrace& layer = trace.layers(1);
  EXPECT_EQ(layer.layer(), 2u);
  EXPECT_EQ(layer.start_us(), 600u);
  EXPECT_EQ(layer.egress_stall_us(), 5u);
  EXPECT_EQ(layer.project_us(), 10u);
  EXPECT_EQ(layer.exchange_us(), 20u);
  EXPECT_EQ(layer.attention_us(), 30u);
  EXPECT_EQ(layer.mlp_us(), 40u);
  EXPECT_EQ(layer.egress_start_us(), 605u);
  EXPECT_EQ(layer.egress_end_us(), 800u);
}

TEST(RankTraceTest, WhatIsNotKnownIsLeftOut) {
  const v1::RankTrace trace = MakeRankTrace({Layer(7, At(0))}, {}, At(100), At(50), At(60));
  EXPECT_EQ(trace.begin_us(), 0u) << "not before the receipt";
  EXPECT_EQ(trace.layers(0).start_us(), 0u);
  EXPECT_EQ(trace.layers(0).egress_end_us(), 0u);
}

}  // namespace
}  // namespace headwater::testing
