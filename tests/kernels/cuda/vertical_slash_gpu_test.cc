// Vertical-slash on the GPU: every stage, and attention, against the reference.
#include "kernels/cuda/policies/vertical_slash.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/near.h"
#include "tests/kernels/cuda/vertical_slash_stages.h"

namespace headwater::kernels {
namespace {

// f32 sums of f32 probabilities, relative: a sum this near to the last chosen one may be chosen or not.
constexpr double kNear = 1e-4;

// Keys of a few topics and a strong first one: columns and distances stand out.
RangeProblem Structured(const Shape& s, uint32_t seed) {
  std::vector<float> q = RandomBf16(size_t{1} * s.tokens * s.q_heads * s.head_dim, seed),
                     k = RandomBf16(size_t{1} * s.tokens * s.kv_heads * s.head_dim, seed + 1),
                     v = RandomBf16(k.size(), seed + 2);
  for (int token = 0; token < s.tokens; ++token) {
    for (int i = 0; i < s.kv_heads * s.head_dim; ++i) {
      if (token % 97 == 5 && i % s.head_dim < 8) k[size_t{1} * token * s.kv_heads * s.head_dim + i] += 1.5f;
    }
    for (int i = 0; i < s.q_heads * s.head_dim; ++i) {
      if (i % s.head_dim < 8) q[size_t{1} * token * s.q_heads * s.head_dim + i] += 1.0f;
    }
  }
  return {s, ToFloat(ToBf16(q)), ToFloat(ToBf16(k)), v};
}

int64_t Steps(const VerticalSlashRows& rows) {
  int64_t steps = (static_cast<int64_t>(rows.columns.size()) + 63) / 64;
  for (const reference::KeyRange& range : rows.ranges) steps += (range.end - range.begin) / 64;
  return steps;
}

// Of the sums' numbers those under `forced` and then of the largest: the reference's rule on floats.
template <typename T>
std::vector<int64_t> Choice(const T* sums, int64_t tokens, int64_t forced, int64_t count) {
  std::vector<int64_t> order(tokens);
  std::iota(order.begin(), order.end(), 0);
  const auto rank = [&](int64_t i) {
    return i < forced || std::isnan(sums[i]) ? std::numeric_limits<T>::infinity() : sums[i];
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return rank(x) > rank(y); });
  order.resize(std::min(count, tokens));
  std::sort(order.begin(), order.end());
  return order;
}

// `got` may differ from the choice by sums where a sum is near the least chosen one.
void ExpectChoice(const std::vector<int64_t>& got, const std::vector<double>& sums, int64_t forced,
                  int64_t count) {
  const auto tokens = static_cast<int64_t>(sums.size());
  const std::vector<int64_t> wanted = Choice(sums.data(), tokens, forced, count);
  ASSERT_EQ(got.size(), wanted.size());
  double least = std::numeric_limits<double>::infinity();
  for (const int64_t i : wanted) {
    if (i >= forced) least = std::min(least, sums[i]);
  }
  std::vector<int64_t> differ;
  std::set_symmetric_difference(got.begin(), got.end(), wanted.begin(), wanted.end(),
                                std::back_inserter(differ));
  for (const int64_t i : differ) {
    ASSERT_GE(i, forced);
    ASSERT_NEAR(sums[i], least, kNear * least) << "number " << i;
  }
}

class VerticalSlashGpuTest : public ::testing::TestWithParam<std::tuple<Shape, VerticalSlashParameters>> {};

TEST_P(VerticalSlashGpuTest, StagesAndAttentionMatchReference) {
  HW_REQUIRE_SM90();
  const auto& [shape, parameters] = GetParam();
  const RangeProblem problem = Structured(shape, 3);
  reference::VerticalSlashTrace trace;
  BlockIndex index;
  ASSERT_TRUE(reference::SelectVerticalSlash(problem.Reference(), parameters, &trace, &index).ok());
  const Stages stages(parameters, shape.q_heads, shape.tokens, 1 << 20);

  ASSERT_TRUE(stages.Profile(problem).ok());
  ASSERT_TRUE(stages.Choose().ok());
  ASSERT_TRUE(stages.Merge().ok());

  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(stages.Intact());
  EXPECT_EQ(stages.overflows.Host()[0], 0u);
  const std::vector<float> vertical = stages.vertical.Host(), slash = stages.slash.Host();
  const std::vector<VerticalSlashRows> lists = HostLists(stages);
  uint64_t steps = 0;
  for (int head = 0; head < shape.q_heads; ++head) {
    reference::VerticalSlashHead& wanted = trace.heads[head];
    for (int i = 0; i < shape.tokens; ++i) {
      const size_t at = size_t{1} * head * shape.tokens + i;
      ASSERT_NEAR(vertical[at], wanted.vertical[i], kNear * wanted.vertical[i]) << "column " << i;
      const size_t back = size_t{1} * (head + 1) * shape.tokens - 1 - i;
      ASSERT_NEAR(slash[back], wanted.slash[i], kNear * wanted.slash[i]) << "distance " << i;
    }
    std::vector<int64_t> columns = stages.Columns(head), distances = stages.Distances(head);
    ExpectChoice(columns, wanted.vertical, parameters.forced_verticals, parameters.budgets[0].n_vertical);
    ExpectChoice(distances, wanted.slash, parameters.forced_locals, parameters.budgets[0].n_slash);
    std::reverse(distances.begin(), distances.end());
    wanted.rows.clear();
    for (int tile = 0; tile < shape.Tiles(); ++tile) {
      wanted.rows.push_back(reference::MergeVerticalSlash(columns, distances, int64_t{64} * tile));
      const VerticalSlashRows& got = lists[size_t{1} * head * shape.Tiles() + tile];
      ASSERT_EQ(got.ranges, wanted.rows.back().ranges) << "head " << head << ", tile " << tile;
      ASSERT_EQ(got.columns, wanted.rows.back().columns) << "head " << head << ", tile " << tile;
      steps += static_cast<uint64_t>(Steps(got));
    }
  }
  EXPECT_EQ(stages.visited.Host()[0], steps);

  // The policy does the same.
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE(MakeCudaVerticalSlash(parameters, shape.Policy(), &policy).ok());
  DeviceArray<char> memory(policy->MemoryBytes(shape.tokens));
  CudaSelection selection;
  std::vector<uint16_t> first;
  for (int run = 0; run < 2; ++run) {
    ASSERT_EQ(cudaMemset(memory.data(), 0xFF, memory.size()), cudaSuccess);
    ASSERT_TRUE(policy->Begin(shape.tokens, memory.data(), memory.size(), nullptr).ok());
    const Status status = policy->Select(problem.Layer(), nullptr, &selection);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_NE(selection.ranges, nullptr);
    problem.ExpectAttention(*selection.ranges, [&](int head, int row) {
      return reference::VerticalSlashKeys(trace.heads[head], row);
    });
    if (run == 0) first = problem.out.Host();
    EXPECT_TRUE(SameBits(first, problem.out.Host()));
    uint64_t visited = 0;
    ASSERT_EQ(cudaMemcpy(&visited, selection.visited, 8, cudaMemcpyDefault), cudaSuccess);
    EXPECT_EQ(visited, steps);
    EXPECT_LE(visited, selection.possible + size_t{1} * shape.q_heads * shape.Tiles());
    EXPECT_TRUE(memory.Intact());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, VerticalSlashGpuTest,
    ::testing::Combine(::testing::Values(Shape{"one_token", 4, 2, 128, 1}, Shape{"t63", 2, 2, 64, 63},
                                         Shape{"t64", 3, 1, 128, 64}, Shape{"t65", 8, 1, 64, 65},
                                         Shape{"t127", 4, 1, 128, 127}, Shape{"t128", 3, 1, 64, 128},
                                         Shape{"t129", 8, 1, 128, 129}, Shape{"gqa3", 6, 2, 128, 777},
                                         Shape{"mha_d64", 2, 2, 64, 2000}, Shape{"gqa4", 4, 1, 128, 3001}),
                       ::testing::Values(Budget(1000, 6096), Budget(20, 12, 1, 1), Budget(50, 30, 30, 3, 128),
                                         Budget(1, 1, 0, 1, 1), Budget(70, 100, 0, 10, 33))),
    [](const auto& test) {
      const auto& parameters = std::get<1>(test.param);
      return std::string(std::get<0>(test.param).name) + "_" +
             std::to_string(parameters.budgets[0].n_vertical) + "_" +
             std::to_string(parameters.budgets[0].n_slash) + "_" + std::to_string(parameters.last_q);
    });

uint32_t Draw(std::mt19937* random, uint32_t below) { return static_cast<uint32_t>((*random)()) % below; }

// Sums with what makes choosing hard: ties, zeros, tiny numbers, NaN.
std::vector<float> HardSums(int count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> sums(count);
  const uint32_t kind = Draw(&random, 4);
  for (float& sum : sums) {
    const uint32_t x = Draw(&random, ~0u);
    if (kind == 0) sum = std::ldexp(static_cast<float>(x % 5), -static_cast<int>(x / 5 % 30));
    if (kind == 1) sum = std::ldexp(1.0f, -140) * static_cast<float>(x % 100);
    if (kind == 2) sum = 0.25f;
    if (kind == 3) sum = x % 50 == 0 ? std::nanf("") : static_cast<float>(x) * 1e-9f;
  }
  return sums;
}

TEST(VerticalSlashGpuTest, ChoosesExactlyAndMergesExactly) {
  HW_REQUIRE_SM90();
  std::mt19937 random(5);
  for (const int tokens : {1, 31, 32, 33, 64, 1000, 1023, 1024, 1025, 5000, 40007}) {
    constexpr int kHeads = 5;
    VerticalSlashParameters parameters = Budget(1, 1, Draw(&random, 40), 1 + Draw(&random, 40));
    parameters.budgets.clear();
    for (int head = 0; head < kHeads; ++head) {
      parameters.budgets.push_back({1 + Draw(&random, 2000), 1 + Draw(&random, head == 0 ? 7000 : 300)});
    }
    const Stages stages(parameters, kHeads, tokens, 1 << 22);
    std::vector<float> vertical, slash, by_entry;  // slash by distance, and as the profile has it
    for (int head = 0; head < kHeads; ++head) {
      const std::vector<float> v = HardSums(tokens, Draw(&random, ~0u)),
                               s = HardSums(tokens, Draw(&random, ~0u));
      vertical.insert(vertical.end(), v.begin(), v.end());
      slash.insert(slash.end(), s.begin(), s.end());
      by_entry.insert(by_entry.end(), s.rbegin(), s.rend());
    }
    ASSERT_EQ(cudaMemcpy(stages.vertical.data(), vertical.data(), stages.vertical.Bytes(), cudaMemcpyDefault),
              cudaSuccess);
    ASSERT_EQ(cudaMemcpy(stages.slash.data(), by_entry.data(), stages.slash.Bytes(), cudaMemcpyDefault),
              cudaSuccess);

    ASSERT_TRUE(stages.Choose().ok());
    ASSERT_TRUE(stages.Merge().ok());

    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_TRUE(stages.Intact());
    ASSERT_EQ(stages.overflows.Host()[0], 0u);
    const std::vector<VerticalSlashRows> lists = HostLists(stages);
    for (int head = 0; head < kHeads; ++head) {
      const reference::VerticalSlashBudget& budget = parameters.budgets[head];
      const std::vector<int64_t> columns = stages.Columns(head);
      std::vector<int64_t> distances = stages.Distances(head);
      ASSERT_EQ(columns, Choice(&vertical[size_t{1} * head * tokens], tokens, parameters.forced_verticals,
                                budget.n_vertical))
          << tokens << " tokens, head " << head;
      ASSERT_EQ(distances,
                Choice(&slash[size_t{1} * head * tokens], tokens, parameters.forced_locals, budget.n_slash))
          << tokens << " tokens, head " << head;
      std::reverse(distances.begin(), distances.end());
      const int step = tokens > 10000 ? 37 : 1;
      for (int tile = 0; tile < stages.tiles; tile += step) {
        const VerticalSlashRows wanted =
            reference::MergeVerticalSlash(columns, distances, int64_t{64} * tile);
        const VerticalSlashRows& got = lists[size_t{1} * head * stages.tiles + tile];
        ASSERT_EQ(got.ranges, wanted.ranges) << tokens << " tokens, head " << head << ", tile " << tile;
        ASSERT_EQ(got.columns, wanted.columns) << tokens << " tokens, head " << head << ", tile " << tile;
      }
    }
  }
}

TEST(VerticalSlashGpuTest, TilesWithoutRoomGoDenseAndAreCounted) {
  HW_REQUIRE_SM90();
  const RangeProblem problem = Structured({"", 2, 1, 64, 2000}, 3);
  const Stages stages(Budget(70, 12, 0, 1), 2, 2000, 300);

  ASSERT_TRUE(stages.Profile(problem).ok());
  ASSERT_TRUE(stages.Choose().ok());
  ASSERT_TRUE(stages.Merge().ok());

  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::vector<int32_t> counts = stages.range_counts.Host(), columns = stages.column_counts.Host();
  const auto dense = static_cast<uint32_t>(std::count(counts.begin(), counts.end(), -1));
  EXPECT_GT(dense, 0u);
  EXPECT_LT(dense, counts.size());
  EXPECT_EQ(stages.overflows.Host()[0], dense);
  const std::vector<VerticalSlashRows> lists = HostLists(stages);
  std::vector<std::vector<VerticalSlashRows>> wanted(2);
  int64_t steps = 0;
  for (int head = 0; head < 2; ++head) {
    std::vector<int64_t> distances = stages.Distances(head);
    std::reverse(distances.begin(), distances.end());
    for (int tile = 0; tile < stages.tiles; ++tile) {
      const size_t i = size_t{1} * head * stages.tiles + tile;
      wanted[head].push_back(
          reference::MergeVerticalSlash(stages.Columns(head), distances, int64_t{64} * tile));
      if (counts[i] < 0) {
        EXPECT_EQ(columns[i], 0);
        wanted[head].back() = {{{0, int64_t{64} * tile + 64}}, {}};
      } else {
        EXPECT_EQ(lists[i].ranges, wanted[head].back().ranges);
        EXPECT_EQ(lists[i].columns, wanted[head].back().columns);
      }
      steps += Steps(wanted[head].back());
    }
  }
  EXPECT_EQ(stages.visited.Host()[0], static_cast<uint64_t>(steps));
  CudaKeyRanges ranges = {2,
                          stages.range_counts.data(),
                          stages.range_offsets.data(),
                          stages.ranges.data(),
                          stages.column_counts.data(),
                          stages.column_offsets.data(),
                          stages.key_columns.data()};
  problem.ExpectAttention(ranges, [&](int head, int row) {
    reference::VerticalSlashHead rows;
    rows.rows = wanted[head];
    return reference::VerticalSlashKeys(rows, row);
  });
}

// Nothing hangs and no list leaves its bounds.
TEST(VerticalSlashGpuTest, WhatIsNotFiniteStillGivesLists) {
  HW_REQUIRE_SM90();
  const Shape shape = {"", 4, 2, 128, 1000};
  RangeProblem clean(shape, 3);
  std::vector<float> q = clean.q, k = clean.k;
  q[size_t{990} * 4 * 128] = std::nanf("");
  k[size_t{500} * 2 * 128 + 130] = std::numeric_limits<float>::infinity();
  const RangeProblem problem(shape, q, k, clean.v);
  const VerticalSlashParameters parameters = Budget(70, 100, 0, 10);
  const Stages stages(parameters, 4, 1000, 1 << 16);

  ASSERT_TRUE(stages.Profile(problem).ok());
  ASSERT_TRUE(stages.Choose().ok());
  ASSERT_TRUE(stages.Merge().ok());

  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(stages.Intact());
  for (int head = 0; head < 4; ++head) {
    EXPECT_EQ(stages.Columns(head).size(), 70u);
    EXPECT_EQ(stages.Distances(head).size(), 100u);
  }
}

}  // namespace
}  // namespace headwater::kernels
