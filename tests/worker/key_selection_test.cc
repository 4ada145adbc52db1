#include "worker/key_selection.h"

#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace headwater {
namespace {

using testing::ElementsAre;
using Piece = std::pair<uint64_t, uint64_t>;

constexpr kernels::AttentionShape kShape{8, 4, 16, 1};  // two query heads read a KV head

// Tiles 0 to 2 of lists that select what `blocks` says of tile 2, and nothing of the others.
kernels::BlockIndex Index(const std::vector<std::vector<int32_t>>& blocks) {
  kernels::BlockIndex index;
  index.num_lists = static_cast<int32_t>(blocks.size());
  index.num_q_tiles = 3;
  index.dense.assign(blocks.size() * 3, 0);
  index.offsets = {0};
  for (const std::vector<int32_t>& list : blocks) {
    for (int tile = 0; tile < 3; ++tile) {
      if (tile == 2) index.blocks.insert(index.blocks.end(), list.begin(), list.end());
      index.offsets.push_back(static_cast<int64_t>(index.blocks.size()));
    }
  }
  EXPECT_TRUE(kernels::ValidateBlockIndex(index).ok());
  return index;
}

class KeySelectionTest : public testing::Test {
 protected:
  // Of rank 1's, as a row for each of the 3 blocks.
  std::vector<std::vector<int>> HeadsOfBlocks() const {
    std::vector<std::vector<int>> rows(3);
    for (int block = 0; block < 3; ++block) {
      for (int head = 0; head < 4; ++head) {
        if (selection_.Selects(1, block, head)) rows[static_cast<size_t>(block)].push_back(head);
        EXPECT_FALSE(selection_.Selects(0, block, head));
      }
    }
    return rows;
  }

  std::vector<Piece> Runs(const RankTokens& ranges) {
    std::vector<Piece> runs;
    uint64_t sum = 0;
    EXPECT_TRUE(selection_
                    .ForEachRun(1, ranges, 10, &control_,
                                [&](uint64_t offset, uint64_t bytes) {
                                  runs.emplace_back(offset, bytes);
                                  sum += bytes;
                                })
                    .ok());
    EXPECT_EQ(selection_.SelectedBytes(1, ranges, 10), 2 * sum);
    return runs;
  }

  std::vector<uint64_t> words_ = std::vector<uint64_t>(2);
  JobControl control_;
  const KeySelection selection_{kShape, 300, words_.data()};
};

TEST_F(KeySelectionTest, CountsWholeWordsARank) {
  EXPECT_EQ(KeySelection::Words(4, 1), 1);
  EXPECT_EQ(KeySelection::Words(4, 16 * 128), 1);
  EXPECT_EQ(KeySelection::Words(4, 16 * 128 + 1), 2);
}

TEST_F(KeySelectionTest, ASharedListIsEveryHeads) {
  selection_.Add(1, Index({{0, 2}}));
  EXPECT_THAT(HeadsOfBlocks(), ElementsAre(ElementsAre(0, 1, 2, 3), ElementsAre(), ElementsAre(0, 1, 2, 3)));
  selection_.Clear(1);
  EXPECT_THAT(HeadsOfBlocks(), ElementsAre(ElementsAre(), ElementsAre(), ElementsAre()));
}

TEST_F(KeySelectionTest, AKvHeadGetsWhatAnyOfItsQueryHeadsSelects) {
  selection_.Add(1, Index({{}, {1}, {}, {}, {0}, {2}, {}, {}}));
  EXPECT_THAT(HeadsOfBlocks(), ElementsAre(ElementsAre(2), ElementsAre(0), ElementsAre(2)));
}

TEST_F(KeySelectionTest, AListOfSeveralHeadsIsAllOfTheirs) {
  selection_.Add(1, Index({{0}, {1}}));
  EXPECT_THAT(HeadsOfBlocks(), ElementsAre(ElementsAre(0, 1), ElementsAre(2, 3), ElementsAre()));
}

TEST_F(KeySelectionTest, ADenseTileSelectsAllUpToItsOwnBlock) {
  kernels::BlockIndex index = Index({{}, {}, {}, {}});
  index.dense[1 * 3 + 1] = 1;
  selection_.Add(1, index);
  EXPECT_THAT(HeadsOfBlocks(), ElementsAre(ElementsAre(1), ElementsAre(1), ElementsAre()));
}

TEST_F(KeySelectionTest, RunsFollowTheChunksRangesAndJoinHeads) {
  selection_.Add(1, Index({{0, 1}, {0, 1}, {0}, {0, 1}}));
  // Tokens 126 to 129 and then 255: two whole tokens of block 0, and three of block 1 without head 2.
  EXPECT_THAT(Runs({{126, 130}, {255, 257}}),
              ElementsAre(Piece(0, 80), Piece(80, 20), Piece(110, 10), Piece(120, 20), Piece(150, 10),
                          Piece(160, 20), Piece(190, 10)));
  EXPECT_THAT(Runs({}), ElementsAre());
}

TEST_F(KeySelectionTest, WhatAPeerSetsPastTheEndIsNotLookedAt) {
  words_[1] = ~uint64_t{0};
  EXPECT_THAT(Runs({{0, 300}}), ElementsAre(Piece(0, 5120), Piece(5120, 5120), Piece(10240, 44 * 40)));
}

TEST_F(KeySelectionTest, StopsWhenTheJobDoes) {
  control_.Cancel(absl::CancelledError("enough"));
  EXPECT_EQ(selection_.ForEachRun(1, {{0, 300}}, 10, &control_, [](uint64_t, uint64_t) {}),
            absl::CancelledError("enough"));
}

}  // namespace
}  // namespace headwater
