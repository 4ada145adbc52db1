// Block statistics and mean tables on the GPU against the double-precision reference.
#include "kernels/cuda/block_stats.h"

#include <cmath>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/reference/block_stats.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"
#include "tests/kernels/cuda/stats_arrays.h"

namespace headwater::kernels {
namespace {

// 128 f32 additions.
constexpr double kSumError = 2e-6;

struct Case {
  const char* name;
  int heads, head_dim, tokens;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// Rows with a mean, so that means are not noise.
std::vector<float> Values(const Case& c, uint32_t seed) {
  std::vector<float> x = RandomBf16(static_cast<size_t>(c.tokens) * c.heads * c.head_dim, seed);
  for (size_t i = 0; i < x.size(); ++i) x[i] += static_cast<float>(i % 7);
  return ToFloat(ToBf16(x));
}

struct Problem {
  Case c;
  std::vector<float> k, v;
  DeviceArray<uint16_t> dk, dv;

  explicit Problem(const Case& test_case)
      : c(test_case), k(Values(c, 1)), v(Values(c, 2)), dk(ToBf16(k)), dv(ToBf16(v)) {}

  CudaBlockStatsArgs Args(const StatsArrays& arrays) const {
    CudaBlockStatsArgs args;
    args.k = dk.data();
    args.v = dv.data();
    args.total_k = c.tokens;
    args.num_kv_heads = c.heads;
    args.head_dim = c.head_dim;
    args.stats = arrays.Views();
    return args;
  }
};

void Execute(const CudaBlockStatsArgs& args) {
  const Status status = CudaBlockStatistics(args, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

std::vector<float> Floats(const std::vector<double>& values) { return {values.begin(), values.end()}; }

class CudaBlockStatsGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaBlockStatsGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const Problem problem(GetParam());
  const Case& c = problem.c;
  const StatsArrays got(c.tokens, c.heads, c.head_dim);

  Execute(problem.Args(got));

  EXPECT_TRUE(got.Intact());
  const auto k = reference::BlockStatistics(problem.k.data(), c.tokens, c.heads, c.head_dim);
  const auto v = reference::BlockStatistics(problem.v.data(), c.tokens, c.heads, c.head_dim);
  EXPECT_LE(WorstError(got.wide(0).Host(), k.mean, 1), kSumError);
  EXPECT_LE(WorstError(got.wide(1).Host(), v.mean, 1), kSumError);
  EXPECT_TRUE(SameBits(got.wide(2).Host(), Floats(k.min)));
  EXPECT_TRUE(SameBits(got.wide(3).Host(), Floats(k.max)));
  EXPECT_LE(WorstError(got.narrow(0).Host(), k.mean_square, 0), kSumError);
  EXPECT_LE(WorstError(got.narrow(1).Host(), v.mean_square, 0), kSumError);
  EXPECT_LE(WorstError(got.narrow(2).Host(), k.max_norm, 0), kSumError);
  EXPECT_LE(WorstError(got.narrow(3).Host(), v.max_norm, 0), kSumError);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaBlockStatsGpuTest,
                         ::testing::Values(Case{"one_token", 8, 128, 1}, Case{"block_minus_1", 8, 128, 127},
                                           Case{"block", 8, 128, 128}, Case{"block_plus_1", 8, 128, 129},
                                           Case{"ragged", 2, 128, 8191}, Case{"one_token_64", 3, 64, 1},
                                           Case{"block_minus_1_64", 3, 64, 127},
                                           Case{"block_plus_1_64", 3, 64, 129},
                                           Case{"ragged_64", 1, 64, 5003}, Case{"many_heads", 40, 128, 300}),
                         [](const auto& test) { return test.param.name; });

// Chunks that end inside a block are finished by the next one.
TEST(CudaBlockStatsGpuTest, ChunkByChunkGivesTheSameBits) {
  HW_REQUIRE_SM90();
  for (const int head_dim : {64, 128}) {
    const Problem problem({"", 3, head_dim, 2999});
    const StatsArrays whole(2999, 3, head_dim), chunked(2999, 3, head_dim);
    Execute(problem.Args(whole));

    int64_t done = 0;
    for (const int64_t end : {1, 128, 300, 1024, 1025, 2900, 2999}) {
      CudaBlockStatsArgs args = problem.Args(chunked);
      args.first_token = done / 128 * 128;
      args.total_k = done = end;
      Execute(args);
    }

    chunked.ExpectSameBits(whole);
    EXPECT_TRUE(chunked.Intact());
  }
}

TEST(CudaBlockStatsGpuTest, OnlyWantedStatisticsOfNewBlocksAreWritten) {
  HW_REQUIRE_SM90();
  const Problem problem({"", 2, 128, 600});
  const StatsArrays all(600, 2, 128), some(600, 2, 128);
  Execute(problem.Args(all));
  CudaBlockStatsArgs args = problem.Args(some);
  args.first_token = 256;
  args.stats = {};
  args.stats.v_mean = some.wide(1).data();
  args.stats.k_max_norm = some.narrow(2).data();

  Execute(args);

  std::vector<float> wanted = all.wide(1).Host();
  std::memset(wanted.data(), 0xFF, size_t{2} * 2 * 128 * sizeof(float));
  EXPECT_TRUE(SameBits(some.wide(1).Host(), wanted));
  wanted = all.narrow(2).Host();
  std::memset(wanted.data(), 0xFF, size_t{2} * 2 * sizeof(float));
  EXPECT_TRUE(SameBits(some.narrow(2).Host(), wanted));
  for (const size_t untouched : {0, 2, 3}) {
    EXPECT_TRUE(std::isnan(some.wide(untouched).Host()[5 * 2 * 128 - 1])) << untouched;
  }
  EXPECT_TRUE(some.Intact());
}

// V alone needs no K.
TEST(CudaBlockStatsGpuTest, OneOfKAndVMayBeNull) {
  HW_REQUIRE_SM90();
  const Problem problem({"", 3, 64, 200});
  const StatsArrays all(200, 3, 64), some(200, 3, 64);
  Execute(problem.Args(all));
  CudaBlockStatsArgs args = problem.Args(some);
  args.k = nullptr;
  args.stats = {};
  args.stats.v_mean = some.wide(1).data();
  args.stats.v_max_norm = some.narrow(3).data();

  Execute(args);

  EXPECT_TRUE(SameBits(some.wide(1).Host(), all.wide(1).Host()));
  EXPECT_TRUE(SameBits(some.narrow(3).Host(), all.narrow(3).Host()));
}

TEST(CudaBlockStatsGpuTest, NanSpoilsItsBlockAndHeadOnly) {
  HW_REQUIRE_SM90();
  Problem problem({"", 3, 128, 500});
  problem.k[(200 * 3 + 1) * 128 + 77] = std::nanf("");  // block 1, head 1
  const DeviceArray<uint16_t> spoilt(ToBf16(problem.k));
  const StatsArrays got(500, 3, 128);
  CudaBlockStatsArgs args = problem.Args(got);
  args.k = spoilt.data();

  Execute(args);

  const auto k = reference::BlockStatistics(problem.k.data(), 500, 3, 128);
  EXPECT_TRUE(std::isnan(k.mean[(3 + 1) * 128 + 77]) && !std::isnan(k.mean[(3 + 1) * 128 + 78]));
  EXPECT_LE(WorstError(got.wide(0).Host(), k.mean, 1), kSumError);
  EXPECT_LE(WorstError(got.wide(2).Host(), k.min, 0), 0);
  EXPECT_LE(WorstError(got.wide(3).Host(), k.max, 0), 0);
  EXPECT_LE(WorstError(got.narrow(0).Host(), k.mean_square, 0), kSumError);
  EXPECT_LE(WorstError(got.narrow(2).Host(), k.max_norm, 0), kSumError);
}

TEST(CudaMeanTablesGpuTest, MatchReference) {
  HW_REQUIRE_SM90();
  for (const int head_dim : {64, 128}) {
    for (const int tokens : {1, 128, 129, 1023, 1024, 1025, 8192, 8193, 20000}) {
      SCOPED_TRACE(testing::Message() << tokens << " tokens, head_dim " << head_dim);
      constexpr int kHeads = 3;
      const auto elements = static_cast<size_t>(CudaStatsBlocks(tokens) * kHeads * head_dim);
      std::vector<float> means[2] = {RandomBf16(elements, 1), RandomBf16(elements, 2)};
      for (auto& mean : means) {
        for (float& value : mean) value *= 1.001f;  // bf16 no longer holds it
      }
      const DeviceArray<float> k_mean(means[0]), v_mean(means[1]);
      const auto rows = static_cast<size_t>(CudaMeanTableRows(tokens));
      const DeviceArray<uint16_t> k_table(kHeads * rows * head_dim), v_table(kHeads * rows * head_dim);
      CudaMeanTablesArgs args{k_mean.data(), v_mean.data(), k_table.data(), v_table.data(),
                              tokens,        kHeads,        head_dim};

      const Status status = CudaMeanTables(args, nullptr);

      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      EXPECT_TRUE(k_table.Intact() && v_table.Intact());
      EXPECT_LE(WorstError(ToFloat(k_table.Host()),
                           reference::MeanTable(means[0].data(), tokens, kHeads, head_dim), 1e-3),
                kBf16Error);
      EXPECT_LE(WorstError(ToFloat(v_table.Host()),
                           reference::MeanTable(means[1].data(), tokens, kHeads, head_dim), 1e-3),
                kBf16Error);
    }
  }
}

TEST(CudaMeanTablesGpuTest, OneTableAlone) {
  HW_REQUIRE_SM90();
  const std::vector<float> mean = RandomBf16(size_t{3} * 2 * 64, 1);
  const DeviceArray<float> v_mean(mean);
  const DeviceArray<uint16_t> v_table(size_t{2} * 16 * 64);
  CudaMeanTablesArgs args;
  args.v_mean = v_mean.data();
  args.v_table = v_table.data();
  args.total_k = 300;
  args.num_kv_heads = 2;
  args.head_dim = 64;

  ASSERT_TRUE(CudaMeanTables(args, nullptr).ok());

  EXPECT_LE(WorstError(ToFloat(v_table.Host()), reference::MeanTable(mean.data(), 300, 2, 64), 1e-3),
            kBf16Error);
}

}  // namespace
}  // namespace headwater::kernels
