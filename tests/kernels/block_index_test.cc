#include "kernels/attention/block_index.h"

#include <functional>
#include <string>

#include <gtest/gtest.h>

namespace headwater::kernels {
namespace {

// Two lists over tiles 2 and 3.
BlockIndex Valid() {
  BlockIndex index;
  index.num_lists = 2;
  index.first_q_tile = 2;
  index.num_q_tiles = 2;
  index.dense = {0, 1, 0, 0};
  index.blocks = {0, 2, 3, 0, 1};
  index.offsets = {0, 2, 2, 3, 5};
  return index;
}

TEST(BlockIndex, DenseIndexIsValidAndSelectsEverything) {
  const BlockIndex index = DenseBlockIndex(3, 2);
  EXPECT_TRUE(ValidateBlockIndex(index).ok());
  EXPECT_FALSE(index.has_element_mask());
  const BlockCounts counts = CountBlocks(index);
  EXPECT_EQ(counts.possible, 4u + 5u);
  EXPECT_EQ(counts.selected, counts.possible);
}

TEST(BlockIndex, EmptyIndexIsValid) {
  const BlockIndex index = DenseBlockIndex(0, 0);
  EXPECT_TRUE(ValidateBlockIndex(index).ok());
  EXPECT_EQ(CountBlocks(index).possible, 0u);
}

TEST(BlockIndex, CountsListsAndDenseSegments) {
  BlockIndex index = Valid();
  index.blocks = {0, 2, 1, 0, 3};
  EXPECT_TRUE(ValidateBlockIndex(index).ok()) << ValidateBlockIndex(index).message();
  const BlockCounts counts = CountBlocks(index);
  EXPECT_EQ(counts.possible, 2u * (3 + 4));
  EXPECT_EQ(counts.selected, 2u + 4 + 1 + 2);
}

TEST(BlockIndex, CountsBlocksSmallerAndLargerThanTiles) {
  BlockIndex index = DenseBlockIndex(2, 1);
  index.k_block_tokens = 32;
  EXPECT_EQ(CountBlocks(index).possible, 12u);
  index.k_block_tokens = 256;
  EXPECT_EQ(CountBlocks(index).possible, 2u);
}

struct BadIndex {
  const char* name;
  std::function<void(BlockIndex*)> spoil;
  const char* words;
};

TEST(BlockIndex, NamesTheRuleThatIsBroken) {
  const BadIndex kBad[] = {
      {"tile size", [](BlockIndex* i) { i->q_tile_tokens = 0; }, "q_tile_tokens 0"},
      {"block size", [](BlockIndex* i) { i->k_block_tokens = -1; }, "k_block_tokens -1"},
      {"lists", [](BlockIndex* i) { i->num_lists = 0; }, "num_lists 0"},
      {"first tile", [](BlockIndex* i) { i->first_q_tile = -1; }, "tiles from -1"},
      {"huge tile", [](BlockIndex* i) { i->first_q_tile = int64_t{1} << 53; }, "outside positions"},
      {"huge count", [](BlockIndex* i) { i->num_q_tiles = INT64_MAX; }, "outside positions"},
      {"count", [](BlockIndex* i) { i->num_q_tiles = 3; }, "dense has 4"},
      {"dense", [](BlockIndex* i) { i->dense.push_back(0); }, "dense has 5"},
      {"offsets", [](BlockIndex* i) { i->offsets.pop_back(); }, "offsets 4"},
      {"start", [](BlockIndex* i) { i->offsets[0] = 1; }, "offsets go from 1"},
      {"end", [](BlockIndex* i) { i->offsets[4] = 4; }, "to 4, not from 0 to the number of blocks, 5"},
      {"fall", [](BlockIndex* i) { i->offsets[1] = 5; }, "segment (list 0, tile 3): offsets fall"},
      {"past the end", [](BlockIndex* i) { i->offsets[1] = 1000; }, "segment (list 0, tile 3): offsets fall"},
      {"negative", [](BlockIndex* i) { i->offsets[1] = -1; }, "segment (list 0, tile 2): offsets fall"},
      {"dense with list", [](BlockIndex* i) { i->dense[0] = 1; }, "segment (list 0, tile 2) is dense"},
      {"repeat", [](BlockIndex* i) { i->blocks[1] = 0; }, "segment (list 0, tile 2): block 0 comes after 0"},
      {"order", [](BlockIndex* i) { i->blocks[3] = 2; }, "segment (list 1, tile 3): block 1 comes after 2"},
      {"negative block", [](BlockIndex* i) { i->blocks[0] = -1; }, "block -1 comes after -1"},
      {"future", [](BlockIndex* i) { i->blocks[1] = 3; }, "block 3 is past the tile's own, 2"},
      {"half mask", [](BlockIndex* i) { i->window_tokens = 5; }, "sink_tokens -1 and window_tokens 5"},
      {"other half", [](BlockIndex* i) { i->sink_tokens = 5; }, "sink_tokens 5 and window_tokens -1"},
  };
  BlockIndex valid = Valid();
  valid.blocks[2] = 2;
  ASSERT_TRUE(ValidateBlockIndex(valid).ok()) << ValidateBlockIndex(valid).message();
  for (const BadIndex& bad : kBad) {
    BlockIndex index = valid;
    bad.spoil(&index);
    const Status status = ValidateBlockIndex(index);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << bad.name;
    EXPECT_NE(status.message().find(bad.words), std::string::npos) << bad.name << ": " << status.message();
  }
}

}  // namespace
}  // namespace headwater::kernels
