// Pattern search on the GPU against the double-precision reference.
#include "kernels/cuda/pattern.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "gtest/gtest.h"

#include "kernels/cuda/block_stats.h"
#include "kernels/reference/select_blocks.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {
namespace {

// f32 scores of bf16 means: what lies closer to the threshold (log2 units) may be decided either way.
constexpr double kNear = 0.01;

struct Case {
  const char* name;
  int q_heads, kv_heads, head_dim, q_len, kv_len;
  int q_position = CudaAttentionArgs::kBottomRightAligned;
  int dense_last_tokens = 32;
  int capacity_per_tile = 64;
  bool given_means = false;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

struct Result {
  std::vector<int32_t> counts, blocks;
  std::vector<int64_t> offsets;
  uint64_t used;
  uint32_t overflows;
};

// Queries and keys of a few topics, so that some blocks stand out.
std::vector<float> Topics(int tokens, int heads, int dim, float strength, uint32_t seed) {
  std::vector<float> x = RandomBf16(static_cast<size_t>(tokens) * heads * dim, seed);
  const std::vector<float> topics = RandomBf16(size_t{7} * dim, 99);
  for (int token = 0; token < tokens; ++token) {
    const int topic = token / 200 * 5 % 7;
    for (int i = 0; i < heads * dim; ++i) {
      x[static_cast<size_t>(token) * heads * dim + i] += strength * topics[topic * dim + i % dim];
    }
  }
  return ToFloat(ToBf16(x));
}

// given_means: K's means come from a table in place of K itself.
Status Select(const Case& c, const std::vector<float>& q, const std::vector<float>& k, Result* result,
              bool given_means = false) {
  DeviceArray<uint16_t> dq(ToBf16(q)), dk(ToBf16(k));
  DeviceArray<float> mean(static_cast<size_t>(CudaStatsBlocks(c.kv_len)) * c.kv_heads * c.head_dim);
  DeviceArray<uint16_t> table(static_cast<size_t>(CudaMeanTableRows(c.kv_len)) * c.kv_heads * c.head_dim);
  if (given_means) {
    CudaBlockStats stats;
    stats.k_mean = mean.data();
    HW_KERNELS_RETURN_IF_ERROR(
        CudaBlockStatistics({dk.data(), nullptr, c.kv_len, c.kv_heads, c.head_dim, 0, stats}, nullptr));
    HW_KERNELS_RETURN_IF_ERROR(CudaMeanTables(
        {mean.data(), nullptr, table.data(), nullptr, c.kv_len, c.kv_heads, c.head_dim}, nullptr));
  }
  CudaSearchArgs args;
  args.q = dq.data();
  args.k = given_means ? nullptr : dk.data();
  args.k_means = given_means ? table.data() : nullptr;
  args.total_q = c.q_len;
  args.total_k = c.kv_len;
  args.num_q_heads = c.q_heads;
  args.num_kv_heads = c.kv_heads;
  args.head_dim = c.head_dim;
  args.softmax_scale = static_cast<float>(1 / std::sqrt(c.head_dim));
  args.query_position = c.q_position;
  args.dense_last_tokens = c.dense_last_tokens;
  const int positions = 128 / (c.q_heads / c.kv_heads);
  const size_t segments = static_cast<size_t>((c.q_len + positions - 1) / positions) * c.kv_heads;
  DeviceArray<int32_t> counts(segments), blocks(segments * c.capacity_per_tile);
  DeviceArray<int64_t> offsets(segments);
  DeviceArray<uint64_t> used(1);
  DeviceArray<uint32_t> overflows(1);
  args.counts = counts.data();
  args.offsets = offsets.data();
  args.blocks = blocks.data();
  args.capacity = static_cast<int64_t>(blocks.size());
  args.used = used.data();
  args.overflows = overflows.data();
  DeviceArray<unsigned char> workspace(CudaSearchWorkspaceBytes(args));
  EXPECT_EQ(CudaSearchTiles(args) * c.kv_heads, static_cast<int64_t>(segments));
  const Status status = CudaSelectBlocks(args, workspace.data(), workspace.size(), nullptr);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(counts.Intact() && blocks.Intact() && offsets.Intact() && workspace.Intact());
  *result = {counts.Host(), blocks.Host(), offsets.Host(), used.Host()[0], overflows.Host()[0]};
  return status;
}

class CudaSelectBlocksGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaSelectBlocksGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const std::vector<float> q = Topics(c.q_len, c.q_heads, c.head_dim, 1.0f, 1);
  const std::vector<float> k = Topics(c.kv_len, c.kv_heads, c.head_dim, 0.5f, 2);
  reference::SelectBlocksArgs args;
  args.q = q.data();
  args.k = k.data();
  args.total_q = c.q_len;
  args.total_k = c.kv_len;
  args.num_q_heads = c.q_heads;
  args.num_kv_heads = c.kv_heads;
  args.head_dim = c.head_dim;
  args.softmax_scale = 1 / std::sqrt(c.head_dim);
  args.query_position =
      c.q_position == CudaAttentionArgs::kBottomRightAligned ? c.kv_len - c.q_len : c.q_position;
  args.threshold = CudaSearchArgs().threshold;
  args.sink_blocks = CudaSearchArgs().sink_blocks;
  args.window_blocks = CudaSearchArgs().window_blocks;
  args.dense_last_tokens = c.dense_last_tokens;
  Result got;

