// Attention masses on the GPU against the double-precision reference.
#include "kernels/cuda/block_mass.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "gtest/gtest.h"

#include "kernels/reference/block_mass.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"
#include "tests/kernels/cuda/timing.h"
#include "tests/kernels/policies/random_problem.h"

namespace headwater::kernels {
namespace {

constexpr double kMassError = 1e-4, kMassScale = 1e-9;

struct Case {
  const char* name;
  int tokens, q_heads, kv_heads, head_dim;

  int Blocks() const { return (tokens + 127) / 128; }
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// Keys of some blocks are longer, so that masses differ by orders of magnitude.
struct OnDevice {
  explicit OnDevice(const Case& c) : problem(Made(c)), q(ToBf16(problem.q)), k(ToBf16(problem.k)) {
    problem.q = ToFloat(ToBf16(problem.q));
    problem.k = ToFloat(ToBf16(problem.k));
    problem.Point();
    args = {q.data(),
            k.data(),
            c.tokens,
            c.q_heads,
            c.kv_heads,
            c.head_dim,
            static_cast<float>(problem.get.softmax_scale)};
    std::vector<float> lse_of(static_cast<size_t>(c.tokens) * c.q_heads);
    for (int head = 0; head < c.q_heads; ++head) {
      lses.push_back(reference::LogSumExp(problem.get, head));
      for (int i = 0; i < c.tokens; ++i) lse_of[i * c.q_heads + head] = static_cast<float>(lses[head][i]);
    }
    lse = std::make_unique<DeviceArray<float>>(lse_of);
  }
  static reference::RandomProblem Made(const Case& c) {
    reference::RandomProblem made(c.tokens, c.q_heads, c.kv_heads, c.head_dim);
    for (int token = 0; token < c.tokens; ++token) {
      for (int i = 0; i < c.kv_heads * c.head_dim; ++i) {
        made.Key(token)[i] *= 0.3f + static_cast<float>(token / 100 * 5 % 7) / 4;
      }
    }
    return made;
  }

  reference::RandomProblem problem;
  DeviceArray<uint16_t> q, k;
  std::unique_ptr<DeviceArray<float>> lse;
  std::vector<std::vector<double>> lses;
  CudaMassProblem args;
};

const Case kCases[] = {{"one_token", 1, 2, 1, 128},
                       {"block_less_1", 127, 3, 1, 64},
                       {"one_block", 128, 2, 2, 128},
                       {"block_plus_1", 129, 4, 1, 128},
                       {"ragged_gqa3", 1003, 6, 2, 64},
                       {"gqa4", 900, 8, 2, 128},
                       {"gqa8", 700, 8, 1, 64},
                       {"several_chunks", 2500, 1, 1, 128},
                       {"several_chunks_d64", 2305, 2, 1, 64}};

class BlockMassGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(BlockMassGpuTest, MapsMatchReferenceAndRepeat) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const OnDevice data(c);
  const size_t map = static_cast<size_t>(c.Blocks()) * c.Blocks();
  DeviceArray<float> first(map * c.q_heads), second(map * c.q_heads);

  for (DeviceArray<float>* out : {&first, &second}) {
    CudaBlockMassArgs args{data.args, data.lse->data(), nullptr, c.q_heads, nullptr, out->data()};
    const Status status = CudaBlockMass(args, nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
  }

  std::vector<double> wanted;
  for (int head = 0; head < c.q_heads; ++head) {
    const std::vector<double> one = reference::BlockMass(data.problem.get, head);
    wanted.insert(wanted.end(), one.begin(), one.end());
  }
  const double worst = WorstError(first.Host(), wanted, kMassScale);
  EXPECT_LE(worst, kMassError);
  RecordProperty("worst", std::to_string(worst));
  EXPECT_TRUE(SameBits(first.Host(), second.Host()));
  EXPECT_TRUE(first.Intact() && second.Intact());
}

TEST_P(BlockMassGpuTest, LsesMatchReferenceAndRepeat) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const OnDevice data(c);
  DeviceArray<float> first(static_cast<size_t>(c.tokens) * c.q_heads), second(first.size());

  for (DeviceArray<float>* out : {&first, &second}) {
    const Status status = CudaLogSumExp({data.args, nullptr, c.q_heads, out->data()}, nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
  }

  const std::vector<float> got = first.Host();
  double worst = 0;
  for (int head = 0; head < c.q_heads; ++head) {
    for (int i = 0; i < c.tokens; ++i) {
      const double want = data.lses[head][i];
      worst = std::fmax(worst, std::fabs(got[i * c.q_heads + head] - want) / (1 + std::fabs(want)));
    }
  }
  EXPECT_LE(worst, 1e-5);
  RecordProperty("worst", std::to_string(worst));
  EXPECT_TRUE(SameBits(got, second.Host()));
  EXPECT_TRUE(first.Intact() && second.Intact());
}

TEST_P(BlockMassGpuTest, RowsMatchReferenceAndRepeat) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const OnDevice data(c);
  std::vector<int64_t> positions = {c.tokens - 1, 0, -1, c.tokens / 2, c.tokens, int64_t{1} << 40};
  for (int i = 0; i < 60; ++i) positions.push_back(int64_t{i} * 7919 % c.tokens);
  std::vector<int32_t> narrow;
  for (const int64_t x : positions) narrow.push_back(static_cast<int32_t>(std::min<int64_t>(x, INT32_MAX)));
  const auto rows = static_cast<int>(positions.size());
  DeviceArray<int64_t> wide_positions(positions);
  DeviceArray<int32_t> narrow_positions(narrow);
  DeviceArray<float> wide(positions.size() * c.q_heads * c.Blocks()), other(wide.size());

