// Pattern search on the GPU against the double-precision reference.
#include "kernels/cuda/pattern.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

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
  double forced_density = 0;
  double near = kNear;

  int Positions() const { return 128 / (q_heads / kv_heads); }
  int Tiles() const { return (q_len + Positions() - 1) / Positions(); }
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

struct Result {
  std::vector<int32_t> counts, blocks;
  std::vector<int64_t> offsets;
  uint64_t used;
  uint32_t overflows;

  // Of a segment that is not dense.
  std::vector<int32_t> List(size_t segment) const {
    const auto begin = blocks.begin() + offsets[segment];
    return {begin, begin + counts[segment]};
  }
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

// What a tile sees, and the length that a forced density gives its list.
struct Forced {
  int64_t total, sinks, window_begin, length;
};

Forced ForcedOf(const Case& c, int tile) {
  const CudaSearchArgs defaults;
  const int64_t position =
      c.q_position == CudaAttentionArgs::kBottomRightAligned ? c.kv_len - c.q_len : c.q_position;
  const int64_t first = int64_t{tile} * c.Positions(),
                last = std::min<int64_t>(c.q_len, first + c.Positions());
  const int64_t complete = std::clamp<int64_t>(first + position + 1, 0, c.kv_len) / 128;
  const int64_t total = (std::clamp<int64_t>(last + position, 0, c.kv_len) + 127) / 128;
  const int64_t sinks = std::min<int64_t>(defaults.sink_blocks, total);
  const int64_t window_begin = std::max(sinks, std::min(total - defaults.window_blocks, complete));
  const auto wanted = static_cast<int64_t>(std::ceil(c.forced_density * static_cast<double>(total)));
  return {total, sinks, window_begin, std::max(wanted, sinks + total - window_begin)};
}

bool IsDense(const Case& c, int tile) {
  return c.dense_last_tokens > 0 && (tile + 1) * c.Positions() > c.q_len - c.dense_last_tokens;
}

// Room for lists: with a forced density just what they take.
size_t Capacity(const Case& c) {
  if (c.forced_density == 0) return static_cast<size_t>(c.kv_heads) * c.Tiles() * c.capacity_per_tile;
  int64_t entries = 0;
  for (int tile = 0; tile < c.Tiles(); ++tile) entries += IsDense(c, tile) ? 0 : ForcedOf(c, tile).length;
  return std::max<size_t>(1, static_cast<size_t>(entries) * c.kv_heads);
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
  if (c.forced_density > 0) {
    args.forced_density = c.forced_density;
    args.threshold = 0;
  }
  const size_t segments = static_cast<size_t>(c.Tiles()) * c.kv_heads;
  DeviceArray<int32_t> counts(segments), blocks(Capacity(c));
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

std::vector<reference::SelectedBlocks> Reference(const Case& c, const std::vector<float>& q,
                                                 const std::vector<float>& k) {
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
  args.forced_density = c.forced_density;
  return reference::SelectBlocks(args, c.near);
}

void ExpectMatchesReference(const Case& c, const std::vector<float>& q, const std::vector<float>& k) {
  Result got;

  const Status status = Select(c, q, k, &got, c.given_means);

  ASSERT_TRUE(status.ok()) << status.message();
  const std::vector<reference::SelectedBlocks> wanted = Reference(c, q, k);
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
    if (c.forced_density > 0) {
      ASSERT_EQ(got.counts[i], ForcedOf(c, static_cast<int>(i) % c.Tiles()).length) << "segment " << i;
    }
    const std::vector<int32_t> blocks = got.List(i);
    std::vector<int32_t> differ, unexplained;
    ASSERT_TRUE(std::is_sorted(blocks.begin(), blocks.end())) << "segment " << i;
    ASSERT_EQ(std::adjacent_find(blocks.begin(), blocks.end()), blocks.end()) << "segment " << i;
    std::set_symmetric_difference(blocks.begin(), blocks.end(), wanted[i].blocks.begin(),
                                  wanted[i].blocks.end(), std::back_inserter(differ));
    std::set_difference(differ.begin(), differ.end(), wanted[i].undecided.begin(), wanted[i].undecided.end(),
                        std::back_inserter(unexplained));
    ASSERT_TRUE(unexplained.empty()) << "segment " << i << ", block " << unexplained[0] << " of "
                                     << unexplained.size() << "; listed " << ::testing::PrintToString(blocks)
                                     << ", wanted " << ::testing::PrintToString(wanted[i].blocks);
  }
  EXPECT_EQ(got.used, used);
}

class CudaSelectBlocksGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaSelectBlocksGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();

