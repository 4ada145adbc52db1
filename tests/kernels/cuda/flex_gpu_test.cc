// FlexPrefill's policy on the GPU against the reference, from Q and K to masks.
#include "kernels/cuda/policies/flex.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "gtest/gtest.h"

#include "kernels/cuda/block_stats.h"
#include "kernels/reference/policies/flex.h"
#include "tests/kernels/cuda/flex_bounds.h"
#include "tests/kernels/cuda/flex_problem.h"

namespace headwater::kernels {
namespace {

using reference::FlexParameters;

struct Case {
  const char* name;
  int tokens, q_heads, kv_heads, head_dim;
  FlexParameters parameters;
  float strength = 1;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

FlexParameters Parameters(double gamma, double tau, int64_t min_tokens, int64_t max_tokens = 0,
                          bool nan_rule = true) {
  FlexParameters p;
  p.gamma = gamma;
  p.tau = tau;
  p.min_budget_tokens = min_tokens;
  p.max_budget_tokens = max_tokens;
  p.compat.nan_rule = nan_rule;
  return p;
}

std::vector<uint32_t> Select(const Case& c, const FlexProblem& problem, int times = 1) {
  FlexPolicy policy(c.parameters, {1, c.q_heads, c.kv_heads, c.head_dim, 0.5f});
  DeviceArray<unsigned char> memory(policy.MemoryBytes(c.tokens));
  CudaSelection selection;
  Status status = policy.Begin(c.tokens, memory.data(), memory.size(), nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  for (int i = 0; i < times; ++i) {
    status = policy.Select({i, problem.dq.data(), problem.dk.data(), nullptr}, nullptr, &selection);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(memory.Intact());
  EXPECT_EQ(selection.lists.num_lists, c.q_heads);
  std::vector<uint32_t> masks(policy.masks().bytes() / 4);
  EXPECT_EQ(cudaMemcpy(masks.data(), policy.masks().words, policy.masks().bytes(), cudaMemcpyDeviceToHost),
            cudaSuccess);
  return masks;
}

FlexRange Wanted(const Case& c, const FlexProblem& problem, int head) {
  const FlexScored scored(problem.problem, c.parameters, head);
  EXPECT_GT(std::fabs(scored.least.js_distance - c.parameters.tau), kNearGate) << "the case decides nothing";
  FlexRange range = ColumnsAndOffsets(scored, scored.least.query_aware);
  if (scored.least.query_aware) AddPooled(problem.problem, scored, head, &range);
  return range;
}

class FlexPolicyGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(FlexPolicyGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const FlexProblem problem(c.tokens, c.q_heads, c.kv_heads, c.head_dim, c.strength);

  const std::vector<uint32_t> got = Select(c, problem), again = Select(c, problem, 2);

  EXPECT_EQ(got, again);
  const int64_t blocks = problem.Blocks(), words = blocks * ((blocks + 31) / 32);
  for (int h = 0; h < c.q_heads; ++h) {
    SCOPED_TRACE("head " + std::to_string(h));
    int64_t undecided = 0;
    ExpectMask(&got[h * words], Wanted(c, problem, h), &undecided);
    EXPECT_LE(undecided, blocks * 4) << "the case decides too little";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, FlexPolicyGpuTest,
    ::testing::Values(Case{"just_over_dense", 257, 4, 2, 128, Parameters(0.9, 0.1, 1)},
                      Case{"defaults", 3001, 4, 2, 128, FlexParameters()},
                      Case{"small_budget", 5003, 8, 2, 128, Parameters(0.5, 0.1, 128)},
                      Case{"capped", 5003, 4, 1, 64, Parameters(0.95, 0.1, 256, 1024)},
                      Case{"peaked", 4000, 8, 1, 128, Parameters(0.9, 0.1, 128), 3},
                      Case{"query_aware", 5003, 6, 2, 128, Parameters(0.6, 1, 128, 0, false)},
                      Case{"query_aware_d64", 7000, 4, 4, 64, Parameters(0.9, 1, 512, 0, false), 2},
                      Case{"no_tau", 5003, 3, 1, 128, Parameters(0.8, 0, 128)}),
    [](const auto& test) { return test.param.name; });

// The least of a few times of a call, in milliseconds.
float Milliseconds(const std::function<Status()>& call) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float least = INFINITY;
  for (int i = 0; i < 5; ++i) {
    cudaEventRecord(begin);
    const Status status = call();
    EXPECT_TRUE(status.ok()) << status.message();
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    least = std::min(least, ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return least;
}

void TimePolicy(int64_t tokens, int heads) {
  constexpr int kDim = 128;
  const std::vector<uint16_t> some = ToBf16(RandomBf16(size_t{1} << 22, 5));
  DeviceArray<uint16_t> q(static_cast<size_t>(tokens * heads * kDim)), k(q.size() / 4);
  for (DeviceArray<uint16_t>* x : {&q, &k}) {
    for (size_t at = 0; at < x->size(); at += some.size()) {
      const size_t bytes = std::min(some.size(), x->size() - at) * 2;
      ASSERT_EQ(cudaMemcpy(x->data() + at, some.data(), bytes, cudaMemcpyHostToDevice), cudaSuccess);
    }
  }
  const auto print = [&](const char* what, const std::function<Status()>& call) {
    std::printf("%d heads: %s %.3f ms\n", heads, what, static_cast<double>(Milliseconds(call)));
  };
  for (const double tau : {0.0, 1e-9, 1.0}) {
    FlexPolicy policy(Parameters(0.9, tau, 1024, 0, false), {1, heads, heads / 4, kDim, 0.1f});
    DeviceArray<unsigned char> memory(policy.MemoryBytes(tokens));
    ASSERT_TRUE(policy.Begin(tokens, memory.data(), memory.size(), nullptr).ok());
    CudaSelection selection;
    const std::string what = "all of selection, tau " + std::to_string(tau);
    print(what.c_str(), [&] { return policy.Select({0, q.data(), k.data(), nullptr}, nullptr, &selection); });
  }
  DeviceArray<float> profile(static_cast<size_t>(2 * tokens * heads));
  DeviceArray<int64_t> counts(2 * heads);
  CudaTailProfileArgs args{q.data(), k.data(), tokens, heads, heads / 4, kDim, 128, 0.088f, 1.0f / 128};
  args.vertical = profile.data();
  args.slash = profile.data() + tokens * heads;
  const CudaCoverArgs cover{profile.data(), tokens, 2 * heads, 0.9, 1, counts.data()};
  DeviceArray<unsigned char> workspace(
      std::max(CudaTailProfileWorkspaceBytes(args), CudaCoverWorkspaceBytes(cover)));
  const auto profiled = [&] { return CudaTailProfile(args, workspace.data(), workspace.size(), nullptr); };
  print("tail profile", profiled);
  args.rows = 64;
  print("tail profile of 64 rows", profiled);
  args.rows = 1;
  print("tail profile of 1 row", profiled);
  args.rows = 128;
  EXPECT_TRUE(profiled().ok());
  print("cover", [&] { return CudaCover(cover, workspace.data(), workspace.size(), nullptr); });
  DeviceArray<float> k_mean(static_cast<size_t>((tokens + 127) / 128 * heads / 4 * kDim));
  CudaBlockStats stats;
  stats.k_mean = k_mean.data();
  print("means of K", [&] {
    return CudaBlockStatistics({k.data(), nullptr, tokens, heads / 4, kDim, 0, stats}, nullptr);
  });
}

// HW_FLEX_TIMING=tokens prints what selection costs.
TEST(FlexPolicyTimingGpuTest, Stages) {
  HW_REQUIRE_SM90();
  const char* const asked = std::getenv("HW_FLEX_TIMING");
  if (asked == nullptr) GTEST_SKIP() << "HW_FLEX_TIMING is not set";
  for (const int heads : {8, 32}) TimePolicy(std::atoll(asked), heads);
}

}  // namespace
}  // namespace headwater::kernels
