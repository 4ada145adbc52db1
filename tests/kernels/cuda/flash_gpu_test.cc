// FlashPrefill's selection on the GPU against the double-precision references.
#include "kernels/cuda/flash.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "gtest/gtest.h"

#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/policies/flash.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {
namespace {

using reference::Flash2Parameters;
using reference::FlashParameters;
using reference::FlashTile;

// log2 units. Of energies from equal means, in f32; energies this near the threshold may fall on either side.
constexpr double kEnergyError = 5e-5, kNear = 1e-3;
// Where means are the GPU's own: one of them may be rounded to the other neighbour in bf16.
constexpr double kNearOwnMeans = 0.01;

struct Case {
  const char* name;
  int64_t num_tokens;
  int32_t q_heads, kv_heads, head_dim;
  double alpha = 0.3;
  int32_t sink_blocks = 1, window_blocks = 2, dense_last = 1, min_blocks = 0;
  float loud = 1;  // queries are that many times normal
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// Normal; keys of a block share a part, so that blocks differ.
struct Inputs {
  std::vector<float> q, k, v;
  reference::PolicyProblem problem;
  Inputs(const Case& c, uint32_t seed)
      : q(RandomBf16(static_cast<size_t>(c.num_tokens * c.q_heads * c.head_dim), seed)),
        k(RandomBf16(static_cast<size_t>(c.num_tokens * c.kv_heads * c.head_dim), seed + 1)),
        v(RandomBf16(k.size(), seed + 2)) {
    const auto row = static_cast<size_t>(c.kv_heads * c.head_dim);
    const std::vector<float> shared =
        RandomBf16(static_cast<size_t>(CudaStatsBlocks(c.num_tokens)) * row, seed + 3);
    for (size_t i = 0; i < k.size(); ++i) k[i] += shared[i / (128 * row) * row + i % row];
    for (float& x : q) x *= c.loud;
    k = ToFloat(ToBf16(k));
    q = ToFloat(ToBf16(q));
    problem = {q.data(),  k.data(),   v.data(),   c.num_tokens,
               c.q_heads, c.kv_heads, c.head_dim, 1 / std::sqrt(static_cast<double>(c.head_dim))};
  }
};

FlashParameters V1(const Case& c) {
  return {c.alpha, c.sink_blocks, c.window_blocks, c.dense_last, c.min_blocks, false};
}
Flash2Parameters V2(const Case& c) {
  return {c.alpha, c.sink_blocks, c.window_blocks, c.dense_last, 0, 0, false};
}

// Stages of either version.
struct Wanted {
  reference::BlockMeans means;
  std::vector<FlashTile> tiles;
};

Wanted Reference(const Case& c, const Inputs& inputs, bool v2) {
  Wanted wanted;
  if (v2) {
    reference::Flash2Trace trace;
    EXPECT_TRUE(reference::Flash2Select(inputs.problem, V2(c), 0, &trace, nullptr).ok());
    wanted.means = trace.means;
    wanted.tiles.assign(trace.tiles.begin(), trace.tiles.end());
  } else {
    reference::FlashTrace trace;
    EXPECT_TRUE(reference::FlashSelect(inputs.problem, V1(c), &trace, nullptr).ok());
    wanted = {trace.means, trace.tiles};
  }
  return wanted;
}

// Blocks that one has and the other has not are close to the threshold, or of min_blocks's last energies.
void ExpectBlocks(const std::vector<int32_t>& got, const FlashTile& tile, double near, int32_t min_blocks,
                  const std::string& where) {
  std::vector<int32_t> differ;
  std::set_symmetric_difference(got.begin(), got.end(), tile.kept.begin(), tile.kept.end(),
                                std::back_inserter(differ));
  std::vector<double> sorted = tile.energy;
  std::sort(sorted.rbegin(), sorted.rend());
  const size_t last = std::min(sorted.size(), static_cast<size_t>(min_blocks));
  for (const int32_t block : differ) {
    ASSERT_LT(static_cast<size_t>(block), tile.energy.size()) << where << " block " << block;
    const double energy = std::log2(tile.energy[static_cast<size_t>(block)]);
    const bool by_threshold = std::abs(energy - std::log2(tile.threshold)) < near;
    const bool by_rank = last > 0 && std::abs(energy - std::log2(sorted[last - 1])) < near;
    ASSERT_TRUE(by_threshold || by_rank) << where << " block " << block << " of energy 2^" << energy
                                         << ", threshold 2^" << std::log2(tile.threshold);
  }
}

struct Selected {
  std::vector<uint32_t> words;
  std::vector<float> energies;
  CudaBlockMasks masks;
  std::vector<int32_t> Blocks(size_t segment, int64_t visible) const {
    std::vector<int32_t> blocks;
    for (int32_t block = 0; block < visible; ++block) {
      const uint32_t word = words[segment * static_cast<size_t>(masks.tile_words()) + block / 32];
      if ((word >> block % 32 & 1) != 0) blocks.push_back(block);
    }
    return blocks;
  }
};

// With the means given.
Selected Select(const Case& c, const Inputs& inputs, const std::vector<float>& means, bool v2) {
  DeviceArray<uint16_t> q(ToBf16(inputs.q)), k_means(ToBf16(means));
  CudaFlashArgs args;
  args.q = q.data();
  args.k_means = k_means.data();
  args.mean_rows = CudaStatsBlocks(c.num_tokens);
  args.num_tokens = c.num_tokens;
  args.num_q_heads = c.q_heads;
  args.num_kv_heads = c.kv_heads;
  args.head_dim = c.head_dim;
  args.softmax_scale = static_cast<float>(inputs.problem.softmax_scale);
  args.per_query_head = !v2;
  args.alpha = c.alpha;
  args.sink_blocks = c.sink_blocks;
  args.window_blocks = c.window_blocks;
  args.dense_last_tiles = c.dense_last;
  args.min_blocks = v2 ? 0 : c.min_blocks;
  args.masks = CudaBlockMasksOf(c.num_tokens, c.q_heads, c.kv_heads, !v2);
  DeviceArray<uint32_t> words(args.masks.bytes() / 4);
  DeviceArray<float> energies(
      static_cast<size_t>(args.masks.num_lists * args.masks.tiles() * args.masks.blocks()));
  args.masks.words = words.data();
  args.energies_log2 = energies.data();

  const Status status = CudaFlashSelect(args, nullptr);

  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(words.Intact() && energies.Intact());
  return {words.Host(), energies.Host(), args.masks};
}

int64_t Visible(const CudaBlockMasks& masks, int64_t tile) {
  return (std::min(masks.num_tokens, (tile + 1) * masks.tile_positions) + 127) / 128;
}

void ExpectSelection(const Case& c, bool v2) {
  const Inputs inputs(c, 1);
  const Wanted wanted = Reference(c, inputs, v2);
  const Selected got = Select(c, inputs, wanted.means.values, v2),
                 again = Select(c, inputs, wanted.means.values, v2);
  const auto tiles = static_cast<size_t>(got.masks.tiles());
  ASSERT_EQ(wanted.tiles.size(), static_cast<size_t>(got.masks.num_lists) * tiles);
  double worst = 0;
  for (size_t i = 0; i < wanted.tiles.size(); ++i) {
    const FlashTile& tile = wanted.tiles[i];
    const std::string where = "list " + std::to_string(i / tiles) + " tile " + std::to_string(i % tiles);
    const int64_t visible = Visible(got.masks, static_cast<int64_t>(i % tiles));
    const std::vector<int32_t> blocks = got.Blocks(i, visible);
    if (tile.dense) {
      EXPECT_EQ(static_cast<int64_t>(blocks.size()), visible) << where;
      continue;
    }
    ExpectBlocks(blocks, tile, kNear, v2 ? 0 : c.min_blocks, where);
    for (size_t block = 0; block < tile.energy.size(); ++block) {
      const double energy = got.energies[i * static_cast<size_t>(got.masks.blocks()) + block],
                   exact = std::log2(tile.energy[block]) + tile.top;
      if (tile.energy[block] == 0) {
        // Nobody sees it, or it lies below the smallest double.
        EXPECT_TRUE(std::isinf(energy) || energy < tile.top - 1000) << where << " block " << block;
      } else {
        worst = std::max(worst, std::abs(energy - exact) / std::max(1.0, std::abs(exact) / 64));
      }
    }
    EXPECT_EQ(blocks, again.Blocks(i, visible)) << where;
  }
  EXPECT_LT(worst, kEnergyError);
  EXPECT_TRUE(SameBits(got.energies, again.energies));
}

class CudaFlashGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaFlashGpuTest, V1MatchesReference) {
  HW_REQUIRE_SM90();
  ExpectSelection(GetParam(), false);
}

TEST_P(CudaFlashGpuTest, V2MatchesReference) {
  HW_REQUIRE_SM90();
  ExpectSelection(GetParam(), true);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaFlashGpuTest,
    ::testing::Values(
        Case{"one_token", 1, 8, 2, 128}, Case{"one_token_sparse", 1, 2, 2, 64, 0.3, 0, 1, 0},
        Case{"under_a_block", 127, 4, 4, 64, 0.3, 0, 1, 0}, Case{"one_block", 128, 8, 2, 128, 0.3, 0, 1, 0},
        Case{"block_plus_1", 129, 8, 1, 128, 0.3, 0, 1, 0}, Case{"ragged", 2777, 8, 2, 128, 0.3, 1, 2, 0},
        Case{"mha", 1500, 3, 3, 64, 0.1, 0, 1, 0}, Case{"gqa3", 1700, 6, 2, 128, 0.3, 0, 1, 0},
        Case{"gqa5", 1300, 5, 1, 64, 0.2, 0, 1, 0}, Case{"gqa7", 1300, 7, 1, 128, 0.2, 0, 1, 0},
        Case{"gqa8", 3000, 16, 2, 128, 0.3, 2, 4, 8}, Case{"dense_last", 1500, 4, 1, 128, 0.3, 1, 2, 100},
        Case{"wide_window", 1500, 4, 1, 128, 0.9, 0, 1 << 20, 1},
        Case{"all_kept", 1500, 4, 1, 128, 0.0, 0, 1, 0}, Case{"best_alone", 1500, 4, 1, 128, 1.0, 0, 1, 0},
        Case{"least_5", 3000, 4, 1, 64, 1.0, 0, 1, 1, 5},
        Case{"least_all", 900, 2, 1, 64, 1.0, 0, 1, 1, 1000},
        Case{"loud", 2000, 4, 2, 128, 0.3, 1, 2, 1, 3, 30}, Case{"long", 41000, 2, 1, 64, 0.3, 2, 4, 2}),
    [](const auto& test) { return test.param.name; });

// Queries of zeros score every block alike.
TEST(CudaFlashGpuTest, OfEqualEnergiesTheLowerBlocksAreKept) {
  HW_REQUIRE_SM90();
  const Case c{"", 2048, 1, 1, 64, 1.0, 0, 1, 0, 5};
  Inputs inputs(c, 1);
  std::fill(inputs.q.begin(), inputs.q.end(), 0.0f);
  const Selected got = Select(c, inputs, RandomBf16(16 * 64, 3), false);

  // All rows see blocks under the tile's own, whose energy is log2(128); one row sees the own block.
  for (size_t tile = 0; tile < 16; ++tile) {
    std::vector<int32_t> wanted;
    for (int32_t block = 0; block <= static_cast<int32_t>(tile); ++block) wanted.push_back(block);
    EXPECT_EQ(got.Blocks(tile, static_cast<int64_t>(tile) + 1), wanted);
  }
  // One query prefers block 7, so that the threshold keeps it alone: five largest are it and the lowest four.
  for (int i = 0; i < 64; ++i) inputs.q[static_cast<size_t>(12 * 128 * 64 + i)] = i == 0 ? 64 : 0;
  std::vector<float> means(16 * 64, 0.0f);
  means[7 * 64] = 1;

  const Selected one = Select(c, inputs, means, false);

  EXPECT_EQ(one.Blocks(12, 13), (std::vector<int32_t>{0, 1, 2, 3, 7, 12}));
}

// A NaN in a query leaves its own tile what is always kept, and other tiles alone.
TEST(CudaFlashGpuTest, NanInAQueryLeavesForcedBlocks) {
  HW_REQUIRE_SM90();
  const Case c{"", 2000, 4, 2, 128, 0.3, 1, 2, 0};
  Inputs inputs(c, 1);
  const std::vector<float> means = reference::MeanOfKeyBlocks(inputs.problem).values;
  for (const bool v2 : {false, true}) {
    const Selected clean = Select(c, inputs, means, v2);
    Inputs spoilt(c, 1);
    spoilt.q[1400 * 4 * 128] = std::numeric_limits<float>::quiet_NaN();  // head 0
    const Selected got = Select(c, spoilt, means, v2);
    const int64_t tiles = got.masks.tiles();
    for (int64_t segment = 0; segment < got.masks.num_lists * tiles; ++segment) {
      const int64_t tile = segment % tiles, visible = Visible(got.masks, tile);
      const auto blocks = got.Blocks(static_cast<size_t>(segment), visible);
      if (segment == 1400 / got.masks.tile_positions) {
        EXPECT_EQ(blocks, (std::vector<int32_t>{0, 9, 10}));
      } else {
        EXPECT_EQ(blocks, clean.Blocks(static_cast<size_t>(segment), visible));
      }
    }
  }
}

// The longest prompt: queries of zeros, to which all blocks are alike.
TEST(CudaFlashGpuTest, LongestPrompt) {
  HW_REQUIRE_SM90();
  DeviceArray<uint16_t> q(size_t{kCudaFlashMostTokens} * 64),
      k_means(size_t{kCudaFlashMostTokens} / 128 * 64);
  ASSERT_EQ(cudaMemset(q.data(), 0, q.Bytes()), cudaSuccess);
  ASSERT_EQ(cudaMemset(k_means.data(), 0, k_means.Bytes()), cudaSuccess);
  CudaListsOfMasksArgs lists;
  lists.masks = CudaBlockMasksOf(kCudaFlashMostTokens, 1, 1, true);
  const auto tiles = static_cast<size_t>(lists.masks.tiles());
  DeviceArray<uint32_t> words(lists.masks.bytes() / 4), overflows(1);
  DeviceArray<int32_t> counts(tiles), blocks(1);
  DeviceArray<int64_t> offsets(tiles);
  DeviceArray<uint64_t> visited(1);
  CudaFlashArgs args;
  args.q = q.data();
  args.k_means = k_means.data();
  args.mean_rows = lists.masks.blocks();
  args.num_tokens = kCudaFlashMostTokens;
  args.num_q_heads = args.num_kv_heads = 1;
  args.head_dim = 64;
  args.softmax_scale = 0.125f;
  args.per_query_head = true;
  args.alpha = 1;
  lists.masks.words = words.data();
  args.masks = lists.masks;
  lists.counts = counts.data();
  lists.offsets = offsets.data();
  lists.blocks = blocks.data();
  lists.capacity = 1;
  lists.visited = visited.data();
  lists.overflows = overflows.data();

  const Status status = CudaFlashSelect(args, nullptr), listed = CudaListsOfMasks(lists, nullptr);

  ASSERT_TRUE(status.ok() && listed.ok()) << status.message() << listed.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(counts.Host(), std::vector<int32_t>(tiles, -1));
  EXPECT_EQ(visited.Host()[0], CudaPossibleBlocks(lists.masks));
  EXPECT_EQ(overflows.Host()[0], 0u);
  EXPECT_TRUE(words.Intact() && blocks.Intact());
}

// --- policies ---

struct Memory {
  DeviceArray<unsigned char> bytes;
  Memory(const CudaPolicy& policy, int64_t num_tokens) : bytes(policy.MemoryBytes(num_tokens)) {}
};

template <typename T>
std::vector<T> FromDevice(const void* from, size_t count) {
  std::vector<T> values(count);
  EXPECT_EQ(cudaMemcpy(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
  return values;
}

void ExpectMeans(const reference::BlockMeans& wanted, const void* table, const Case& c) {
  const int64_t rows = CudaMeanTableRows(c.num_tokens);
  const std::vector<float> got =
      ToFloat(FromDevice<uint16_t>(table, static_cast<size_t>(rows * c.kv_heads * c.head_dim)));
  for (int32_t head = 0; head < c.kv_heads; ++head) {
    for (int64_t block = 0; block < wanted.num_blocks; ++block) {
      for (int32_t i = 0; i < c.head_dim; ++i) {
        const float want = wanted.Of(head, block)[i];
        ASSERT_NEAR(got[static_cast<size_t>((head * rows + block) * c.head_dim + i)], want,
                    std::abs(want) / 128 + 1e-6);
      }
    }
  }
}

void ExpectPolicy(const Case& c, bool v2) {
  const Inputs inputs(c, 5);
  const Wanted wanted = Reference(c, inputs, v2);
  const CudaPolicyShape shape{8, c.q_heads, c.kv_heads, c.head_dim,
                              static_cast<float>(inputs.problem.softmax_scale)};
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE((v2 ? MakeCudaFlash2(V2(c), shape, &policy) : MakeCudaFlash(V1(c), shape, &policy)).ok());
  Memory memory(*policy, c.num_tokens);
  ASSERT_TRUE(policy->Begin(c.num_tokens, memory.bytes.data(), memory.bytes.size(), nullptr).ok());
  DeviceArray<uint16_t> q(ToBf16(inputs.q)), k(ToBf16(inputs.k)), v(ToBf16(inputs.v));
  CudaSelection selection;

  const Status status = policy->Select({7, q.data(), k.data(), v.data()}, nullptr, &selection);

  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(memory.bytes.Intact());
  const CudaBlockMasks masks = CudaBlockMasksOf(c.num_tokens, c.q_heads, c.kv_heads, !v2);
  ASSERT_EQ(selection.lists.num_lists, masks.num_lists);
  const auto tiles = static_cast<size_t>(masks.tiles());
  const auto counts = FromDevice<int32_t>(selection.lists.counts, wanted.tiles.size());
  const auto offsets = FromDevice<int64_t>(selection.lists.offsets, wanted.tiles.size());
  uint64_t visited = 0;
  for (size_t i = 0; i < wanted.tiles.size(); ++i) {
    const std::string where = "list " + std::to_string(i / tiles) + " tile " + std::to_string(i % tiles);
    const int64_t visible = Visible(masks, static_cast<int64_t>(i % tiles));
    visited += static_cast<uint64_t>(counts[i] < 0 ? visible : counts[i]);
    if (wanted.tiles[i].dense) {
      EXPECT_EQ(counts[i], -1) << where;
      continue;
    }
    std::vector<int32_t> blocks;
    for (int32_t block = 0; counts[i] < 0 && block < visible; ++block) blocks.push_back(block);
    if (counts[i] > 0) {
      blocks = FromDevice<int32_t>(selection.lists.blocks + offsets[i], static_cast<size_t>(counts[i]));
    }
    ExpectBlocks(blocks, wanted.tiles[i], kNearOwnMeans, v2 ? 0 : c.min_blocks, where);
  }
  EXPECT_EQ(FromDevice<uint64_t>(selection.visited, 1)[0], visited);
  EXPECT_EQ(FromDevice<uint32_t>(selection.overflows, 1)[0], 0u);
  EXPECT_EQ(selection.possible, CudaPossibleBlocks(masks));
  EXPECT_EQ(selection.correction.k_means != nullptr, v2);
  if (!v2) return;
  ExpectMeans(wanted.means, selection.correction.k_means, c);
  reference::PolicyProblem values = inputs.problem;
  values.k = inputs.v.data();
  ExpectMeans(reference::MeanOfKeyBlocks(values), selection.correction.v_means, c);
}

class CudaFlashPolicyGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaFlashPolicyGpuTest, V1MatchesReference) {
  HW_REQUIRE_SM90();
  ExpectPolicy(GetParam(), false);
}

TEST_P(CudaFlashPolicyGpuTest, V2MatchesReference) {
  HW_REQUIRE_SM90();
  ExpectPolicy(GetParam(), true);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaFlashPolicyGpuTest,
                         ::testing::Values(Case{"one_token", 1, 8, 2, 128, 0.3, 0, 1, 0},
                                           Case{"ragged", 2777, 8, 2, 128, 0.18, 2, 4, 2},
                                           Case{"gqa3", 1700, 6, 2, 64, 0.1, 0, 1, 0},
                                           Case{"gqa8_least", 3000, 8, 1, 128, 0.5, 0, 1, 8, 6},
                                           Case{"mha", 9000, 2, 2, 128, 0.1, 2, 4, 8}),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace headwater::kernels