  const Status status =
      CudaRowMass({data.args, {wide_positions.data(), nullptr, rows}, wide.data()}, nullptr);

  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_TRUE(CudaRowMass({data.args, {nullptr, narrow_positions.data(), rows}, other.data()}, nullptr).ok());
  std::vector<double> wanted;
  for (const int64_t position : positions) {
    for (int head = 0; head < c.q_heads; ++head) {
      std::vector<double> row(c.Blocks());
      if (position >= 0 && position < c.tokens) {
        row = reference::RowMass(data.problem.get, position, head, data.lses[head][position]);
      }
      wanted.insert(wanted.end(), row.begin(), row.end());
    }
  }
  const double worst = WorstError(wide.Host(), wanted, kMassScale);
  EXPECT_LE(worst, kMassError);
  RecordProperty("worst", std::to_string(worst));
  EXPECT_TRUE(SameBits(wide.Host(), other.Host()));
  EXPECT_TRUE(wide.Intact() && other.Intact());
}

INSTANTIATE_TEST_SUITE_P(Shapes, BlockMassGpuTest, ::testing::ValuesIn(kCases),
                         [](const auto& test) { return test.param.name; });

TEST(BlockMassGpuTest, HeadsInAnyOrderAndFlags) {
  HW_REQUIRE_SM90();
  const Case c{"", 300, 4, 2, 64};
  const OnDevice data(c);
  const std::vector<int32_t> order = {3, -1, 1, 4, 0};
  DeviceArray<int32_t> heads(order);
  DeviceArray<uint8_t> flags(std::vector<uint8_t>{1, 0, 1, 7});
  DeviceArray<float> maps(9 * order.size());

  ASSERT_TRUE(
      CudaBlockMass({data.args, data.lse->data(), heads.data(), 5, flags.data(), maps.data()}, nullptr).ok());

  const std::vector<float> got = maps.Host();
  for (size_t i = 0; i < order.size(); ++i) {
    const std::vector<float> map(got.begin() + 9 * i, got.begin() + 9 * (i + 1));
    if (order[i] == 3 || order[i] == 0) {
      EXPECT_LE(WorstError(map, reference::BlockMass(data.problem.get, order[i]), kMassScale), kMassError);
    } else {
      for (const float x : map) EXPECT_TRUE(std::isnan(x)) << "map " << i << " was written";
    }
  }
  EXPECT_TRUE(maps.Intact());
}

TEST(BlockMassGpuTest, LsesOfSomeHeads) {
  HW_REQUIRE_SM90();
  const Case c{"", 300, 4, 2, 64};
  const OnDevice data(c);
  DeviceArray<int32_t> heads(std::vector<int32_t>{3, -1, 1, 4});
  DeviceArray<float> lse(300 * 4);

  ASSERT_TRUE(CudaLogSumExp({data.args, heads.data(), 4, lse.data()}, nullptr).ok());

  const std::vector<float> got = lse.Host();
  for (int i = 0; i < 300; ++i) {
    for (const int head : {1, 3}) EXPECT_NEAR(got[i * 4 + head], data.lses[head][i], 1e-4);
    for (const int head : {0, 2}) EXPECT_TRUE(std::isnan(got[i * 4 + head])) << "written";
  }
  EXPECT_TRUE(lse.Intact());
}

TEST(BlockMassGpuTest, NanSpoilsOnlyRowsThatSeeIt) {
  HW_REQUIRE_SM90();
  const Case c{"", 600, 2, 1, 64};
  OnDevice data(c);
  std::vector<uint16_t> k = data.k.Host();
  k[300 * 64] = 0x7FC0;
  ASSERT_EQ(cudaMemcpy(data.k.data(), k.data(), 2 * k.size(), cudaMemcpyHostToDevice), cudaSuccess);
  DeviceArray<int64_t> positions(std::vector<int64_t>{299, 400});
  DeviceArray<float> mass(2 * 2 * 5), maps(2 * 25);

  ASSERT_TRUE(CudaRowMass({data.args, {positions.data(), nullptr, 2}, mass.data()}, nullptr).ok());
  ASSERT_TRUE(CudaBlockMass({data.args, data.lse->data(), nullptr, 2, nullptr, maps.data()}, nullptr).ok());

  const std::vector<float> rows = mass.Host(), map = maps.Host();
  for (int head = 0; head < 2; ++head) {
    float sum = 0;
    for (int block = 0; block < 5; ++block) sum += rows[head * 5 + block];
    EXPECT_NEAR(sum, 1, 1e-5);
    EXPECT_TRUE(std::isnan(rows[(2 + head) * 5]));
    for (int block = 0; block < 25; ++block) {
      const bool sees = block % 5 == 2 && block / 5 >= 2;
      EXPECT_EQ(std::isnan(map[head * 25 + block]), sees) << block;
    }
  }
  EXPECT_TRUE(mass.Intact() && maps.Intact());
}

// --- recall ---

// Every third block, and the tile's own; each fifth tile dense.
TEST(RecallGpuTest, SumsListedBlocks) {
  HW_REQUIRE_SM90();
  constexpr int kTokens = 3001, kHeads = 12, kBlocks = 24;
  const std::vector<int64_t> positions = {3000, 0, 127, 128, 1500, 2999, -1, 3001, 640, 641, 2047};
  const auto rows = static_cast<int>(positions.size());
  std::vector<float> mass(positions.size() * kHeads * kBlocks);
  for (size_t i = 0; i < mass.size(); ++i) mass[i] = static_cast<float>(i * 37 % 64) / 4096;
  DeviceArray<float> masses(mass);
  DeviceArray<int64_t> at(positions);
  for (const int lists : {12, 4, 3, 2}) {
    const int pack = kHeads / lists, tile_positions = 128 / pack;
    const int tiles = (kTokens + tile_positions - 1) / tile_positions;
    std::vector<int32_t> counts, blocks;
    std::vector<int64_t> offsets;
    for (int segment = 0; segment < lists * tiles; ++segment) {
      const int tile = segment % tiles, own = std::min(kTokens - 1, (tile + 1) * tile_positions - 1) / 128;
      offsets.push_back(static_cast<int64_t>(blocks.size()));
      for (int block = segment % 3; block < own; block += 3) blocks.push_back(block);
      blocks.push_back(own);
      counts.push_back(segment % 5 == 0 ? -1 : static_cast<int32_t>(blocks.size() - offsets.back()));
    }
    DeviceArray<int32_t> device_counts(counts), device_blocks(blocks);
    DeviceArray<int64_t> device_offsets(offsets);
    DeviceArray<float> recall(positions.size() * kHeads);

    const Status status =
        CudaRecallOfRows({masses.data(),
                          {at.data(), nullptr, rows},
                          kTokens,
                          kHeads,
                          {lists, device_counts.data(), device_offsets.data(), device_blocks.data()},
                          recall.data()},
                         nullptr);

    ASSERT_TRUE(status.ok()) << status.message();
    const std::vector<float> got = recall.Host();
    for (int row = 0; row < rows; ++row) {
      for (int head = 0; head < kHeads; ++head) {
        const int64_t position = positions[row];
        double wanted = 0;
        if (position >= 0 && position < kTokens) {
          const int64_t segment = int64_t{head / pack} * tiles + position / tile_positions;
          for (int i = 0; i < counts[segment]; ++i) {
            const int block = blocks[offsets[segment] + i];
            if (block <= position / 128) wanted += mass[(row * kHeads + head) * kBlocks + block];
          }
          if (counts[segment] < 0) wanted = 1;
        }
        EXPECT_FLOAT_EQ(got[row * kHeads + head], static_cast<float>(wanted)) << lists << " " << row;
      }
    }
    EXPECT_TRUE(recall.Intact());
  }
}

// HW_TIMING=1: 128K tokens.
TEST(BlockMassGpuTest, Timing) {
  HW_REQUIRE_SM90();
  if (std::getenv("HW_TIMING") == nullptr) GTEST_SKIP() << "HW_TIMING is not set";
  constexpr int64_t kTokens = 131072, kBlocks = 1024;
  const DeviceArray<uint16_t> q(size_t{kTokens} * 32 * 128), k(size_t{kTokens} * 8 * 128);
  FillRandom(q);
  FillRandom(k);
  const CudaMassProblem problem{q.data(), k.data(), kTokens, 32, 8, 128, 0.088f};
  DeviceArray<float> lse(kTokens * 32), maps(4 * kBlocks * kBlocks), mass(256 * 32 * kBlocks);
  ASSERT_EQ(cudaMemset(lse.data(), 0, lse.Bytes()), cudaSuccess);
  std::vector<int64_t> positions;
  for (int i = 0; i < 256; ++i) positions.push_back((i + 1) * kTokens / 256 - 1);
  DeviceArray<int64_t> at(positions);
  for (const int heads : {1, 4}) {
    const CudaBlockMassArgs args{problem, lse.data(), nullptr, heads, nullptr, maps.data()};
    PrintTime("block mass, heads " + std::to_string(heads), [&] { return CudaBlockMass(args, nullptr); });
  }
  const CudaRowMassArgs args{problem, {at.data(), nullptr, 256}, mass.data()};
  PrintTime("row mass, 256 rows, 32 heads", [&] { return CudaRowMass(args, nullptr); });
}

}  // namespace
}  // namespace headwater::kernels
