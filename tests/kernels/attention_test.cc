#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <omp.h>

#include "kernels/pattern/policy.h"
#include "tests/kernels/attention_cases.h"

namespace headwater::kernels {
namespace {

using cpu::CpuPath;

// f32: K and V are exact; sums of up to 2,000 terms in f32, exp to 1e-7 and scores up to about 16 leave a few
// 1e-6. bf16: P is rounded to 8 bits (relative 2^-9) and averaged with weights that sum to 1; scores are
// exact products summed in f32.
constexpr double kF32Tolerance = 1e-5;
constexpr double kBF16Tolerance = 6e-3;
constexpr double kF32LseTolerance = 1e-5;
constexpr double kBF16LseTolerance = 2e-3;

void ExpectMatches(const AttentionInputs& in, const BlockIndex& index, const std::string& name) {
  GuardedState want(in.shape, in.queries.num_tokens);
  ASSERT_TRUE(reference::SparseAttention(in.shape, in.queries, in.keys, index, want.view()).ok()) << name;
  for (const CpuPath path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    GuardedState got(in.shape, in.queries.num_tokens);
    const Status status = SparseAttention(in.shape, in.queries, in.keys, index, got.view());
    ASSERT_TRUE(status.ok()) << name << ": " << status.message();
    EXPECT_TRUE(got.Intact()) << name << " on " << NameOf(path);
    const bool bf16 =
        in.queries.dtype == DType::kBF16 && in.keys.dtype == DType::kBF16 && path >= CpuPath::kAvx512Bf16;
    const AttentionError error = Compare(got, want);
    EXPECT_LE(error.out, bf16 ? kBF16Tolerance : kF32Tolerance) << name << " on " << NameOf(path);
    EXPECT_LE(error.lse, bf16 ? kBF16LseTolerance : kF32LseTolerance) << name << " on " << NameOf(path);
  }
}

const AttentionCase kCases[] = {
    // name                     q heads, kv heads, dim, q begin, queries, k begin, keys
    {"one_token", 1, 1, 64, 0, 1, 0, 1},
    {"tile_minus_one", 2, 1, 64, 0, 127, 0, 127},
    {"tile", 2, 2, 64, 0, 128, 0, 128},
    {"tile_plus_one", 2, 1, 64, 0, 129, 0, 129},
    {"prime", 3, 1, 64, 0, 211, 0, 211},
    {"gqa_2", 4, 2, 64, 0, 150, 0, 150},
    {"gqa_3", 9, 3, 64, 0, 140, 0, 140},
    {"gqa_5", 5, 1, 64, 0, 70, 0, 70},
    {"gqa_7", 14, 2, 64, 0, 45, 0, 45},
    {"gqa_8", 8, 1, 128, 0, 40, 0, 40},
    {"mqa_17", 17, 1, 32, 0, 20, 0, 20},
    {"dim_16", 2, 1, 16, 0, 131, 0, 131},
    {"dim_80", 2, 1, 80, 0, 131, 0, 131},
    {"dim_96", 2, 1, 96, 0, 131, 0, 131},
    {"dim_128", 2, 1, 128, 0, 131, 0, 131},
    {"dim_240", 1, 1, 240, 0, 131, 0, 131},
    {"dim_256", 2, 1, 256, 0, 131, 0, 131},
    {"off_tile_begin", 2, 1, 64, 77, 130, 0, 207},
    {"off_block_keys", 2, 1, 64, 300, 61, 37, 324},
    {"keys_after_queries", 2, 1, 64, 0, 50, 50, 100},
    {"keys_partly_after", 2, 1, 64, 100, 60, 90, 200},
    {"keys_before_queries", 3, 1, 64, 1000, 33, 129, 300},
    {"decode", 9, 3, 64, 700, 1, 0, 701},
    {"decode_one_head", 4, 4, 128, 1300, 1, 0, 1301},
    {"decode_long", 6, 2, 64, 3000, 1, 0, 3001},
    {"decode_dim_16", 2, 1, 16, 300, 1, 0, 301},
    {"decode_dim_240", 2, 1, 240, 300, 1, 7, 294},
    {"few_queries", 4, 2, 64, 400, 3, 0, 403},
    {"few_queries_over_a_tile_edge", 2, 1, 64, 382, 4, 5, 400},
    {"eight_lanes", 8, 1, 80, 100, 1, 3, 98},
    {"nine_lanes", 9, 1, 64, 100, 1, 3, 98},
    {"packed_in_pieces", 2, 1, 32, 8300, 40, 17, 8323},
    {"far_positions", 2, 1, 64, (int64_t{1} << 40) + 5, 40, (int64_t{1} << 40) - 100, 145},
    {"sharp_scores", 2, 1, 64, 0, 200, 0, 200, 20},
};

class AttentionShapes : public testing::TestWithParam<AttentionCase> {};

TEST_P(AttentionShapes, F32MatchesReference) {
  const AttentionInputs in(GetParam(), DType::kF32, DType::kF32);
  ExpectMatches(in, DenseBlockIndex(in.first_tile, in.num_tiles), GetParam().name);
}

TEST_P(AttentionShapes, BF16MatchesReference) {
  const AttentionInputs in(GetParam(), DType::kBF16, DType::kBF16);
  ExpectMatches(in, DenseBlockIndex(in.first_tile, in.num_tiles), GetParam().name);
}

INSTANTIATE_TEST_SUITE_P(Table, AttentionShapes, testing::ValuesIn(kCases),
                         [](const auto& param) { return param.param.name; });

TEST(Attention, TakesAnyMixOfTypes) {
  const AttentionCase c{"mixed", 4, 2, 64, 100, 70, 3, 167};
  for (const DType q : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const DType kv : {DType::kF32, DType::kF16, DType::kBF16}) {
      const AttentionInputs in(c, q, kv);
      ExpectMatches(in, DenseBlockIndex(in.first_tile, in.num_tiles),
                    std::string(NameOf(q)) + " with " + NameOf(kv));
    }
  }
}

// Random lists, per head, KV head or for all.
BlockIndex RandomIndex(const AttentionInputs& in, int32_t num_lists, uint32_t seed) {
  std::mt19937 random(seed);
  BlockIndex index;
  index.num_lists = num_lists;
  index.first_q_tile = in.first_tile;
  index.num_q_tiles = in.num_tiles;
  index.offsets.push_back(0);
  for (int32_t list = 0; list < num_lists; ++list) {
    for (int64_t tile = in.first_tile; tile < in.first_tile + in.num_tiles; ++tile) {
      const bool dense = random() % 5 == 0;
      index.dense.push_back(dense ? 1 : 0);
      for (int64_t block = 0; !dense && block <= tile; ++block) {
        if (random() % 2 == 0) index.blocks.push_back(static_cast<int32_t>(block));
      }
      index.offsets.push_back(static_cast<int64_t>(index.blocks.size()));
    }
  }
  return index;
}

TEST(Attention, FollowsBlockListsPerHeadKvHeadOrForAll) {
  const AttentionCase kListCases[] = {{"lists", 6, 2, 64, 300, 290, 77, 513},
                                      {"decode_lists", 6, 2, 64, 1300, 2, 77, 1225}};
  for (const AttentionCase& c : kListCases) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const AttentionInputs in(c, dtype, dtype);
      for (const int32_t lists : {1, 2, 3, 6}) {
        ExpectMatches(in, RandomIndex(in, lists, 11), c.name + ", " + std::to_string(lists) + " lists");
      }
    }
  }
}

