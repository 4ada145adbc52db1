// The references' C interface where memory runs out: a status each time, and no exception.
#include <vector>

#include <gtest/gtest.h>

#include "kernels/headwater_reference.h"
#include "tests/kernels/failing_new.h"

namespace {

using headwater::testing::FailingNew;

// What a call returns that may make `allowed` allocations, with more and more of them until it does not fail.
template <typename Call>
void RunsOutUntilItDoesNot(const char* name, Call call) {
  hw_status last = HW_RESOURCE_EXHAUSTED;
  for (int64_t allowed = 0; last == HW_RESOURCE_EXHAUSTED; ++allowed) {
    ASSERT_LT(allowed, 100'000) << name;
    const FailingNew failing(allowed);
    last = call();
  }
  EXPECT_EQ(last, HW_OK) << name << ": " << hw_reference_last_error();
}

TEST(ReferenceCApiTest, NoMemoryIsAStatus) {
  constexpr int32_t kTokens = 300;
  const std::vector<float> x(kTokens * 2 * 16, 0.5f);
  for (const char* const name : {"a_shape", "flash", "flex", "vertical_slash", "xattention"}) {
    hw_policy_config config{};
    config.struct_size = sizeof config;
    config.name = name;
    config.num_layers = 1;
    config.num_q_heads = config.num_kv_heads = 2;
    config.head_dim = 16;
    config.softmax_scale = 0.25f;
    hw_reference* reference = nullptr;
    RunsOutUntilItDoesNot(name, [&] { return hw_reference_create(&config, &reference); });
    ASSERT_NE(reference, nullptr) << name;
    RunsOutUntilItDoesNot(name, [&] {
      hw_reference_lists lists{};
      lists.struct_size = sizeof lists;
      return hw_reference_select(reference, 0, kTokens, x.data(), x.data(), x.data(), &lists);
    });
    hw_reference_destroy(reference);
  }
}

}  // namespace
