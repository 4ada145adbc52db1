#include "decode/generated_kv.h"

#include <cstring>

#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

GeneratedKv::Shape SmallShape(int64_t max_tokens = 1 << 20) {
  GeneratedKv::Shape shape;
  shape.num_layers = 2;
  shape.num_kv_heads = 3;
  shape.head_dim = 16;
  shape.dtype = kernels::DType::kBF16;
  shape.max_tokens = max_tokens;
  return shape;
}

constexpr uint64_t kTokenBytes = 3 * 16 * 2;
constexpr uint64_t kAllTensors = 4;

TEST(GeneratedKvTest, KeepsWhatIsThereWhenItGrows) {
  GeneratedKvBudget budget(uint64_t{1} << 30);
  GeneratedKv kv(SmallShape(), &budget);
  const auto byte_of = [](int layer, bool is_k, int64_t token) {
    return static_cast<char>(layer * 64 + (is_k ? 32 : 0) + token % 31);
  };

  for (int64_t token = 0; token < 3000; ++token) {
    ASSERT_TRUE(kv.Reserve(token + 1).ok());
    ASSERT_GE(kv.capacity_tokens(), token + 1);
    for (int layer = 0; layer < 2; ++layer) {
      const uint64_t offset = static_cast<uint64_t>(token) * kTokenBytes;
      std::memset(static_cast<char*>(kv.K(layer)) + offset, byte_of(layer, true, token), kTokenBytes);
      std::memset(static_cast<char*>(kv.V(layer)) + offset, byte_of(layer, false, token), kTokenBytes);
    }
  }

  for (int64_t token = 0; token < 3000; ++token) {
    const uint64_t last_byte = static_cast<uint64_t>(token + 1) * kTokenBytes - 1;
    for (int layer = 0; layer < 2; ++layer) {
      ASSERT_EQ(static_cast<char*>(kv.K(layer))[last_byte], byte_of(layer, true, token));
      ASSERT_EQ(static_cast<char*>(kv.V(layer))[last_byte], byte_of(layer, false, token));
    }
  }
}

TEST(GeneratedKvTest, ChargesTheBudgetInStepsAndReturnsAll) {
  GeneratedKvBudget budget(uint64_t{1} << 30);
  {
    GeneratedKv kv(SmallShape(), &budget);
    EXPECT_EQ(budget.used_bytes(), 0u);
    ASSERT_TRUE(kv.Reserve(1).ok());
    EXPECT_EQ(budget.used_bytes(), 64 * kTokenBytes * kAllTensors);
    ASSERT_TRUE(kv.Reserve(65).ok());
    EXPECT_EQ(budget.used_bytes(), 128 * kTokenBytes * kAllTensors);
    ASSERT_TRUE(kv.Reserve(2048).ok());
    ASSERT_TRUE(kv.Reserve(2049).ok());
    EXPECT_EQ(budget.used_bytes(), 3072 * kTokenBytes * kAllTensors) << "steps are at most 1024 tokens";
    EXPECT_EQ(kv.bytes(), budget.used_bytes());
  }
  EXPECT_EQ(budget.used_bytes(), 0u);
}

TEST(GeneratedKvTest, NamesBytesAskedAndAvailableWhenTheBudgetIsShort) {
  GeneratedKvBudget budget(100 * kTokenBytes * kAllTensors);
  GeneratedKv kv(SmallShape(), &budget);
  ASSERT_TRUE(kv.Reserve(10).ok());
  static_cast<char*>(kv.K(0))[0] = 7;

  const absl::Status status = kv.Reserve(65);

  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_KV_MEMORY_FULL);
  EXPECT_NE(status.message().find(std::to_string(64 * kTokenBytes * kAllTensors)), absl::string_view::npos);
  EXPECT_NE(status.message().find(std::to_string(36 * kTokenBytes * kAllTensors)), absl::string_view::npos);
  EXPECT_EQ(kv.capacity_tokens(), 64);
  EXPECT_EQ(static_cast<char*>(kv.K(0))[0], 7);
}

TEST(GeneratedKvTest, NeverReservesMoreThanTheModelsPositions) {
  GeneratedKvBudget budget(uint64_t{1} << 30);
  GeneratedKv kv(SmallShape(/*max_tokens=*/70), &budget);

  ASSERT_TRUE(kv.Reserve(1).ok());
  ASSERT_TRUE(kv.Reserve(65).ok());
  EXPECT_EQ(kv.capacity_tokens(), 70);
  EXPECT_EQ(kv.Reserve(71).code(), absl::StatusCode::kOutOfRange);
}

}  // namespace
}  // namespace headwater