TEST(Attention, TakesOtherTileAndBlockSizes) {
  const AttentionCase c{"sizes", 2, 1, 64, 90, 150, 10, 230};
  const AttentionInputs in(c, DType::kBF16, DType::kBF16);
  BlockIndex index;
  index.q_tile_tokens = 64;
  index.k_block_tokens = 32;
  index.first_q_tile = 1;
  index.num_q_tiles = 3;
  index.dense = {0, 0, 1};
  index.blocks = {0, 2, 3, 1, 2, 5};
  index.offsets = {0, 3, 6, 6};
  ExpectMatches(in, index, "tiles of 64, blocks of 32");
}

TEST(Attention, AShapeMaskMatchesReference) {
  struct Row {
    double sink;
    double window;
  };
  const AttentionCase kMaskCases[] = {{"a_shape", 3, 1, 64, 200, 500, 30, 670},
                                      {"decode_a_shape", 3, 1, 64, 690, 2, 30, 662}};
  for (const AttentionCase& c : kMaskCases)
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const AttentionInputs in(c, dtype, dtype);
      for (const Row row :
           {Row{0, 1}, Row{1, 1}, Row{4, 60}, Row{40, 128}, Row{128, 129}, Row{200, 300}, Row{0, 4000}}) {
        std::unique_ptr<PatternPolicy> policy;
        ASSERT_TRUE(
            MakePolicy("a_shape", {{"sink_tokens", row.sink}, {"window_tokens", row.window}}, &policy).ok());
        BlockIndex index;
        ASSERT_TRUE(policy->Select({0, 3, 1, 700, in.first_tile, in.num_tiles}, &index).ok());
        ExpectMatches(in, index,
                      c.name + " sink " + std::to_string(row.sink) + " window " + std::to_string(row.window));
      }
    }
}