  ExpectMatchesReference(c, Topics(c.q_len, c.q_heads, c.head_dim, 1.0f, 1),
                         Topics(c.kv_len, c.kv_heads, c.head_dim, 0.5f, 2));
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

// --- forced density ---

class ForcedDensityGpuTest : public ::testing::TestWithParam<std::tuple<Case, double>> {};

TEST_P(ForcedDensityGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  Case c = std::get<0>(GetParam());
  c.forced_density = std::get<1>(GetParam());

  ExpectMatchesReference(c, Topics(c.q_len, c.q_heads, c.head_dim, 1.0f, 1),
                         Topics(c.kv_len, c.kv_heads, c.head_dim, 0.5f, 2));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, ForcedDensityGpuTest,
    ::testing::Combine(
        ::testing::Values(
            Case{"one_token", 8, 2, 128, 1, 1}, Case{"one_block", 8, 2, 128, 128, 128, kAligned, 0},
            Case{"block_plus_1", 8, 2, 128, 129, 129, kAligned, 0}, Case{"mha", 2, 2, 128, 5003, 5003},
            Case{"mha_of_several_ctas", 2, 2, 64, 9001, 9001}, Case{"gqa2", 4, 2, 128, 5003, 5003},
            Case{"gqa3", 9, 3, 128, 3001, 3001}, Case{"gqa4", 8, 2, 128, 5003, 5003},
            Case{"gqa4_d64", 8, 2, 64, 5003, 5003}, Case{"gqa5", 5, 1, 128, 3001, 3001},
            Case{"gqa6", 6, 1, 64, 3001, 3001}, Case{"gqa7", 7, 1, 128, 3001, 3001},
            Case{"gqa7_d64", 14, 2, 64, 3001, 3001}, Case{"gqa8", 8, 1, 128, 5003, 5003},
            Case{"chunk", 8, 2, 128, 700, 5003}, Case{"chunk_in_the_middle", 8, 2, 128, 700, 5003, 2000},
            Case{"one_query", 8, 2, 128, 1, 5003, kAligned, 0},
            Case{"some_rows_see_nothing", 8, 2, 128, 1000, 700, -100, 0},
            Case{"everything_dense", 8, 2, 128, 2000, 2000, kAligned, 5000},
            Case{"given_means", 7, 1, 128, 700, 5003, kAligned, 32, 64, true}),
        ::testing::Values(0.01, 0.1, 0.5, 1.0)),
    [](const auto& test) {
      return std::string(std::get<0>(test.param).name) + "_percent_" +
             std::to_string(std::lround(100 * std::get<1>(test.param)));
    });

// Inputs as forced densities are for: all scores are close. Equal calls list equal blocks.
TEST(ForcedDensityGpuTest, RandomInputsOf64KTokens) {
  HW_REQUIRE_SM90();
  Case c{"", 4, 1, 128, 65536, 65536};
  c.forced_density = 0.1;
  c.near = 2e-4;
  const std::vector<float> q = RandomBf16(size_t{65536} * 4 * 128, 1), k = RandomBf16(size_t{65536} * 128, 2);
  ExpectMatchesReference(c, q, k);
  Result first, second;

  ASSERT_TRUE(Select(c, q, k, &first).ok());
  ASSERT_TRUE(Select(c, q, k, &second).ok());

  ASSERT_EQ(first.counts, second.counts);
  for (size_t i = 0; i < first.counts.size(); ++i) {
    if (first.counts[i] >= 0) {
      ASSERT_EQ(first.List(i), second.List(i)) << "segment " << i;
    }
  }
}

// Over 1,048,576 keys lists are made a section of the blocks at a time.
TEST(ForcedDensityGpuTest, SectionsOfManyBlocks) {
  HW_REQUIRE_SM90();
  for (const int keys : {1 << 20, (1 << 20) + 1, 1'100'000, 2'500'000}) {
    SCOPED_TRACE(keys);
    Case c{"", 2, 1, 64, 200, keys};
    c.forced_density = 0.03;
    c.near = 2e-4;

    ExpectMatchesReference(c, RandomBf16(size_t{200} * 2 * 64, 1),
                           RandomBf16(static_cast<size_t>(keys) * 64, 2));
  }
}

// Sinks, and then the last blocks: what a forced density lists where no score differs.
std::vector<int32_t> ListOfTies(const Forced& forced) {
  std::vector<int32_t> list;
  for (int64_t block = 0; block < forced.total; ++block) {
    if (block < forced.sinks || block >= forced.total - (forced.length - forced.sinks)) {
      list.push_back(static_cast<int32_t>(block));
    }
  }
  return list;
}

TEST(ForcedDensityGpuTest, OfEqualScoresTheHigherNumbersAreListed) {
  HW_REQUIRE_SM90();
  for (const double density : {0.01, 0.3, 0.5, 1.0}) {
    for (const int group : {1, 2, 4, 7}) {
      Case c{"", 2 * group, 2, 128, 5003, 5003, kAligned, 0};
      c.forced_density = density;
      Result got;

      const std::vector<float> q(size_t{5003} * c.q_heads * 128, 0.5f), k(size_t{5003} * 2 * 128, 0.25f);
      ASSERT_TRUE(Select(c, q, k, &got).ok());

      EXPECT_EQ(got.overflows, 0u);
      for (size_t i = 0; i < got.counts.size(); ++i) {
        const Forced forced = ForcedOf(c, static_cast<int>(i) % c.Tiles());
        ASSERT_EQ(got.counts[i], forced.length) << "segment " << i << ", group " << group << ", " << density;
        ASSERT_EQ(got.List(i), ListOfTies(forced))
            << "segment " << i << ", group " << group << ", " << density;
      }
    }
  }
}

TEST(ForcedDensityGpuTest, EqualScoresOfSeveralSections) {
  HW_REQUIRE_SM90();
  for (const double density : {0.02, 0.3, 0.9, 1.0}) {
    Case c{"", 4, 1, 64, 100, 2'200'000, kAligned, 0};
    c.forced_density = density;
    Result got;
    const std::vector<float> q(size_t{100} * 4 * 64, 0.5f), k(size_t{2'200'000} * 64, 0.25f);
    ASSERT_TRUE(Select(c, q, k, &got).ok());
    EXPECT_EQ(got.overflows, 0u);
    for (size_t i = 0; i < got.counts.size(); ++i) {
      ASSERT_EQ(got.List(i), ListOfTies(ForcedOf(c, static_cast<int>(i)))) << "tile " << i << ", " << density;
    }
  }
}

// Without a score blocks count as equal, so that lists keep their length; other tiles keep their lists.
TEST(ForcedDensityGpuTest, NanInAQueryKeepsTheLength) {
  HW_REQUIRE_SM90();
  Case c{"", 8, 2, 128, 5003, 5003, kAligned, 0};
  c.forced_density = 0.5;
  std::vector<float> q = Topics(c.q_len, 8, 128, 1.0f, 1);
  const std::vector<float> k = Topics(c.kv_len, 2, 128, 0.5f, 2);
  Result clean, spoilt;
  ASSERT_TRUE(Select(c, q, k, &clean).ok());
  for (int i = 0; i < 8 * 128; ++i) q[4000 * 8 * 128 + i] = std::nanf("");

  ASSERT_TRUE(Select(c, q, k, &spoilt).ok());

  ASSERT_EQ(spoilt.counts, clean.counts);
  for (size_t i = 0; i < clean.counts.size(); ++i) {
    const int tile = static_cast<int>(i) % c.Tiles();
    ASSERT_EQ(spoilt.List(i), tile == 4000 / 32 ? ListOfTies(ForcedOf(c, tile)) : clean.List(i))
        << "segment " << i;
  }
}

}  // namespace
}  // namespace headwater::kernels
