// Rows' largest scores on the GPU against the rules in obvious steps: sums of the scores are exact in double,
// so that all blocks must agree.
#include "kernels/cuda/top_share.h"

#include <cmath>
#include <cstdlib>
#include <random>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"
#include "tests/kernels/cuda/timing.h"
#include "tests/kernels/cuda/top_share.h"

namespace headwater::kernels {
namespace {

constexpr CudaTopShareRule kEnds = CudaTopShareRule::kWithFirstAndOwn, kSum = CudaTopShareRule::kUntilSum;

enum class Scores { kManyTies, kWide, kZeros, kShares };

struct Case {
  const char* name;
  int blocks;
  Scores scores;
  int first_row = 0;  // on
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// 2 lists of rows; what lies past a row's own block is large, and not to be looked at.
std::vector<float> Made(const Case& c, int rows) {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  std::vector<float> scores(size_t{2} * rows * c.blocks);
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto row = static_cast<int>(i / c.blocks % rows) + c.first_row;
    const auto column = static_cast<int>(i % c.blocks);
    double x = 0;
    if (c.scores == Scores::kManyTies) x = static_cast<double>(random() % 8) / 64;
    if (c.scores == Scores::kWide) x = std::exp(4 * normal(random));
    if (c.scores == Scores::kShares)
      x = std::ldexp(std::ceil(std::exp(normal(random)) * 1024), -10) / (row + 1);
    scores[i] = column > row ? 1e9f : static_cast<float>(x);
  }
  return scores;
}

class TopShareGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(TopShareGpuTest, EqualsTheRule) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const int rows = c.blocks - c.first_row, words = (c.blocks + 31) / 32;
  const std::vector<float> scores = Made(c, rows);
  DeviceArray<float> device(scores);
  for (const CudaTopShareRule rule : {kEnds, kSum}) {
    for (const std::vector<double>& shares :
         std::vector<std::vector<double>>{{0.9}, {0.5, 0.0}, {0.99, c.scores == Scores::kWide ? 0.1 : 1.0}}) {
      DeviceArray<uint32_t> mask(size_t{3} * c.blocks * words), again(mask.size());
      CudaTopShareArgs args;
      args.scores = device.data();
      args.list_stride = int64_t{rows} * c.blocks;
      args.masks = {mask.data(), int64_t{c.blocks} * 128 - 5, 3, 128};
      args.first_list = 1;
      args.num_lists = 2;
      args.first_row = c.first_row;
      args.num_rows = rows;
      args.rule = rule;
      args.shares = shares.data();
      args.num_shares = static_cast<int32_t>(shares.size());

      const Status status = CudaTopShareRows(args, nullptr);

      ASSERT_TRUE(status.ok()) << status.message();
      args.masks.words = again.data();
      ASSERT_TRUE(CudaTopShareRows(args, nullptr).ok());
      const std::vector<uint32_t> got = mask.Host();
      for (int segment = 0; segment < 3 * c.blocks; ++segment) {
        const int list = segment / c.blocks - 1, row = segment % c.blocks;
        if (list < 0 || row < c.first_row) {
          for (int i = 0; i < words; ++i) ASSERT_EQ(got[size_t{1} * segment * words + i], ~0u) << segment;
          continue;
        }
        const float* const first = &scores[(size_t{1} * list * rows + row - c.first_row) * c.blocks];
        const TopShare wanted =
            TopShareOf({first, first + row + 1}, shares[shares.size() == 1 ? 0 : list], rule);
        for (int block = 0; block < words * 32; ++block) {
          ASSERT_EQ(BitOf(got, size_t{1} * segment * words, block), block <= row && wanted.kept[block])
              << "list " << list << ", row " << row << ", block " << block;
        }
      }
      EXPECT_TRUE(SameBits(got, again.Host()));
      EXPECT_TRUE(mask.Intact() && again.Intact());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Rows, TopShareGpuTest,
    ::testing::Values(Case{"one", 1, Scores::kWide}, Case{"two", 2, Scores::kManyTies},
                      Case{"a_word_less_1", 31, Scores::kWide}, Case{"a_word", 32, Scores::kManyTies},
                      Case{"a_word_plus_1", 33, Scores::kShares}, Case{"ties", 300, Scores::kManyTies},
                      Case{"wide", 300, Scores::kWide}, Case{"shares", 300, Scores::kShares},
                      Case{"zeros", 70, Scores::kZeros}, Case{"strip", 1000, Scores::kWide, 950},
                      Case{"long_rows", 8192, Scores::kManyTies, 8180},
                      Case{"longest_rows", 32768, Scores::kManyTies, 32766}),
    [](const auto& test) { return test.param.name; });

TEST(TopShareGpuTest, WhatIsNotFiniteStaysInItsRowAndFlagsSkip) {
  HW_REQUIRE_SM90();
  constexpr int kBlocks = 40;
  std::vector<float> scores(size_t{2} * kBlocks * kBlocks, 1.0f);
  scores[30 * kBlocks + 3] = std::nanf("");
  scores[31 * kBlocks + 4] = INFINITY;
  scores[32 * kBlocks + 5] = -INFINITY;
  DeviceArray<float> device(scores);
  DeviceArray<uint32_t> mask(2 * kBlocks * 2);
  DeviceArray<uint8_t> flags(std::vector<uint8_t>{1, 0});
  const double share = 0.5;
  CudaTopShareArgs args;
  args.scores = device.data();
  args.list_stride = kBlocks * kBlocks;
  args.masks = {mask.data(), kBlocks * 128, 2, 128};
  args.num_lists = 2;
  args.num_rows = kBlocks;
  args.shares = &share;
  args.num_shares = 1;
  args.flags = flags.data();

  ASSERT_TRUE(CudaTopShareRows(args, nullptr).ok());

  const std::vector<uint32_t> got = mask.Host();
  const auto kept = [&](int row) {
    int count = 0;
    for (int block = 0; block < 64; ++block) count += BitOf(got, size_t{2} * row, block) ? 1 : 0;
    return count;
  };
  EXPECT_EQ(kept(29), 15);
  EXPECT_EQ(kept(30), 15);  // 30 count
  EXPECT_EQ(kept(31), 3);   // the first, its own and the infinite one
  EXPECT_EQ(kept(32), 16);
  for (int row = kBlocks; row < 2 * kBlocks; ++row) EXPECT_EQ(kept(row), 64);
  EXPECT_TRUE(mask.Intact());
}

// HW_TIMING=1: 32 heads of 128K tokens.
TEST(TopShareGpuTest, Timing) {
  HW_REQUIRE_SM90();
  if (std::getenv("HW_TIMING") == nullptr) GTEST_SKIP() << "HW_TIMING is not set";
  constexpr int kBlocks = 1024, kHeads = 32;
  const std::vector<float> row = Made({"", kBlocks, Scores::kWide}, kBlocks / 2);
  DeviceArray<float> scores(size_t{kHeads} * kBlocks * kBlocks);
  for (size_t at = 0; at < scores.size(); at += row.size()) {
    ASSERT_EQ(cudaMemcpy(scores.data() + at, row.data(), 4 * row.size(), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  DeviceArray<uint32_t> mask(size_t{kHeads} * kBlocks * 32);
  const double share = 0.9;
  CudaTopShareArgs args;
  args.scores = scores.data();
  args.list_stride = kBlocks * kBlocks;
  args.masks = {mask.data(), kBlocks * 128, kHeads, 128};
  args.num_lists = kHeads;
  args.num_rows = kBlocks;
  args.shares = &share;
  args.num_shares = 1;
  PrintTime("top share, 32 heads", [&] { return CudaTopShareRows(args, nullptr); });
}

}  // namespace
}  // namespace headwater::kernels
