// Block lists made of bit masks on the GPU, against the masks bit by bit.
#include "kernels/cuda/block_masks.h"

#include <algorithm>
#include <string>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {
namespace {

struct Case {
  const char* name;
  int64_t num_tokens;
  int32_t num_lists, tile_positions;
  int density;  // of 16; 16: all
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

struct Lists {
  std::vector<int32_t> counts, blocks;
  std::vector<int64_t> offsets;
  uint64_t visited = 0;
  uint32_t overflows = 0;
};

CudaBlockMasks Shape(const Case& c) { return {nullptr, c.num_tokens, c.num_lists, c.tile_positions}; }

// Bits past what tiles see are set too. Every seventh tile has all its bits, every eleventh none.
std::vector<uint32_t> RandomWords(const Case& c, uint32_t seed) {
  std::mt19937 random(seed);
  const auto tile_words = static_cast<size_t>(Shape(c).tile_words());
  std::vector<uint32_t> words(Shape(c).bytes() / 4);
  for (size_t i = 0; i < words.size(); ++i) {
    for (int bit = 0; bit < 32; ++bit) {
      words[i] |= static_cast<uint32_t>(static_cast<int>(random() % 16) < c.density) << bit;
    }
    if (i / tile_words % 7 == 3) words[i] = ~0u;
    if (i / tile_words % 11 == 5) words[i] = 0;
  }
  return words;
}

Lists Wanted(const Case& c, const std::vector<uint32_t>& words, const std::vector<uint8_t>& dense_lists,
             int64_t capacity) {
  const CudaBlockMasks shape = Shape(c);
  Lists wanted;
  int64_t begin = 0;
  for (int64_t segment = 0; segment < shape.num_lists * shape.tiles(); ++segment) {
    const int64_t list = segment / shape.tiles(), tile = segment % shape.tiles();
    const int64_t visible = (std::min(c.num_tokens, (tile + 1) * c.tile_positions) + 127) / 128;
    std::vector<int32_t> blocks;
    for (int64_t block = 0; block < visible; ++block) {
      const uint32_t word = words[static_cast<size_t>(segment * shape.tile_words() + block / 32)];
      if ((word >> (block % 32) & 1) != 0) blocks.push_back(static_cast<int32_t>(block));
    }
    const auto count = static_cast<int64_t>(blocks.size());
    bool dense = count == visible || (!dense_lists.empty() && dense_lists[static_cast<size_t>(list)] != 0);
    const bool overflow = !dense && begin + count > capacity;
    wanted.overflows += overflow;
    wanted.counts.push_back(dense || overflow ? -1 : static_cast<int32_t>(count));
    wanted.offsets.push_back(dense || overflow ? 0 : begin);
    wanted.visited += static_cast<uint64_t>(dense || overflow ? visible : count);
    if (!dense) begin += count;
    if (!dense && !overflow) wanted.blocks.insert(wanted.blocks.end(), blocks.begin(), blocks.end());
  }
  return wanted;
}

Lists ListsOn(const Case& c, const std::vector<uint32_t>& words, const std::vector<uint8_t>& dense_lists,
              int64_t capacity) {
  DeviceArray<uint32_t> device_words(words), overflows(1);
  DeviceArray<uint8_t> device_dense(dense_lists);
  const auto segments = static_cast<size_t>(c.num_lists * Shape(c).tiles());
  DeviceArray<int32_t> counts(segments), blocks(static_cast<size_t>(capacity));
  DeviceArray<int64_t> offsets(segments);
  DeviceArray<uint64_t> visited(1);
  CudaListsOfMasksArgs args;
  args.masks = Shape(c);
  args.masks.words = device_words.data();
  args.dense_lists = dense_lists.empty() ? nullptr : device_dense.data();
  args.counts = counts.data();
  args.offsets = offsets.data();
  args.blocks = blocks.data();
  args.capacity = capacity;
  args.visited = visited.data();
  args.overflows = overflows.data();

  const Status status = CudaListsOfMasks(args, nullptr);

  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(counts.Intact() && blocks.Intact() && offsets.Intact() && visited.Intact() &&
              overflows.Intact());
  return {counts.Host(), blocks.Host(), offsets.Host(), visited.Host()[0], overflows.Host()[0]};
}

void ExpectLists(const Lists& got, const Lists& wanted) {
  EXPECT_EQ(got.counts, wanted.counts);
  EXPECT_EQ(got.offsets, wanted.offsets);
  EXPECT_EQ(got.visited, wanted.visited);
  EXPECT_EQ(got.overflows, wanted.overflows);
  ASSERT_GE(got.blocks.size(), wanted.blocks.size());
  EXPECT_TRUE(std::equal(wanted.blocks.begin(), wanted.blocks.end(), got.blocks.begin()));
  for (size_t i = wanted.blocks.size(); i < got.blocks.size(); ++i) ASSERT_EQ(got.blocks[i], -1) << i;
}

class CudaBlockMasksGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaBlockMasksGpuTest, ListsAreTheBits) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const std::vector<uint32_t> words = RandomWords(c, 1);
  const auto room = static_cast<int64_t>(words.size() * 32);