  const Status status = Select(c, q, k, &got, c.given_means);

  ASSERT_TRUE(status.ok()) << status.message();
  const std::vector<reference::SelectedBlocks> wanted = reference::SelectBlocks(args, kNear);
  ASSERT_EQ(got.counts.size(), wanted.size());
  EXPECT_EQ(got.overflows, 0u);
  uint64_t used = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i].dense) {
      EXPECT_EQ(got.counts[i], -1) << "segment " << i;
      continue;
    }
    ASSERT_GE(got.counts[i], 0) << "segment " << i;
    used += static_cast<uint64_t>(got.counts[i]);
    const auto begin = got.blocks.begin() + got.offsets[i];
    std::vector<int32_t> blocks(begin, begin + got.counts[i]), differ, unexplained;
    ASSERT_TRUE(std::is_sorted(blocks.begin(), blocks.end())) << "segment " << i;
    ASSERT_EQ(std::adjacent_find(blocks.begin(), blocks.end()), blocks.end()) << "segment " << i;
    std::set_symmetric_difference(blocks.begin(), blocks.end(), wanted[i].blocks.begin(),
                                  wanted[i].blocks.end(), std::back_inserter(differ));
    std::set_difference(differ.begin(), differ.end(), wanted[i].undecided.begin(), wanted[i].undecided.end(),
                        std::back_inserter(unexplained));
    ASSERT_TRUE(unexplained.empty()) << "segment " << i << ", block " << unexplained[0];
  }
  EXPECT_EQ(got.used, used);
}

constexpr int kAligned = CudaAttentionArgs::kBottomRightAligned;
INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaSelectBlocksGpuTest,
    ::testing::Values(Case{"one_token", 8, 2, 128, 1, 1}, Case{"one_block", 8, 2, 128, 128, 128},
                      Case{"block_plus_1", 8, 2, 128, 129, 129}, Case{"ragged", 8, 2, 128, 5003, 5003},
                      Case{"chunk", 8, 2, 128, 700, 5003}, Case{"one_query", 8, 2, 128, 1, 5003},
                      Case{"gqa3", 9, 3, 128, 3001, 3001}, Case{"gqa5", 5, 1, 128, 3001, 3001},
                      Case{"gqa7", 7, 1, 64, 3001, 3001}, Case{"mha", 2, 2, 64, 3001, 3001},
                      Case{"gqa8", 8, 1, 128, 40000, 40000},
                      Case{"some_rows_see_nothing", 8, 2, 128, 1000, 700, -100},
                      Case{"nobody_sees_anything", 8, 2, 128, 100, 200, -100},
                      Case{"nothing_dense", 8, 2, 128, 2000, 2000, kAligned, 0},
                      Case{"everything_dense", 8, 2, 128, 2000, 2000, kAligned, 5000},
                      Case{"given_means", 8, 2, 128, 700, 5003, kAligned, 32, 64, true},
                      Case{"given_means_d64", 9, 3, 64, 3001, 3001, kAligned, 32, 64, true}),
    [](const auto& test) { return test.param.name; });

TEST(CudaSelectBlocksGpuTest, TilesWithoutRoomGoDenseAndAreCounted) {
  HW_REQUIRE_SM90();
  const Case c{"", 8, 2, 128, 5003, 5003, kAligned, 32, 1};
  Result got;

  ASSERT_TRUE(Select(c, Topics(c.q_len, 8, 128, 1.0f, 1), Topics(c.kv_len, 2, 128, 0.5f, 2), &got).ok());

  const auto dense = static_cast<uint32_t>(std::count(got.counts.begin(), got.counts.end(), -1));
  EXPECT_GT(got.overflows, 0u);
  // The last two tiles of each list are dense by request.
  EXPECT_EQ(got.overflows + 4, dense);
  for (size_t i = 0; i < got.counts.size(); ++i) {
    if (got.counts[i] > 0) {
      EXPECT_LE(got.offsets[i] + got.counts[i], static_cast<int64_t>(got.blocks.size()));
    }
  }
}

// A NaN in one query spoils at most what its own tile lists.
TEST(CudaSelectBlocksGpuTest, NanInAQueryLeavesForcedBlocks) {
  HW_REQUIRE_SM90();
  const Case c{"", 8, 2, 128, 2000, 2000, kAligned, 0};
  std::vector<float> q = Topics(c.q_len, 8, 128, 1.0f, 1);
  const std::vector<float> k = Topics(c.kv_len, 2, 128, 0.5f, 2);
  Result clean, spoilt;
  ASSERT_TRUE(Select(c, q, k, &clean).ok());
  for (int i = 0; i < 8 * 128; ++i) q[1600 * 8 * 128 + i] = std::nanf("");

  ASSERT_TRUE(Select(c, q, k, &spoilt).ok());

  const size_t tiles = (2000 + 31) / 32;
  for (size_t i = 0; i < clean.counts.size(); ++i) {
    if (i % tiles == 1600 / 32) {
      EXPECT_EQ(spoilt.counts[i], 6);  // two sinks, a window of four
    } else {
      EXPECT_EQ(spoilt.counts[i], clean.counts[i]) << "segment " << i;
    }
  }
}

}  // namespace
}  // namespace headwater::kernels
