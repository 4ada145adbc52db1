#include "worker/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "worker/checkpoint.h"
#include "worker/partition.h"

namespace headwater {
namespace {

using kernels::DType;
using testing::HasSubstr;

MemoryShape Shape(DType compute) {
  MemoryShape shape;
  shape.hidden_size = 576;
  shape.num_q_heads = 9;
  shape.num_kv_heads = 3;
  shape.head_dim = 64;
  shape.vocab_size = 49152;
  shape.max_position = 8192;
  shape.compute = compute;
  shape.egress_buffers = 3;
  shape.scratch_bytes = 12345678;
  return shape;
}

uint64_t Linear(const v1::MemoryModel& model, int64_t tokens) {
  return model.fixed_bytes() + static_cast<uint64_t>(tokens) * model.bytes_per_token();
}

uint64_t GroupBytes(const v1::MemoryModel& model, int64_t tokens) {
  return static_cast<uint64_t>(tokens) * model.group_bytes_per_token();
}

TEST(MemoryPlanTest, CountsEveryBuffer) {
  const MemoryPlan plan = PlanMemory(Shape(DType::kF32), DType::kBF16, 100, 150, 250, 2);

  EXPECT_EQ(plan.hidden, 100u * 576 * 4);
  EXPECT_EQ(plan.attention, 100u * 9 * 64 * 4);
  EXPECT_EQ(plan.lse, 100u * 9 * 4);
  EXPECT_EQ(plan.q, 100u * 9 * 64 * 4);
  EXPECT_EQ(plan.compute_kv, 2u * 100 * 3 * 64 * 4);
  EXPECT_EQ(plan.egress_kv, 2u * 100 * 3 * 64 * 2);
  EXPECT_EQ(plan.num_egress, 3);
  EXPECT_EQ(plan.receive_kv, 2u * 150 * 3 * 64 * 4);
  EXPECT_EQ(plan.num_receive, 1);
  EXPECT_GE(plan.total_bytes(), plan.arena_bytes() + plan.scratch + plan.index + plan.tokens);
}

TEST(MemoryPlanTest, TakesNoSecondCopyWhenWireAndComputeTypesAreEqual) {
  EXPECT_EQ(PlanMemory(Shape(DType::kBF16), DType::kBF16, 100, 100, 100, 1).compute_kv, 0u);
  EXPECT_EQ(PlanMemory(Shape(DType::kBF16), DType::kBF16, 100, 100, 100, 1).num_receive, 0);
  EXPECT_EQ(PlanMemory(Shape(DType::kBF16), DType::kBF16, 100, 100, 100, 3).num_receive, 2);
}

TEST(MemoryPlanTest, SparseTakesAPackedChunkAndTheSelectionsOfAllRanks) {
  const auto plan = [](int world, v1::Strategy strategy) {
    return PlanMemory(Shape(DType::kF32), DType::kBF16, 100, 150, 3000, world, 0, strategy);
  };
  const MemoryPlan sparse = plan(3, v1::STRATEGY_SPARSE);
  EXPECT_EQ(sparse.send_kv, 2u * 100 * 3 * 64 * 4);
  // 24 blocks of 3 heads are 72 bits, two words.
  EXPECT_EQ(sparse.selection, 3u * 2 * 8);
  for (const auto& [world, strategy] :
       {std::pair(3, v1::STRATEGY_RING), {3, v1::STRATEGY_ALLGATHER}, {1, v1::STRATEGY_SPARSE}}) {
    EXPECT_EQ(plan(world, strategy).send_kv, 0u);
    EXPECT_EQ(plan(world, strategy).selection, 0u);
  }
  EXPECT_EQ(sparse.arena_bytes(), plan(3, v1::STRATEGY_ALLGATHER).arena_bytes() + sparse.send_kv + 64);
}

TEST(MemoryPlanTest, ARankOfTheLargestGroupFitsTheLinearModel) {
  const MemoryShape shape = Shape(DType::kBF16);
  const v1::MemoryModel model = LinearMemoryModel(shape, 1, 0);
  const MemoryPlan plan =
      PlanMemory(shape, DType::kF32, 32, 32, shape.max_position, kMaxWorldSize, 0, v1::STRATEGY_SPARSE);
  EXPECT_LE(plan.total_bytes(), Linear(model, 32) + GroupBytes(model, 32));
}

TEST(MemoryPlanTest, LinearModelIsAnUpperBoundOfEveryPlan) {
  for (const DType compute : {DType::kF32, DType::kBF16}) {
    for (const int egress : {1, 3, 8}) {
      MemoryShape shape = Shape(compute);
      shape.egress_buffers = egress;
      const v1::MemoryModel model = LinearMemoryModel(shape, 1, 0);
      for (const DType wire : {DType::kF32, DType::kF16, DType::kBF16}) {
        for (const auto kind : {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED}) {
          for (const int world : {1, 2, 3, 4, 8}) {
            for (int64_t tokens = 1; tokens <= shape.max_position; tokens = tokens * 5 / 4 + 1) {
              const auto ranks = PartitionTokens(tokens, world, kind, 16);
              ASSERT_TRUE(ranks.ok());
              int64_t most = 0;
              for (const RankTokens& rank : *ranks) most = std::max(most, NumTokens(rank));
              for (const RankTokens& rank : *ranks) {
                const MemoryPlan plan = PlanMemory(shape, wire, NumTokens(rank), most, tokens, world);
                ASSERT_LE(plan.total_bytes(), Linear(model, most))
                    << tokens << " tokens, " << world << " ranks";
                const MemoryPlan sparse =
                    PlanMemory(shape, wire, NumTokens(rank), most, tokens, world, 0, v1::STRATEGY_SPARSE);
                ASSERT_LE(sparse.total_bytes(),
                          Linear(model, most) + (world > 1 ? GroupBytes(model, most) : 0))
                    << tokens << " tokens, " << world << " ranks";
              }
            }
          }
        }
      }
    }
  }
}

TEST(MemoryPlanTest, ACheckpointCountsForGroupsAndForWhoGoesOnFromOne) {
  MemoryShape shape = Shape(DType::kF32);
  EXPECT_EQ(PlanMemory(shape, DType::kBF16, 100, 150, 250, 2).checkpoint, 0u);
  shape.checkpoints = true;
  EXPECT_EQ(PlanMemory(shape, DType::kBF16, 250, 250, 250, 1).checkpoint, 0u);
  EXPECT_EQ(PlanMemory(shape, DType::kBF16, 100, 150, 250, 2).checkpoint, 2u * (100 + 150) * 576 * 4);
  EXPECT_EQ(PlanMemory(shape, DType::kBF16, 250, 250, 250, 1, 250).checkpoint, 250u * 576 * 4);
  const MemoryPlan plan = PlanMemory(shape, DType::kBF16, 100, 150, 250, 2);
  EXPECT_GE(plan.total_bytes(),
            plan.arena_bytes() + plan.scratch + plan.index + plan.tokens + plan.checkpoint);

  const v1::MemoryModel model = LinearMemoryModel(shape, 1, 0);
  for (const int64_t tokens : {16, 1000, 8192}) {
    for (const int before : {2, 3, 8}) {
      const int64_t held = MostCheckpointTokens(*PartitionTokens(tokens, before, v1::PARTITION_ZIGZAG, 16));
      for (const int world : {1, 2, 7}) {
        int64_t most = 0;
        const auto ranks = PartitionTokens(tokens, world, v1::PARTITION_ZIGZAG, 16);
        for (const RankTokens& rank : *ranks) most = std::max(most, NumTokens(rank));
        if (held > 4 * most) continue;
        EXPECT_LE(PlanMemory(shape, DType::kF32, most, most, tokens, world, held).total_bytes(),
                  Linear(model, most) + GroupBytes(model, most));
      }
    }
  }
}

TEST(MemoryPlanTest, LinearModelIsNotFarAboveThePlan) {
  const MemoryShape shape = Shape(DType::kF32);
  const MemoryPlan plan = PlanMemory(shape, DType::kF32, 4096, 4096, 8192, 2);

  EXPECT_LE(static_cast<double>(Linear(LinearMemoryModel(shape, 1, 0), 4096)),
            1.15 * static_cast<double>(plan.total_bytes()));
}

TEST(MemoryPlanTest, SaturatesInsteadOfWrapping) {
  MemoryShape shape = Shape(DType::kF32);
  shape.hidden_size = int64_t{1} << 40;
  shape.scratch_bytes = uint64_t{1} << 63;
  const MemoryPlan plan =
      PlanMemory(shape, DType::kF32, int64_t{1} << 40, int64_t{1} << 40, int64_t{1} << 40, 4);

  EXPECT_EQ(plan.hidden, uint64_t{1} << 63);
  EXPECT_EQ(plan.total_bytes(), uint64_t{1} << 63);
  EXPECT_FALSE(CheckMemoryPlan(plan, uint64_t{1} << 62, 0).ok());
}

TEST(MemoryPlanTest, RefusesWithBytesAskedAndAvailable) {
  const MemoryPlan plan = PlanMemory(Shape(DType::kF32), DType::kF32, 100, 100, 100, 1);
  const uint64_t asked = plan.total_bytes();

  EXPECT_TRUE(CheckMemoryPlan(plan, asked + 1000, 1000).ok());
  const absl::Status status = CheckMemoryPlan(plan, asked + 999, 1000);

  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(asked)));
  EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(asked - 1)));
  EXPECT_FALSE(CheckMemoryPlan(plan, 10, 1000).ok());
}

}  // namespace
}  // namespace headwater
