// What CudaListsOfMasks() refuses, and sizes: runs without a GPU.
#include "kernels/cuda/block_masks.h"

#include <algorithm>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

CudaListsOfMasksArgs ValidArgs() {
  CudaListsOfMasksArgs args;
  args.masks = CudaBlockMasksOf(1000, 8, 2, false);
  args.masks.words = static_cast<uint32_t*>(kAligned);
  args.counts = args.blocks = static_cast<int32_t*>(kAligned);
  args.offsets = static_cast<int64_t*>(kAligned);
  args.capacity = 10;
  args.visited = static_cast<uint64_t*>(kAligned);
  args.overflows = static_cast<uint32_t*>(kAligned);
  return args;
}

std::function<Status()> Changed(const std::function<void(CudaListsOfMasksArgs*)>& change) {
  return [change] {
    CudaListsOfMasksArgs args = ValidArgs();
    change(&args);
    return CudaListsOfMasks(args, nullptr);
  };
}

constexpr auto kBad = StatusCode::kInvalidArgument;
INSTANTIATE_TEST_SUITE_P(
    BlockMasks, RefusalTest,
    ::testing::Values(
        Refusal{"tokens", Changed([](auto* a) { a->masks.num_tokens = 0; }), kBad, "num_tokens is 0"},
        Refusal{"lists", Changed([](auto* a) { a->masks.num_lists = -1; }), kBad, "num_lists is -1"},
        Refusal{"positions", Changed([](auto* a) { a->masks.tile_positions = 129; }), kBad,
                "tile_positions is 129"},
        Refusal{"capacity", Changed([](auto* a) { a->capacity = 0; }), kBad, "capacity is 0"},
        Refusal{"words", Changed([](auto* a) { a->masks.words = nullptr; }), kBad, "words is null"},
        Refusal{"counts", Changed([](auto* a) { a->counts = nullptr; }), kBad, "counts is null"},
        Refusal{"offsets", Changed([](auto* a) { a->offsets = nullptr; }), kBad, "offsets is null"},
        Refusal{"blocks", Changed([](auto* a) { a->blocks = static_cast<int32_t*>(kMisaligned); }), kBad,
                "blocks is not 16"},
        Refusal{"visited", Changed([](auto* a) { a->visited = reinterpret_cast<uint64_t*>(uintptr_t{4}); }),
                kBad, "visited is not 8"},
        Refusal{"overflows", Changed([](auto* a) { a->overflows = nullptr; }), kBad, "overflows is null"},
        Refusal{"segments", Changed([](auto* a) {
                  a->masks.num_tokens = INT32_MAX;
                  a->masks.num_lists = 256;
                  a->masks.tile_positions = 16;
                }),
                kBad, "num_lists * tiles"}),
    [](const auto& test) { return test.param.name; });

TEST(CudaBlockMasksTest, CountingRefusesWhatIsNoLists) {
  CudaCountListsArgs args;
  args.lists = {2, static_cast<int32_t*>(kAligned), nullptr, nullptr};
  args.num_tokens = 1000;
  args.num_q_heads = 7;
  args.visited = static_cast<uint64_t*>(kAligned);
  args.dense_tiles = static_cast<uint32_t*>(kAligned);
  EXPECT_EQ(CudaCountLists(args, nullptr).message(),
            "2 lists of 7 query heads; 1 to 128 heads a list are wanted");
  args.num_q_heads = 8;
  args.lists.num_lists = 0;
  EXPECT_EQ(CudaCountLists(args, nullptr).code(), kBad);
  args.lists.num_lists = 2;
  args.visited = nullptr;
  EXPECT_EQ(CudaCountLists(args, nullptr).message(), "visited is null");
}

TEST(CudaBlockMasksTest, SizesFollowTheLists) {
  const CudaBlockMasks per_query_head = CudaBlockMasksOf(4225, 9, 3, true),
                       packed = CudaBlockMasksOf(4225, 9, 3, false);

  EXPECT_EQ(per_query_head.num_lists, 9);
  EXPECT_EQ(per_query_head.tile_positions, 128);
  EXPECT_EQ(per_query_head.tiles(), 34);
  EXPECT_EQ(per_query_head.tile_words(), 2);
  EXPECT_EQ(per_query_head.bytes(), 9u * 34 * 2 * 4);
  EXPECT_EQ(packed.num_lists, 3);
  EXPECT_EQ(packed.tile_positions, 42);
  EXPECT_EQ(packed.tiles(), 101);
}

TEST(CudaBlockMasksTest, PossibleBlocksAreWhatTilesSee) {
  for (const int64_t tokens : {1, 127, 128, 129, 1000, 4225, 16'383, 16'384, 33'001, 1'048'577}) {
    for (const int32_t group : {1, 3, 4, 5, 6, 7, 8}) {
      const CudaBlockMasks masks = CudaBlockMasksOf(tokens, 2 * group, 2, false);
      uint64_t wanted = 0;
      for (int64_t tile = 0; tile < masks.tiles(); ++tile) {
        const int64_t last = std::min(tokens, (tile + 1) * masks.tile_positions) - 1;
        wanted += static_cast<uint64_t>(2 * (last / 128 + 1));
      }
      EXPECT_EQ(CudaPossibleBlocks(masks), wanted) << tokens << " tokens, groups of " << group;
    }
  }
}

}  // namespace
}  // namespace headwater::kernels
