// Attention over ranges and columns on the GPU against double precision.
#include "kernels/cuda/range_attention.h"

#include <random>
#include <set>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/near.h"
#include "tests/kernels/cuda/range_problem.h"

namespace headwater::kernels {
namespace {

// Random lists; among them dense ones, empty ones, and such of columns only.
struct Lists {
  int num_lists, tiles;
  std::vector<int32_t> range_counts, column_counts, columns;
  std::vector<int64_t> range_offsets, column_offsets;
  std::vector<CudaKeyRange> ranges;

  Lists(int lists, int num_tiles, uint32_t seed) : num_lists(lists), tiles(num_tiles) {
    std::mt19937 random(seed);
    for (int segment = 0; segment < num_lists * tiles; ++segment) {
      Add(segment % tiles, static_cast<int>(random() % 8), &random);
    }
    ranges.push_back({0, 64});  // neither is empty
    columns.push_back(0);
  }

  void Add(int tile, int kind, std::mt19937* random) {
    const int first = tile * 64, end = first + 64;
    range_offsets.push_back(static_cast<int64_t>(ranges.size()));
    column_offsets.push_back(static_cast<int64_t>(columns.size()));
    range_counts.push_back(0);
    column_counts.push_back(0);
    if (kind == 0) {
      range_counts.back() = -1;
      return;
    }
    if (kind == 1) return;
    if (kind != 2) {
      for (int begin = static_cast<int>((*random)() % 200); begin < end;) {
        const int most = (end + 63 - begin) / 64;
        const int blocks = 1 + static_cast<int>((*random)() % std::min(most, 4));
        ranges.push_back({begin, begin + 64 * blocks});
        ++range_counts.back();
        begin += 64 * blocks + 1 + static_cast<int>((*random)() % 150);
      }
    }
    const auto rarity = static_cast<unsigned>(kind == 3 ? 1 : 1 + (*random)() % 20);
    for (int key = 0; key < first; ++key) {
      if (InRange(range_counts.size() - 1, key) || (*random)() % rarity != 0) continue;
      columns.push_back(key);
      ++column_counts.back();
    }
  }

  bool InRange(size_t segment, int key) const {
    for (int i = 0; i < range_counts[segment]; ++i) {
      const CudaKeyRange& range = ranges[range_offsets[segment] + i];
      if (key >= range.begin && key < range.end) return true;
    }
    return range_counts[segment] < 0;
  }

  std::vector<int64_t> Keys(int head, int row, int sinks, int window) const {
    const size_t segment = static_cast<size_t>(num_lists == 1 ? 0 : head) * tiles + row / 64;
    std::vector<int64_t> keys;
    for (int key = 0; key <= row; ++key) {
      if (window >= 0 && key >= sinks && key <= row - window) continue;
      if (InRange(segment, key)) keys.push_back(key);
    }
    const auto begin = columns.begin() + column_offsets[segment];
    keys.insert(keys.end(), begin, begin + column_counts[segment]);
    return keys;
  }
};

struct DeviceLists {
  DeviceArray<int32_t> range_counts, column_counts, columns;
  DeviceArray<int64_t> range_offsets, column_offsets;
  DeviceArray<CudaKeyRange> ranges;
  CudaKeyRanges view;

