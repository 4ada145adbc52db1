// A-shape on the GPU against double precision, and times of the policies of ranges.
#include <cstdlib>

#include "gtest/gtest.h"

#include "kernels/cuda/policies/a_shape.h"
#include "kernels/cuda/policies/vertical_slash.h"
#include "tests/kernels/cuda/vertical_slash_stages.h"

namespace headwater::kernels {
namespace {

class AShapeGpuTest : public ::testing::TestWithParam<std::tuple<Shape, AShapeParameters>> {};

TEST_P(AShapeGpuTest, IsExactToTheToken) {
  HW_REQUIRE_SM90();
  const auto& [shape, parameters] = GetParam();
  const RangeProblem problem(shape, 5);
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE(MakeCudaAShape(parameters, shape.Policy(), &policy).ok());
  DeviceArray<char> memory(policy->MemoryBytes(shape.tokens));
  CudaSelection selection;

  ASSERT_TRUE(policy->Begin(shape.tokens, memory.data(), memory.size(), nullptr).ok());
  ASSERT_TRUE(policy->Select(problem.Layer(), nullptr, &selection).ok());

  ASSERT_NE(selection.ranges, nullptr);
  const int64_t sinks = parameters.sink_tokens, window = parameters.window_tokens;
  problem.ExpectAttention(*selection.ranges, [&](int, int row) {
    std::vector<int64_t> keys;
    for (int64_t key = 0; key <= row; ++key) {
      if (key < sinks || key > row - window) keys.push_back(key);
    }
    return keys;
  });
  EXPECT_TRUE(memory.Intact());
  int64_t steps = 0;
  for (int64_t tile = 0; tile < shape.Tiles(); ++tile) {
    for (int64_t block = 0; block <= tile; ++block) {
      steps += block * 64 < sinks || block * 64 + 63 > tile * 64 - window ? shape.q_heads : 0;
    }
  }
  uint64_t visited = 0;
  ASSERT_EQ(cudaMemcpy(&visited, selection.visited, 8, cudaMemcpyDefault), cudaSuccess);
  EXPECT_EQ(visited, static_cast<uint64_t>(steps));
  EXPECT_LE(visited, selection.possible);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AShapeGpuTest,
    ::testing::Combine(::testing::Values(Shape{"one_token", 4, 2, 128, 1}, Shape{"t129", 3, 1, 64, 129},
                                         Shape{"t1500", 8, 1, 128, 1500}, Shape{"t2001_d64", 2, 2, 64, 2001}),
                       ::testing::Values(AShapeParameters{128, 3968}, AShapeParameters{0, 1},
                                         AShapeParameters{1, 2}, AShapeParameters{64, 64},
                                         AShapeParameters{100, 800}, AShapeParameters{5, 1 << 22},
                                         AShapeParameters{1 << 22, 1}, AShapeParameters{65, 127})),
    [](const auto& test) {
      const auto& parameters = std::get<1>(test.param);
      return std::string(std::get<0>(test.param).name) + "_" + std::to_string(parameters.sink_tokens) + "_" +
             std::to_string(parameters.window_tokens);
    });

double Milliseconds(const std::function<Status()>& call) {
  cudaEvent_t begin, end;
  EXPECT_EQ(cudaEventCreate(&begin), cudaSuccess);
  EXPECT_EQ(cudaEventCreate(&end), cudaSuccess);
  float best = INFINITY;
  for (int run = 0; run < 3; ++run) {
    EXPECT_EQ(cudaEventRecord(begin), cudaSuccess);
    EXPECT_TRUE(call().ok());
    EXPECT_EQ(cudaEventRecord(end), cudaSuccess);
    EXPECT_EQ(cudaEventSynchronize(end), cudaSuccess);
    float took = 0;
    EXPECT_EQ(cudaEventElapsedTime(&took, begin, end), cudaSuccess);
    best = std::min(best, took);
  }
  EXPECT_EQ(cudaEventDestroy(begin), cudaSuccess);
  EXPECT_EQ(cudaEventDestroy(end), cudaSuccess);
  return best;
}

// Prints times where HW_TIME_TOKENS says of how many tokens.
TEST(RangePoliciesGpuTest, Times) {
  HW_REQUIRE_SM90();
  const char* const wanted = std::getenv("HW_TIME_TOKENS");
  if (wanted == nullptr) GTEST_SKIP() << "HW_TIME_TOKENS is not set";
  const int tokens = std::atoi(wanted);
  for (const Shape& shape : {Shape{"8 heads", 8, 2, 128, tokens}, Shape{"32 heads", 32, 8, 128, tokens}}) {
    const size_t row = size_t{1021} * 128;
    std::vector<uint16_t> few = ToBf16(RandomBf16(row, 1));
    std::vector<uint16_t> many(size_t{1} * tokens * shape.q_heads * 128);
    for (size_t i = 0; i < many.size(); ++i) many[i] = few[(i + i / row * 7) % row];
    DeviceArray<uint16_t> q(many), out(many.size());
    many.resize(many.size() / 4);
    std::rotate(many.begin(), many.begin() + 777, many.end());
    DeviceArray<uint16_t> k(many);
    const CudaPolicyLayer layer = {0, q.data(), k.data(), k.data()};
    CudaRangeAttentionArgs args = {
        q.data(), k.data(),      k.data(),       out.data(), nullptr,
        tokens,   shape.q_heads, shape.kv_heads, 128,        shape.Policy().softmax_scale,
        {}};
    std::unique_ptr<CudaPolicy> policy;
    const auto report = [&](const char* name, const Status& made) {
      ASSERT_TRUE(made.ok());
      DeviceArray<char> memory(policy->MemoryBytes(tokens));
      CudaSelection selection;
      ASSERT_TRUE(policy->Begin(tokens, memory.data(), memory.size(), nullptr).ok());
      const double select = Milliseconds([&] { return policy->Select(layer, nullptr, &selection); });
      args.ranges = *selection.ranges;
      const double attention = Milliseconds([&] { return CudaRangeAttention(args, nullptr); });
      uint64_t visited = 0;
      uint32_t overflows = 0;
      EXPECT_EQ(cudaMemcpy(&visited, selection.visited, 8, cudaMemcpyDefault), cudaSuccess);
      if (selection.overflows != nullptr) {
        EXPECT_EQ(cudaMemcpy(&overflows, selection.overflows, 4, cudaMemcpyDefault), cudaSuccess);
      }
      std::printf(
          "%s, %s: memory %.0f MB, select %.3f ms, attention %.3f ms, density %.3f, %u overflows, "
          "%.0f TFLOP/s\n",
          shape.name, name, static_cast<double>(memory.size()) / 1e6, select, attention,
          static_cast<double>(visited) / static_cast<double>(selection.possible), overflows,
          static_cast<double>(visited) * 64 * 64 * 4 * 128 / attention / 1e9);
    };
    report("A-shape", MakeCudaAShape({}, shape.Policy(), &policy));
    report("dense", MakeCudaAShape({0, 1 << 22}, shape.Policy(), &policy));
    report("vertical-slash", MakeCudaVerticalSlash({}, shape.Policy(), &policy));
    report("vertical-slash 1000 300", MakeCudaVerticalSlash(Budget(1000, 300), shape.Policy(), &policy));
    report("vertical-slash 3500 100", MakeCudaVerticalSlash(Budget(3500, 100), shape.Policy(), &policy));

    Stages stages(Budget(1000, 6096), shape.q_heads, tokens, 1 << 26);
    const CudaTailProfileArgs rows = stages.ProfileArgs(shape, q.data(), k.data());
    DeviceArray<char> workspace(CudaTailProfileWorkspaceBytes(rows));
    std::printf("%s: last rows %.3f ms", shape.name, Milliseconds([&] {
                  return CudaTailProfile(rows, workspace.data(), workspace.size(), nullptr);
                }));
    std::printf(", choice %.3f ms", Milliseconds([&] { return stages.Choose(); }));
    std::printf(", merge %.3f ms\n", Milliseconds([&] { return stages.Merge(); }));
  }
}

}  // namespace
}  // namespace headwater::kernels