TEST(Attention, RowsWithoutAKeyStayEmpty) {
  const AttentionCase c{"empty", 2, 1, 64, 0, 40, 20, 20};
  for (const CpuPath path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const AttentionInputs in(c, dtype, dtype);
      GuardedState state(in.shape, 40);
      ASSERT_TRUE(SparseAttention(in.shape, in.queries, in.keys, DenseBlockIndex(0, 1), state.view()).ok());
      for (size_t row = 0; row < 40; ++row) {
        const float lse = state.lse()[row];
        EXPECT_EQ(row < 40 ? lse == -INFINITY : false, row < 40) << row;
        EXPECT_EQ(state.out()[row * 64], 0) << row;
      }
      EXPECT_NE(state.lse()[40], -INFINITY);
    }
  }
}

TEST(Attention, RowsWithoutANewKeyKeepTheirBits) {
  const AttentionCase c{"kept", 2, 1, 64, 0, 100, 0, 100};
  for (const CpuPath path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const AttentionInputs in(c, dtype, dtype);
      GuardedState state(in.shape, 100);
      const BlockIndex index = DenseBlockIndex(0, 1);
      ASSERT_TRUE(SparseAttention(in.shape, in.queries, in.KeySlice(0, 70), index, state.view()).ok());
      const auto before = state.out();
      const auto lse_before = state.lse();
      ASSERT_TRUE(SparseAttention(in.shape, in.queries, in.KeySlice(70, 100), index, state.view()).ok());
      const auto after = state.out();
      for (size_t i = 0; i < 70 * 2 * 64; ++i) ASSERT_EQ(before[i], after[i]) << i << " on " << NameOf(path);
      for (size_t i = 0; i < 70 * 2; ++i) ASSERT_EQ(lse_before[i], state.lse()[i]);
      EXPECT_NE(before[99 * 2 * 64], after[99 * 2 * 64]);
    }
  }
}

TEST(Attention, ChunksMergedInAnyOrderEqualOnePass) {
  const AttentionCase c{"merge", 6, 2, 64, 250, 150, 0, 400, 4};
  std::vector<std::pair<int64_t, int64_t>> slices = {{0, 128}, {128, 131}, {131, 300}, {300, 400}};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const AttentionInputs in(c, dtype, dtype);
    const BlockIndex index = DenseBlockIndex(in.first_tile, in.num_tiles);
    GuardedState want(in.shape, 150);
    ASSERT_TRUE(reference::SparseAttention(in.shape, in.queries, in.keys, index, want.view()).ok());
    std::sort(slices.begin(), slices.end());
    do {
      for (const CpuPath path : SupportedPaths()) {
        const cpu::ScopedCpuPath forced(path);
        GuardedState got(in.shape, 150);
        for (const auto& slice : slices) {
          const KeyChunk keys = in.KeySlice(slice.first, slice.second);
          ASSERT_TRUE(SparseAttention(in.shape, in.queries, keys, index, got.view()).ok());
        }
        const bool bf16 = dtype == DType::kBF16 && path >= CpuPath::kAvx512Bf16;
        const AttentionError error = Compare(got, want);
        EXPECT_LE(error.out, bf16 ? kBF16Tolerance : kF32Tolerance) << NameOf(path);
        EXPECT_LE(error.lse, bf16 ? kBF16LseTolerance : kF32LseTolerance) << NameOf(path);
      }
    } while (std::next_permutation(slices.begin(), slices.end()));
  }
}

void ExpectEqualBits(const AttentionCase& c) {
  const int threads_before = omp_get_max_threads();
  for (const CpuPath path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const AttentionInputs in(c, dtype, dtype);
      std::vector<float> first;
      for (const int threads : {1, 2, 2, 3, 5}) {
        omp_set_num_threads(threads);
        GuardedState state(in.shape, c.num_queries);
        const BlockIndex index = DenseBlockIndex(in.first_tile, in.num_tiles);
        ASSERT_TRUE(SparseAttention(in.shape, in.queries, in.keys, index, state.view()).ok());
        if (first.empty()) first = state.out();
        EXPECT_EQ(first, state.out()) << NameOf(path) << " with " << threads << " threads";
      }
    }
  }
  omp_set_num_threads(threads_before);
}

TEST(Attention, PrefillIsBitwiseEqualOnEveryRunAndNumberOfThreads) {
  ExpectEqualBits({"prefill", 6, 2, 64, 0, 300, 0, 300, 3});
}

TEST(Attention, DecodeIsBitwiseEqualOnEveryRunAndNumberOfThreads) {
  ExpectEqualBits({"decode", 6, 2, 64, 2000, 1, 0, 2001, 3});
}

