// The C interface where memory runs out: a status each time, and no exception.
#include <string>

#include <gtest/gtest.h>

#include "kernels/headwater_kernels.h"
#include "tests/kernels/failing_new.h"

namespace {

using headwater::testing::FailingNew;

hw_policy_config Config(const char* name) {
  hw_policy_config config{};
  config.struct_size = sizeof config;
  config.name = name;
  config.num_layers = 2;
  config.num_q_heads = 8;
  config.num_kv_heads = 2;
  config.head_dim = 128;
  config.softmax_scale = 0.1f;
  return config;
}

TEST(CApiTest, APolicyForWhichThereIsNoMemoryIsAStatus) {
  for (const char* const name : {"share", "headwater", "flex", "nonsense"}) {
    const hw_policy_config config = Config(name);
    hw_status last = HW_RESOURCE_EXHAUSTED;
    for (int64_t allowed = 0; last == HW_RESOURCE_EXHAUSTED; ++allowed) {
      ASSERT_LT(allowed, 1000) << name;
      hw_policy* policy = nullptr;
      {
        const FailingNew failing(allowed);
        last = hw_policy_create(&config, &policy);
      }
      EXPECT_EQ(policy != nullptr, last == HW_OK) << name;
      EXPECT_TRUE(last == HW_OK || *hw_last_error() != 0) << name;
      hw_policy_destroy(policy);
    }
    EXPECT_EQ(last, std::string(name) == "nonsense" ? HW_INVALID_ARGUMENT : HW_OK);
  }
}

TEST(CApiTest, SizesAndRefusalsNeedNoMemory) {
  const hw_policy_config config = Config("flex");
  hw_policy* policy = nullptr;
  ASSERT_EQ(hw_policy_create(&config, &policy), HW_OK) << hw_last_error();
  const size_t memory = hw_policy_memory_bytes(policy, 1 << 17);
  EXPECT_GT(memory, 0u);
  {
    const FailingNew failing(0);
    EXPECT_TRUE(hw_policy_memory_bytes(policy, 1 << 17) == memory ||
                hw_policy_memory_bytes(policy, 1 << 17) == 0);
    (void)hw_policy_workspace_bytes(policy, 1 << 17);
    EXPECT_EQ(hw_policy_begin(policy, 1 << 17, nullptr, 0, nullptr), HW_RESOURCE_EXHAUSTED);
    EXPECT_STREQ(hw_last_error(), "no memory");
    EXPECT_NE(hw_policy_attention(policy, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, nullptr,
                                  nullptr),
              HW_OK);
  }
  hw_policy_destroy(policy);
}

TEST(CApiTest, ALinearForWhichThereIsNoMemoryIsAStatus) {
  hw_linear* linear = nullptr;
  {
    const FailingNew failing(0);
    EXPECT_EQ(hw_linear_create(nullptr, &linear), HW_RESOURCE_EXHAUSTED);
    hw_linear_options options{};
    options.struct_size = sizeof options;
    EXPECT_EQ(hw_linear_create(&options, &linear), HW_RESOURCE_EXHAUSTED);
    hw_linear_args args{};
    args.struct_size = sizeof args;
    EXPECT_EQ(hw_linear_run(nullptr, &args, nullptr), HW_RESOURCE_EXHAUSTED);
  }
  EXPECT_EQ(linear, nullptr);
  EXPECT_STREQ(hw_last_error(), "no memory");
}

}  // namespace
