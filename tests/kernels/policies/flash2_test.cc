// FlashPrefill V2's reference: against its definition computed another way, and on scores that can be read
// off.
#include "kernels/reference/policies/flash2.h"

#include <cmath>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kernels/reference/mean_keys.h"
#include "tests/kernels/policies/flash_cases.h"

namespace headwater::kernels::reference {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr double kLn2 = 0.6931471805599453;

// Nothing but the threshold and the tile's own blocks.
Flash2Parameters Bare(double alpha) {
  Flash2Parameters parameters;
  parameters.alpha = alpha;
  parameters.sink_blocks = 0;
  parameters.window_blocks = 1;
  parameters.dense_last_tiles = 0;
  parameters.dense_layers = 0;
  return parameters;
}

Flash2Trace Trace(const FlashCase& c, const Flash2Parameters& parameters, BlockIndex* index = nullptr,
                  int32_t layer = 0) {
  Flash2Trace trace;
  const Status status = Flash2Select(c.problem, parameters, layer, &trace, index);
  EXPECT_TRUE(status.ok()) << status.message();
  return trace;
}

struct Shape {
  int64_t tokens;
  int32_t q_heads, kv_heads;
  bool compat;
};

class Flash2ShapeTest : public ::testing::TestWithParam<Shape> {};

// Rows are dealt to tiles by walking positions and heads, not by dividing row numbers.
std::vector<std::vector<Row>> DealRows(const Shape& shape, int32_t kv_head) {
  const int32_t group = shape.q_heads / shape.kv_heads;
  const size_t full = static_cast<size_t>(shape.compat ? 128 : 128 - 128 % group);
  std::vector<std::vector<Row>> tiles;
  for (int64_t token = 0; token < shape.tokens; ++token) {
    for (int32_t i = 0; i < group; ++i) {
      if (tiles.empty() || tiles.back().size() == full) tiles.emplace_back();
      tiles.back().push_back({token, kv_head * group + i});
    }
  }
  return tiles;
}

void CheckTile(const FlashCase& c, const std::vector<Row>& rows, const Flash2Tile& got) {
  const int64_t first = rows.front().token, last = rows.back().token;
  int64_t scored = 0;
  while ((scored + 1) * 128 - 1 <= last) ++scored;
  const Expected expected = ExpectTile(c.problem, scored, [&](int64_t block) {
    std::vector<Row> seeing;
    for (const Row& row : rows) {
      if (block * 128 <= row.token) seeing.push_back(row);
    }
    return seeing;
  });
  std::vector<int32_t> kept;
  for (int64_t block = 0; block * 128 <= last; ++block) {
    const auto b = static_cast<size_t>(block);
    const bool in_window = (block + 2) * 128 > first;  // of two blocks
    if (in_window || (block < scored && expected.Passes(b, 0.6))) kept.push_back(static_cast<int32_t>(block));
  }
  EXPECT_EQ(got.kept, kept) << "from token " << first;
  ASSERT_EQ(got.energy.size(), static_cast<size_t>(scored));
  for (size_t b = 0; b < got.energy.size(); ++b) {
    EXPECT_NEAR(std::log(got.energy[b]) + got.top * kLn2, static_cast<double>(expected.ln[b]), 1e-9);
    EXPECT_NEAR(got.maxima[b] * kLn2, static_cast<double>(expected.maxima[b]), 1e-9);
  }
  if (scored > 0) {
    EXPECT_NEAR(std::log(got.threshold / 0.6) + got.top * kLn2, static_cast<double>(expected.best), 1e-9);
  }
}

TEST_P(Flash2ShapeTest, StagesMatchTheirDefinition) {
  const Shape shape = GetParam();
  const int32_t group = shape.q_heads / shape.kv_heads;
  FlashCase c(shape.tokens, shape.q_heads, shape.kv_heads, 8);
  c.Randomize(5);
  Flash2Parameters parameters = Bare(0.6);
  parameters.window_blocks = 2;
  parameters.compat = shape.compat;
  const bool has_index = !shape.compat || 128 % group == 0;
  BlockIndex index;

  const Flash2Trace trace = Trace(c, parameters, has_index ? &index : nullptr);

  for (int32_t head = 0; head < shape.kv_heads; ++head) {
    const auto tiles = DealRows(shape, head);
    ASSERT_EQ(trace.num_tiles, static_cast<int64_t>(tiles.size()));
    for (size_t tile = 0; tile < tiles.size(); ++tile) {
      CheckTile(c, tiles[tile], trace.tiles[static_cast<size_t>(head) * tiles.size() + tile]);
    }
  }
  if (!has_index) return;
  EXPECT_TRUE(ValidateBlockIndex(index).ok()) << ValidateBlockIndex(index).message();
  EXPECT_EQ(index.q_tile_tokens, 128 / group);
  EXPECT_EQ(index.num_lists, shape.kv_heads);
  for (size_t i = 0; i < trace.tiles.size(); ++i) {
    const auto list = static_cast<int32_t>(static_cast<int64_t>(i) / trace.num_tiles);
    EXPECT_EQ(BlocksOf(index, list, static_cast<int64_t>(i) % trace.num_tiles), trace.tiles[i].kept);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Flash2ShapeTest,
    ::testing::Values(Shape{1, 1, 1, false}, Shape{127, 4, 2, true}, Shape{128, 4, 4, true},
                      Shape{129, 8, 1, false}, Shape{700, 7, 1, true}, Shape{700, 7, 1, false},
                      Shape{901, 6, 2, true}, Shape{901, 6, 2, false}, Shape{1281, 8, 1, true},
                      Shape{1024, 8, 4, false}, Shape{640, 5, 1, true}),
    [](const auto& shape) {
      return "n" + std::to_string(shape.param.tokens) + "_q" + std::to_string(shape.param.q_heads) + "_kv" +
             std::to_string(shape.param.kv_heads) + (shape.param.compat ? "_compat" : "");
    });

// One head, so a tile is a block: block 1 is completed by tile 1's last row and counts with all 128 rows,
// row 254, whose logit is ln 8, included.
TEST(Flash2Test, RowsSeeTheirOwnBlockFromItsFirstToken) {
  FlashCase c(256, 1, 1, 1);
  c.problem.softmax_scale = std::log(8.0);
  c.SetK(128, 256, 0, 0, 1);
  c.SetQ(254, 0, 0, 1);

  const Flash2Tile tile = Trace(c, Bare(1)).tiles[1];

  EXPECT_NEAR(tile.top, 3, 1e-12);
  EXPECT_NEAR(tile.energy[0], 128.0 / 8, 1e-9);
  EXPECT_NEAR(tile.energy[1], 1 + 127.0 / 8, 1e-9);
}

// Four heads: tiles of 32 positions. Tile 6 holds positions 192 to 223, so block 1 is not complete and not
// scored; tile 7 completes it.
TEST(Flash2Test, BlocksThatTheTileDoesNotCompleteAreNotScored) {
  FlashCase c(256, 4, 1, 1);

  const Flash2Trace trace = Trace(c, Bare(1));

  EXPECT_THAT(trace.tiles[6].energy, ElementsAre(128));
  EXPECT_THAT(trace.tiles[7].energy, ElementsAre(128, 128));
  EXPECT_THAT(trace.tiles[2].energy, IsEmpty());
  EXPECT_THAT(trace.tiles[2].kept, ElementsAre(0));
}

// A tile of 7 heads that starts inside a group: rows 128 to 255 are head 2 of position 18 to head 3 of
// position 36, so heads 2 and 3 have 19 rows there and the others 18.
TEST(Flash2Test, CompatTilesEndInsideAGroup) {
  FlashCase c(300, 7, 1, 1);
  Flash2Parameters parameters = Bare(1);
  parameters.compat = true;
  c.SetK(0, 128, 0, 0, 1);
  c.problem.softmax_scale = std::log(2.0);
  for (int64_t token = 0; token < 300; ++token) c.SetQ(token, 2, 0, -1);

  const Flash2Trace trace = Trace(c, parameters);

  EXPECT_EQ(trace.num_tiles, (300 * 7 + 127) / 128);
  EXPECT_EQ(trace.tiles[1].first_row / 7, 18);
  EXPECT_EQ((trace.tiles[1].end_row - 1) / 7, 36);
  EXPECT_EQ(trace.tiles.back().end_row, 300 * 7);
  // Rows 1,024 to 1,151: position 146 from head 2 on to position 164 up to head 3.
  EXPECT_NEAR(trace.tiles[8].energy[0], 109 + 19 * 0.5, 1e-9);
  BlockIndex index;
  const Status status = Flash2Select(c.problem, parameters, 0, nullptr, &index);
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_THAT(status.message(), HasSubstr("groups of 7"));
}

TEST(Flash2Test, WholeGroupsOfSevenMakeTilesOf18Positions) {
  FlashCase c(300, 7, 1, 1);
  BlockIndex index;

  const Flash2Trace trace = Trace(c, Bare(1), &index);

  EXPECT_EQ(index.q_tile_tokens, 18);
  EXPECT_EQ(index.num_q_tiles, 17);
  EXPECT_EQ(trace.tiles[1].first_row, 126);
  EXPECT_TRUE(ValidateBlockIndex(index).ok());
}

TEST(Flash2Test, FindsAPlantedBlockInTheGroupThatReadsIt) {
  FlashCase c(10 * 128, 8, 2, 16);
  c.Randomize(13);
  for (int64_t block = 0; block < 10; ++block) {
    c.SetK(block * 128, block * 128 + 128, 0, 5, block == 6 ? 8.0f : 0.0f);
    c.SetK(block * 128, block * 128 + 128, 1, 5, block == 3 ? 8.0f : 0.0f);
  }
  // One head of each group asks; the group shares the list.
  for (int64_t token = 0; token < c.problem.num_tokens; ++token) {
    c.SetQ(token, 1, 5, 6);
    c.SetQ(token, 6, 5, 6);
  }
  BlockIndex index;
  Trace(c, Bare(0.1), &index);

  for (int64_t tile = 7 * 4; tile < 40; ++tile) {
    const auto own = static_cast<int32_t>(tile / 4);
    EXPECT_THAT(BlocksOf(index, 0, tile), ElementsAre(6, own)) << tile;
    EXPECT_THAT(BlocksOf(index, 1, tile), ElementsAre(3, own)) << tile;
  }
}

TEST(Flash2Test, WindowGoesBackFromTheFirstPosition) {
  FlashCase c(1280, 3, 1, 1);  // tiles of 42 positions: tile 12 is 504 to 545, blocks 3 and 4
  c.SetK(0, 128, 0, 0, 9);
  for (int64_t token = 0; token < 1280; ++token) c.SetQ(token, 0, 0, 1);
  Flash2Parameters parameters = Bare(1);
  parameters.window_blocks = 2;
  const Flash2Trace trace = Trace(c, parameters);

  EXPECT_THAT(trace.tiles[12].kept, ElementsAre(0, 2, 3, 4));
  EXPECT_THAT(trace.tiles[13].kept, ElementsAre(0, 3, 4));  // 546 to 587
}

TEST(Flash2Test, DefaultsAreTheReadmes) {
  const Flash2Parameters p;
  EXPECT_EQ(p.alpha, 0.1);
  EXPECT_EQ(p.sink_blocks, 2);
  EXPECT_EQ(p.window_blocks, 4);
  EXPECT_EQ(p.dense_last_tiles, 8);
  EXPECT_EQ(p.dense_layers, 4);
}

TEST(Flash2Test, DenseTailLayersAndShortPrompts) {
  FlashCase c(4 * 128, 4, 1, 1);
  BlockIndex index;
  Flash2Parameters parameters;

  Trace(c, parameters, &index, 4);
  EXPECT_THAT(index.dense, ElementsAre(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
  Trace(c, parameters, &index, 3);
  EXPECT_THAT(index.dense, Each(1));
  EXPECT_THAT(index.blocks, IsEmpty());
  parameters.dense_tokens = 511;
  Trace(c, parameters, &index, 4);
  EXPECT_EQ(index.dense[0], 0);
  parameters.dense_tokens = 512;
  Trace(c, parameters, &index, 4);
  EXPECT_THAT(index.dense, Each(1));
}

TEST(Flash2Test, NamesWhatIsNearTheThreshold) {
  FlashCase c(6 * 128, 1, 1, 1);
  const float keys[] = {9, 6, 8, 7, 0, 0};
  for (int64_t block = 0; block < 6; ++block) c.SetK(block * 128, block * 128 + 128, 0, 0, keys[block]);
  for (int64_t token = 0; token < c.problem.num_tokens; ++token) c.SetQ(token, 0, 0, 1);
  const auto tile = [&](double alpha) { return Trace(c, Bare(alpha)).tiles[5]; };

  EXPECT_THAT(tile(std::exp(-2) * 1.01).kept, ElementsAre(0, 2, 5));
  EXPECT_THAT(tile(std::exp(-2) * 1.01).undecided, ElementsAre(3));
  EXPECT_THAT(tile(std::exp(-2) * 0.99).kept, ElementsAre(0, 2, 3, 5));
  EXPECT_THAT(tile(std::exp(-2) * 1.03).undecided, IsEmpty());
}

// V2's correction: one mean per block, where superblocks would make one of blocks 0 to 7.
TEST(Flash2Test, MeanKeysWithoutSuperblocksAreTheBlocksNotListed) {
  std::vector<std::vector<int64_t>> keys;
  for (const MeanKey& key : MeanKeys({9, 11}, 12, 13 * 128, false))
    keys.push_back({key.table_row, key.tokens});
  std::vector<std::vector<int64_t>> expected;
  for (const int64_t block : {0, 1, 2, 3, 4, 5, 6, 7, 8, 10}) expected.push_back({block, 128});

  EXPECT_EQ(keys, expected);
  EXPECT_EQ(MeanKeys({9, 11}, 12, 13 * 128).size(), 3u);
}

TEST(Flash2Test, RefusesWhatIsOutOfRange) {
  const auto refusal = [](const Flash2Parameters& parameters, int32_t layer = 0, int32_t q_heads = 1) {
    FlashCase c(4, q_heads, 1, 1);
    const Status status = Flash2Select(c.problem, parameters, layer, nullptr, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  Flash2Parameters p;
  p.alpha = -0.5;
  EXPECT_THAT(refusal(p), HasSubstr("alpha -0.5 is outside 0 to 1"));
  p = {};
  p.sink_blocks = -1;
  EXPECT_THAT(refusal(p), HasSubstr("sink_blocks -1"));
  p = {};
  p.window_blocks = 0;
  EXPECT_THAT(refusal(p), HasSubstr("window_blocks 0"));
  p = {};
  p.dense_last_tiles = -1;
  EXPECT_THAT(refusal(p), HasSubstr("dense_last_tiles -1"));
  p = {};
  p.dense_layers = -1;
  EXPECT_THAT(refusal(p), HasSubstr("dense_layers -1"));
  p = {};
  p.dense_tokens = -1;
  EXPECT_THAT(refusal(p), HasSubstr("dense_tokens -1"));
  EXPECT_THAT(refusal({}, -1), HasSubstr("layer -1"));
  EXPECT_THAT(refusal({}, 0, 129), HasSubstr("num_q_heads / num_kv_heads 129"));
}

}  // namespace
}  // namespace headwater::kernels::reference