  const Lists got = ListsOn(c, words, {}, room);

  ExpectLists(got, Wanted(c, words, {}, room));
  EXPECT_EQ(got.overflows, 0u);
}

TEST_P(CudaBlockMasksGpuTest, ListsAreDenseByRequestAndForWantOfRoom) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const std::vector<uint32_t> words = RandomWords(c, 2);
  std::vector<uint8_t> dense_lists(static_cast<size_t>(c.num_lists), 0);
  dense_lists.back() = 1;
  const auto asked = static_cast<int64_t>(Wanted(c, words, dense_lists, int64_t{1} << 40).blocks.size());
  const int64_t room = std::max<int64_t>(1, asked * 2 / 3);

  const Lists got = ListsOn(c, words, dense_lists, room), again = ListsOn(c, words, dense_lists, room);

  ExpectLists(got, Wanted(c, words, dense_lists, room));
  EXPECT_TRUE(SameBits(got.blocks, again.blocks) && SameBits(got.offsets, again.offsets) &&
              SameBits(got.counts, again.counts));
}

TEST_P(CudaBlockMasksGpuTest, CountsOfListsAddUp) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const CudaBlockMasks shape = Shape(c);
  const auto lists = static_cast<size_t>(c.num_lists);
  std::mt19937 random(3);
  std::vector<int32_t> counts(lists * static_cast<size_t>(shape.tiles()));
  std::vector<uint64_t> visited(lists);
  std::vector<uint32_t> dense_tiles(lists);
  for (size_t i = 0; i < counts.size(); ++i) {
    const size_t list = i / static_cast<size_t>(shape.tiles());
    const int64_t tile = static_cast<int64_t>(i) % shape.tiles();
    counts[i] = static_cast<int32_t>(random() % 100) - 1;
    if (i % 5 == 2) counts[i] = -1;
    dense_tiles[list] += counts[i] < 0;
    visited[list] += static_cast<uint64_t>(
        counts[i] < 0 ? (std::min(c.num_tokens, (tile + 1) * c.tile_positions) + 127) / 128 : counts[i]);
  }
  const DeviceArray<int32_t> device_counts(counts);
  DeviceArray<uint64_t> got_visited(lists);
  DeviceArray<uint32_t> got_dense(lists);
  CudaCountListsArgs args;
  args.lists = {c.num_lists, device_counts.data(), nullptr, nullptr};
  args.num_tokens = c.num_tokens;
  args.num_q_heads = c.num_lists * (128 / c.tile_positions);
  args.visited = got_visited.data();
  args.dense_tiles = got_dense.data();

  const Status status = CudaCountLists(args, nullptr);

  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(got_visited.Host(), visited);
  EXPECT_EQ(got_dense.Host(), dense_tiles);
  EXPECT_TRUE(got_visited.Intact() && got_dense.Intact());
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaBlockMasksGpuTest,
    ::testing::Values(Case{"one_token", 1, 1, 128, 8}, Case{"under_a_block", 127, 3, 128, 8},
                      Case{"one_block", 128, 2, 32, 8}, Case{"block_plus_1", 129, 2, 128, 8},
                      Case{"words_32", 4096, 8, 128, 3}, Case{"words_33", 4097, 2, 16, 3},
                      Case{"gqa3", 5003, 3, 42, 5}, Case{"gqa5", 3001, 2, 25, 5},
                      Case{"full", 3001, 2, 128, 16}, Case{"empty", 3001, 2, 128, 0},
                      Case{"long", 140001, 9, 128, 2}, Case{"packed", 70000, 4, 16, 1}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace headwater::kernels
