// FlashPrefill V1's reference: against its definition computed another way, and on scores that can be read
// off.
#include "kernels/reference/policies/flash.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/kernels/policies/flash_cases.h"

namespace headwater::kernels::reference {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr double kLn2 = 0.6931471805599453;

// Nothing but the threshold and the tile's own block.
FlashParameters Bare(double alpha) {
  FlashParameters parameters;
  parameters.alpha = alpha;
  parameters.sink_blocks = 0;
  parameters.window_blocks = 1;
  parameters.dense_last_blocks = 0;
  return parameters;
}

FlashTrace Trace(const FlashCase& c, const FlashParameters& parameters, BlockIndex* index = nullptr) {
  FlashTrace trace;
  const Status status = FlashSelect(c.problem, parameters, &trace, index);
  EXPECT_TRUE(status.ok()) << status.message();
  return trace;
}

struct Shape {
  int64_t tokens;
  int32_t q_heads, kv_heads, dim;
};

class FlashShapeTest : public ::testing::TestWithParam<Shape> {};

TEST_P(FlashShapeTest, StagesMatchTheirDefinition) {
  const Shape shape = GetParam();
  FlashCase c(shape.tokens, shape.q_heads, shape.kv_heads, shape.dim);
  c.Randomize(7);
  FlashParameters parameters = Bare(0.6);
  parameters.sink_blocks = 1;
  BlockIndex index;

  const FlashTrace trace = Trace(c, parameters, &index);

  ASSERT_TRUE(ValidateBlockIndex(index).ok()) << ValidateBlockIndex(index).message();
  const int64_t tiles = (shape.tokens + 127) / 128;
  ASSERT_EQ(index.num_lists, shape.q_heads);
  ASSERT_EQ(index.num_q_tiles, tiles);
  ASSERT_EQ(trace.tiles.size(), static_cast<size_t>(shape.q_heads * tiles));
  for (int32_t head = 0; head < shape.q_heads; ++head) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Expected expected = ExpectTile(c.problem, tile + 1, [&](int64_t block) {
        std::vector<Row> rows;
        for (int64_t token = tile * 128; token < std::min(shape.tokens, tile * 128 + 128); ++token) {
          if (block * 128 + 127 <= token) rows.push_back({token, head});
        }
        return rows;
      });
      const FlashTile& got = trace.tiles[static_cast<size_t>(head * tiles + tile)];
      std::vector<int32_t> kept;
      for (int64_t block = 0; block <= tile; ++block) {
        const auto b = static_cast<size_t>(block);
        if (std::isinf(expected.ln[b])) {
          EXPECT_EQ(got.energy[b], 0);
          EXPECT_TRUE(std::isinf(got.maxima[b]));
        } else {
          EXPECT_NEAR(std::log(got.energy[b]) + got.top * kLn2, static_cast<double>(expected.ln[b]), 1e-9);
          EXPECT_NEAR(got.maxima[b] * kLn2, static_cast<double>(expected.maxima[b]), 1e-9);
        }
        if (block == 0 || block == tile || expected.Passes(b, 0.6))
          kept.push_back(static_cast<int32_t>(block));
      }
      EXPECT_EQ(got.kept, kept) << "head " << head << " tile " << tile;
      EXPECT_EQ(BlocksOf(index, head, tile), kept);
      if (!std::isinf(expected.best)) {
        EXPECT_NEAR(std::log(got.threshold / 0.6) + got.top * kLn2, static_cast<double>(expected.best), 1e-9);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, FlashShapeTest,
                         ::testing::Values(Shape{1, 1, 1, 4}, Shape{127, 2, 1, 8}, Shape{128, 4, 2, 8},
                                           Shape{129, 3, 1, 8}, Shape{700, 7, 1, 16}, Shape{1281, 8, 1, 8},
                                           Shape{1024, 8, 4, 8}, Shape{900, 5, 5, 64}),
                         [](const auto& shape) {
                           return "n" + std::to_string(shape.param.tokens) + "_q" +
                                  std::to_string(shape.param.q_heads) + "_kv" +
                                  std::to_string(shape.param.kv_heads);
                         });

TEST(FlashTest, MeansAreOverTheTokensThatABlockHas) {
  FlashCase c(130, 1, 1, 1);
  c.SetK(0, 64, 0, 0, 2);
  c.SetK(128, 130, 0, 0, 1.01f);  // 1.0078125 in bf16

  const FlashTrace trace = Trace(c, Bare(1));

  EXPECT_THAT(trace.means.values, ElementsAre(1, 1.0078125f));
}

// Of tile 1, row 255 alone sees block 1 to its last token: row 254, whose logit there would be 5, has no say.
TEST(FlashTest, OfItsOwnBlockTheLastRowAloneHasASay) {
  FlashCase c(256, 1, 1, 1);
  c.SetK(128, 256, 0, 0, 1);
  c.SetQ(254, 0, 0, 5);

  const FlashTile tile = Trace(c, Bare(1)).tiles[1];

  EXPECT_THAT(tile.energy, ElementsAre(128, 1));
  EXPECT_EQ(tile.top, 0);
  EXPECT_THAT(Trace(c, Bare(1)).tiles[0].energy, ElementsAre(1));
}

// Two rows of logit ln 4 to block 0 and 126 rows that do not exist, which count 2^0 each in compat: 126 / 4
// of an energy that is 2 without them, and 1 / 4 for block 1, which nobody sees whole.
TEST(FlashTest, CompatCountsTheRowsPastThePrompt) {
  FlashCase c(130, 1, 1, 1);
  c.problem.softmax_scale = std::log(4.0);
  c.SetK(0, 130, 0, 0, 1);
  for (int64_t token = 128; token < 130; ++token) c.SetQ(token, 0, 0, 1);
  FlashParameters parameters = Bare(0.5);

  EXPECT_THAT(Trace(c, parameters).tiles[1].energy, ElementsAre(2, 0));
  parameters.compat = true;
  const FlashTile tile = Trace(c, parameters).tiles[1];
  EXPECT_NEAR(tile.energy[0], 2 + 126.0 / 4, 1e-9);
  EXPECT_NEAR(tile.energy[1], 0.25, 1e-12);
  EXPECT_NEAR(tile.top, 2, 1e-12);
}

TEST(FlashTest, CompatLeavesFullTilesAlone) {
  FlashCase c(3 * 128 + 60, 2, 1, 8);
  c.Randomize(3);
  FlashParameters parameters = Bare(0.3);
  const FlashTrace plain = Trace(c, parameters);
  parameters.compat = true;
  const FlashTrace compat = Trace(c, parameters);

  for (size_t tile = 0; tile < 8; ++tile) {
    EXPECT_EQ(plain.tiles[tile].energy == compat.tiles[tile].energy, tile % 4 != 3) << tile;
  }
}

// Key block 3 of KV head 1 answers to what queries of all heads ask: heads 2 and 3 alone read it.
TEST(FlashTest, FindsAPlantedBlockInTheHeadsThatReadIt) {
  FlashCase c(10 * 128, 4, 2, 16);
  c.Randomize(11);
  c.SetK(3 * 128, 4 * 128, 1, 5, 8);
  for (int64_t token = 0; token < c.problem.num_tokens; ++token) {
    for (int32_t head = 0; head < 4; ++head) c.SetQ(token, head, 5, 4);
  }
  for (int64_t block = 0; block < 10; ++block) {
    if (block != 3) c.SetK(block * 128, block * 128 + 128, 1, 5, 0);
    c.SetK(block * 128, block * 128 + 128, 0, 5, block == 6 ? 8.0f : 0.0f);
  }
  BlockIndex index;
  Trace(c, Bare(0.18), &index);

  for (int64_t tile = 7; tile < 10; ++tile) {
    const auto own = static_cast<int32_t>(tile);
    for (int32_t head = 0; head < 4; ++head) {
      EXPECT_THAT(BlocksOf(index, head, tile), ElementsAre(head < 2 ? 6 : 3, own)) << head << " " << tile;
    }
  }
}

TEST(FlashTest, SinksWindowAndDenseTail) {
  FlashCase c(12 * 128, 1, 1, 1);
  c.SetK(0, 12 * 128, 0, 0, -1);
  c.SetK(4 * 128, 5 * 128, 0, 0, 9);
  for (int64_t token = 0; token < c.problem.num_tokens; ++token) c.SetQ(token, 0, 0, 1);
  BlockIndex index;
  Trace(c, FlashParameters{}, &index);

  EXPECT_THAT(BlocksOf(index, 0, 9), ElementsAre(0, 1, 4, 6, 7, 8, 9));
  EXPECT_THAT(BlocksOf(index, 0, 8), ElementsAre(0, 1, 4, 5, 6, 7, 8));
  EXPECT_THAT(index.dense, ElementsAre(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1));
  EXPECT_THAT(BlocksOf(index, 0, 10), IsEmpty());
}

// Energies of the tile before the last: 128 e^(k - 9) of each block that all see.
TEST(FlashTest, ThresholdKeepsAShareOfTheBestAndNamesWhatIsNear) {
  FlashCase c(6 * 128, 1, 1, 1);
  const float keys[] = {9, 6, 8, 7, 0, 0};
  for (int64_t block = 0; block < 6; ++block) c.SetK(block * 128, block * 128 + 128, 0, 0, keys[block]);
  for (int64_t token = 0; token < c.problem.num_tokens; ++token) c.SetQ(token, 0, 0, 1);
  const auto tile = [&](double alpha) { return Trace(c, Bare(alpha)).tiles[4]; };

  EXPECT_THAT(tile(std::exp(-2) * 0.99).kept, ElementsAre(0, 2, 3, 4));
  EXPECT_THAT(tile(std::exp(-2) * 0.99).undecided, ElementsAre(3));
  EXPECT_THAT(tile(std::exp(-2) * 1.01).kept, ElementsAre(0, 2, 4));
  EXPECT_THAT(tile(std::exp(-2) * 1.01).undecided, ElementsAre(3));
  EXPECT_THAT(tile(std::exp(-2) * 0.97).undecided, IsEmpty());
  // The tile's own block is at the threshold, which does not decide it.
  EXPECT_THAT(tile(std::exp(-9) / 128 * 1.001).undecided, IsEmpty());
  EXPECT_THAT(tile(1).kept, ElementsAre(0, 4));
  EXPECT_THAT(tile(0).kept, ElementsAre(0, 1, 2, 3, 4));
}

TEST(FlashTest, MinBlocksKeepsTheBest) {
  FlashCase c(6 * 128, 1, 1, 1);
  const float keys[] = {9, 6, 8, 7, 0, 0};
  for (int64_t block = 0; block < 6; ++block) c.SetK(block * 128, block * 128 + 128, 0, 0, keys[block]);
  for (int64_t token = 0; token < c.problem.num_tokens; ++token) c.SetQ(token, 0, 0, 1);
  FlashParameters parameters = Bare(1);
  parameters.min_blocks = 3;

  EXPECT_THAT(Trace(c, parameters).tiles[5].kept, ElementsAre(0, 2, 3, 5));
  EXPECT_THAT(Trace(c, parameters).tiles[1].kept, ElementsAre(0, 1));
}

TEST(FlashTest, LargeLogitsStayFinite) {
  FlashCase c(3 * 128, 1, 1, 1);
  c.SetK(0, 128, 0, 0, 20000);
  for (int64_t token = 0; token < c.problem.num_tokens; ++token) c.SetQ(token, 0, 0, 1);
  const FlashTile tile = Trace(c, Bare(0.18)).tiles[2];

  EXPECT_THAT(tile.energy, ElementsAre(128, 0, 0));
  EXPECT_THAT(tile.kept, ElementsAre(0, 2));
}

TEST(FlashTest, RefusesWhatIsOutOfRange) {
  const auto refusal = [](const FlashParameters& parameters) {
    FlashCase c(4, 1, 1, 1);
    const Status status = FlashSelect(c.problem, parameters, nullptr, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  FlashParameters p;
  p.alpha = 1.5;
  EXPECT_THAT(refusal(p), HasSubstr("alpha 1.5 is outside 0 to 1"));
  p.alpha = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT(refusal(p), HasSubstr("alpha nan"));
  p = {};
  p.sink_blocks = -1;
  EXPECT_THAT(refusal(p), HasSubstr("sink_blocks -1"));
  p = {};
  p.window_blocks = 0;
  EXPECT_THAT(refusal(p), HasSubstr("window_blocks 0"));
  p = {};
  p.dense_last_blocks = -1;
  EXPECT_THAT(refusal(p), HasSubstr("dense_last_blocks -1"));
  p = {};
  p.min_blocks = -2;
  EXPECT_THAT(refusal(p), HasSubstr("min_blocks -2"));
}

TEST(FlashTest, RefusesProblemsThatMakeNoSense) {
  const auto refusal = [](void (*spoil)(PolicyProblem*)) {
    FlashCase c(4, 3, 1, 2);
    spoil(&c.problem);
    const Status status = FlashSelect(c.problem, {}, nullptr, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_THAT(refusal([](PolicyProblem* p) { p->num_tokens = 0; }), HasSubstr("num_tokens 0"));
  EXPECT_THAT(refusal([](PolicyProblem* p) { p->num_kv_heads = 2; }),
              HasSubstr("not a positive multiple of num_kv_heads 2"));
  EXPECT_THAT(refusal([](PolicyProblem* p) { p->head_dim = 0; }), HasSubstr("head_dim 0"));
  EXPECT_THAT(refusal([](PolicyProblem* p) { p->q = nullptr; }), HasSubstr("null"));
  EXPECT_THAT(refusal([](PolicyProblem* p) { p->softmax_scale = -1; }), HasSubstr("softmax_scale -1"));
}

}  // namespace
}  // namespace headwater::kernels::reference