  explicit DeviceLists(const Lists& l)
      : range_counts(l.range_counts),
        column_counts(l.column_counts),
        columns(l.columns),
        range_offsets(l.range_offsets),
        column_offsets(l.column_offsets),
        ranges(l.ranges) {
    view = {l.num_lists,          range_counts.data(),   range_offsets.data(), ranges.data(),
            column_counts.data(), column_offsets.data(), columns.data()};
  }
};

class CudaRangeAttentionGpuTest : public ::testing::TestWithParam<Shape> {};

TEST_P(CudaRangeAttentionGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const RangeProblem problem(GetParam(), 1);
  const Lists lists(GetParam().q_heads, GetParam().Tiles(), 7);
  const DeviceLists device(lists);

  problem.ExpectAttention(device.view, [&](int head, int row) { return lists.Keys(head, row, -1, -1); });
}

TEST_P(CudaRangeAttentionGpuTest, SharedListsUnderAMask) {
  HW_REQUIRE_SM90();
  const RangeProblem problem(GetParam(), 4);
  const Lists lists(1, GetParam().Tiles(), 8);
  DeviceLists device(lists);
  device.view.sink_tokens = 37;
  device.view.window_tokens = 150;

  problem.ExpectAttention(device.view, [&](int head, int row) { return lists.Keys(head, row, 37, 150); });
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaRangeAttentionGpuTest,
                         ::testing::Values(Shape{"one_token", 4, 2, 128, 1}, Shape{"t63", 2, 2, 64, 63},
                                           Shape{"t64", 3, 1, 128, 64}, Shape{"t65", 8, 1, 64, 65},
                                           Shape{"t127", 4, 1, 128, 127}, Shape{"t128", 3, 1, 64, 128},
                                           Shape{"t129", 8, 1, 128, 129}, Shape{"mha", 2, 2, 128, 1001},
                                           Shape{"gqa3", 9, 3, 128, 777}, Shape{"gqa4", 8, 2, 128, 1500},
                                           Shape{"gqa4_d64", 8, 2, 64, 1500}, Shape{"gqa7", 7, 1, 64, 900},
                                           Shape{"gqa8", 8, 1, 128, 2100}),
                         [](const auto& test) { return test.param.name; });

TEST(CudaRangeAttentionGpuTest, EqualCallsGiveEqualBits) {
  HW_REQUIRE_SM90();
  const RangeProblem problem({"", 4, 2, 128, 1500}, 1);
  const DeviceLists device(Lists(4, problem.shape.Tiles(), 7));
  ASSERT_TRUE(CudaRangeAttention(problem.Args(device.view), nullptr).ok());
  const std::vector<uint16_t> first = problem.out.Host();
  ASSERT_EQ(cudaMemset(problem.out.data(), 0xFF, problem.out.Bytes()), cudaSuccess);

  ASSERT_TRUE(CudaRangeAttention(problem.Args(device.view), nullptr).ok());

  EXPECT_TRUE(SameBits(first, problem.out.Host()));
}

TEST(CudaRangeAttentionGpuTest, OutputInTheQueriesPlaceWithoutLse) {
  HW_REQUIRE_SM90();
  const RangeProblem problem({"", 4, 2, 128, 700}, 1);
  const DeviceLists device(Lists(4, problem.shape.Tiles(), 7));
  CudaRangeAttentionArgs args = problem.Args(device.view);
  ASSERT_TRUE(CudaRangeAttention(args, nullptr).ok());
  args.out = problem.dq.data();
  args.lse_ln = nullptr;

  ASSERT_TRUE(CudaRangeAttention(args, nullptr).ok());

  EXPECT_TRUE(SameBits(problem.dq.Host(), problem.out.Host()));
  EXPECT_TRUE(problem.dq.Intact());
}

// Of a NaN in a query its own row is spoilt.
TEST(CudaRangeAttentionGpuTest, NanStaysInItsRow) {
  HW_REQUIRE_SM90();
  const Shape shape = {"", 2, 1, 64, 300};
  RangeProblem clean(shape, 1);
  const DeviceLists device(Lists(2, shape.Tiles(), 3));
  std::vector<float> q = clean.q;
  q[(200 * 2 + 1) * 64] = std::nanf("");
  const RangeProblem spoilt(shape, q, clean.k, clean.v);

  ASSERT_TRUE(CudaRangeAttention(clean.Args(device.view), nullptr).ok());
  ASSERT_TRUE(CudaRangeAttention(spoilt.Args(device.view), nullptr).ok());

  std::vector<uint16_t> a = clean.out.Host(), b = spoilt.out.Host();
  for (int i = 0; i < 64; ++i) a[(200 * 2 + 1) * 64 + i] = b[(200 * 2 + 1) * 64 + i];
  EXPECT_TRUE(SameBits(a, b));
}

}  // namespace
}  // namespace headwater::kernels