// `spoil_v`: the NaN is in V; else in K.
void ExpectNaNSpreads(bool spoil_v, int64_t q_begin) {
  const AttentionCase c{"nan", 1, 1, 64, q_begin, 90 - q_begin, 0, 90};
  std::vector<float> values(90 * 64, 0.5f);
  for (size_t i = 0; i < 64; ++i) values[50 * 64 + i] = std::numeric_limits<float>::quiet_NaN();
  for (const CpuPath path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      AttentionInputs in(c, dtype, dtype);
      const GuardedTensor spoiled(dtype, values);
      (spoil_v ? in.keys.v : in.keys.k) = spoiled.data();
      GuardedState state(in.shape, c.num_queries);
      ASSERT_TRUE(SparseAttention(in.shape, in.queries, in.keys, DenseBlockIndex(0, 1), state.view()).ok());
      const auto out = state.out();
      for (int64_t row = 0; row < c.num_queries; ++row) {
        EXPECT_EQ(std::isnan(out[static_cast<size_t>(row) * 64]), q_begin + row >= 50)
            << row << " on " << NameOf(path);
      }
    }
  }
}

TEST(Attention, NaNInAVisibleKeyReachesTheRowsThatSeeIt) {
  ExpectNaNSpreads(false, 0);
  ExpectNaNSpreads(false, 85);
}

TEST(Attention, NaNInAVisibleValueReachesTheRowsThatSeeIt) { ExpectNaNSpreads(true, 85); }

TEST(Attention, EmptyChunksChangeNothing) {
  const AttentionCase c{"none", 2, 1, 64, 0, 10, 0, 10};
  const AttentionInputs in(c, DType::kF32, DType::kF32);
  GuardedState state(in.shape, 10);
  KeyChunk no_keys = in.keys;
  no_keys.num_tokens = 0;
  EXPECT_TRUE(SparseAttention(in.shape, in.queries, no_keys, DenseBlockIndex(0, 1), state.view()).ok());
  QueryChunk no_queries = in.queries;
  no_queries.num_tokens = 0;
  EXPECT_TRUE(SparseAttention(in.shape, no_queries, in.keys, DenseBlockIndex(0, 0), state.view()).ok());
  EXPECT_EQ(state.lse()[0], -INFINITY);
}

TEST(Attention, RefusesWhatTheHeaderForbids) {
  const AttentionCase c{"refused", 4, 2, 64, 100, 100, 0, 200};
  const AttentionInputs in(c, DType::kF32, DType::kF32);
  const BlockIndex index = DenseBlockIndex(0, 2);
  GuardedState state(in.shape, 100);
  const auto expect_refused = [&](const AttentionShape& shape, const QueryChunk& queries,
                                  const KeyChunk& keys, const BlockIndex& blocks, const std::string& words) {
    const Status status = SparseAttention(shape, queries, keys, blocks, state.view());
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << words;
    EXPECT_NE(status.message().find(words), std::string::npos) << status.message();
  };
  AttentionShape shape = in.shape;
  shape.num_kv_heads = 3;
  expect_refused(shape, in.queries, in.keys, index, "num_q_heads 4");
  shape = in.shape;
  for (const int32_t dim : {0, 8, 72, 272}) {
    shape.head_dim = dim;
    expect_refused(shape, in.queries, in.keys, index, "head_dim " + std::to_string(dim));
  }
  shape = in.shape;
  for (const float scale : {0.0f, -1.0f, INFINITY, NAN}) {
    shape.softmax_scale = scale;
    expect_refused(shape, in.queries, in.keys, index, "softmax_scale");
  }
  QueryChunk queries = in.queries;
  queries.begin = -1;
  expect_refused(in.shape, queries, in.keys, index, "queries from position -1");
  queries = in.queries;
  queries.num_tokens = int64_t{1} << 53;
  expect_refused(in.shape, queries, in.keys, index, "outside 0 to 2^53");
  queries = in.queries;
  queries.q = nullptr;
  expect_refused(in.shape, queries, in.keys, index, "queries.q is null");
  KeyChunk keys = in.keys;
  keys.v = nullptr;
  expect_refused(in.shape, in.queries, keys, index, "keys.v is null");
  keys = in.keys;
  keys.num_tokens = int64_t{1} << 52;
  keys.begin = int64_t{1} << 53;
  expect_refused(in.shape, in.queries, keys, index, "keys from position");
  expect_refused(in.shape, in.queries, in.keys, DenseBlockIndex(0, 1), "tiles 0 to 1");
  expect_refused(in.shape, in.queries, in.keys, DenseBlockIndex(1, 1), "tiles 0 to 1");
  BlockIndex lists = DenseBlockIndex(0, 2);
  lists.num_lists = 3;
  lists.dense.assign(6, 1);
  lists.offsets.assign(7, 0);
  expect_refused(in.shape, in.queries, in.keys, lists, "num_lists 3 does not divide");
  AttentionState none;
  EXPECT_EQ(SparseAttention(in.shape, in.queries, in.keys, index, none).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace headwater::kernels
