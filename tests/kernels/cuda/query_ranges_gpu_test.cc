// Policy headwater, and what is measured of its lists, for ranges of a prompt's queries: the same as for the
// whole prompt.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/block_mass.h"
#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/policies/headwater.h"
#include "kernels/cuda/policy.h"
#include "tests/kernels/cuda/attention_problem.h"

namespace headwater::kernels {
namespace {

constexpr int32_t kRows = 40;

struct RangeCase {
  const char* name;
  int tokens, q_heads, kv_heads, head_dim;
  std::vector<CudaQueryRange> ranges;  // together the whole prompt
};

std::ostream& operator<<(std::ostream& out, const RangeCase& c) { return out << c.name; }

// Lists of a tile, and what was measured, of some ranges of a prompt.
struct Found {
  std::vector<std::vector<int32_t>> lists;  // by head and tile of the whole prompt; {-1}: dense
  std::vector<uint16_t> out;
  std::vector<uint64_t> visited;
  std::vector<uint32_t> dense_tiles;
  std::vector<float> mass, recall, curve, thresholds;
};

class QueryRangesGpuTest : public testing::TestWithParam<RangeCase> {
 protected:
  void SetUp() override { HW_REQUIRE_SM90(); }

  static void Expect(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

  template <typename T>
  static std::vector<T> Fetch(const T* from, size_t count) {
    std::vector<T> to(count);
    EXPECT_EQ(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return to;
  }

  // ranges: empty: the whole prompt, by Begin().
  Found Run(const std::vector<CudaQueryRange>& ranges);

  const std::vector<float> values_ =
      RandomBf16(static_cast<size_t>(GetParam().tokens) *
                     static_cast<size_t>(GetParam().q_heads + 2 * GetParam().kv_heads) *
                     static_cast<size_t>(GetParam().head_dim),
                 7);
};

Found QueryRangesGpuTest::Run(const std::vector<CudaQueryRange>& ranges) {
  const RangeCase& c = GetParam();
  const bool whole = ranges.empty();
  const std::vector<CudaQueryRange> run = whole ? std::vector<CudaQueryRange>{{0, c.tokens}} : ranges;
  const int64_t q_row = int64_t{c.q_heads} * c.head_dim, kv_row = int64_t{c.kv_heads} * c.head_dim;
  const auto part = [&](int64_t first, int64_t count) {
    return ToBf16({values_.begin() + first, values_.begin() + first + count});
  };
  const DeviceArray<uint16_t> q(part(0, c.tokens * q_row)), k(part(c.tokens * q_row, c.tokens * kv_row)),
      v(part(c.tokens * (q_row + kv_row), c.tokens * kv_row)), out(q.size());
  const CudaPolicyShape shape{2, c.q_heads, c.kv_heads, c.head_dim, 0.2f};
  HeadwaterParameters parameters;
  parameters.threshold = 0.6;
  parameters.window_blocks = 2;
  parameters.dense_last_tokens = 200;
  parameters.dense_below_tokens = 0;
  std::unique_ptr<CudaPolicy> policy;
  Expect(MakeCudaHeadwater(parameters, shape, &policy));
  const size_t bytes = whole ? policy->MemoryBytes(c.tokens) : policy->RangesMemoryBytes(c.tokens, run);
  const DeviceArray<uint8_t> memory(bytes), workspace(CudaPolicyAttentionWorkspaceBytes(shape, c.tokens));
  Expect(whole ? policy->Begin(c.tokens, memory.data(), bytes, nullptr)
               : policy->BeginRanges(c.tokens, run, memory.data(), bytes, nullptr));
  if (!whole) {
    Expect(CudaBlockStatistics({k.data(), v.data(), c.tokens, c.kv_heads, c.head_dim, 0, policy->stats()},
                               nullptr));
  }

  std::vector<int64_t> positions;
  for (int64_t i = 0; i < kRows; ++i) positions.push_back(i * (c.tokens - 1) / (kRows - 1));
  const DeviceArray<int64_t> rows(positions);
  const auto blocks = static_cast<size_t>(CudaStatsBlocks(c.tokens)), heads = static_cast<size_t>(c.q_heads);
  const auto kv_heads = static_cast<size_t>(c.kv_heads), steps = static_cast<size_t>(kRecallSteps + 1);
  const DeviceArray<float> mass(kRows * heads * blocks), recall(kRows * heads),
      curve(kRows * kv_heads * steps), thresholds(kv_heads);
  const DeviceArray<uint64_t> visited(heads);
  const DeviceArray<uint32_t> dense_tiles(heads), overflows(1);
  const int32_t tile_positions = 128 / (c.q_heads / c.kv_heads);
  const int64_t tiles = (c.tokens + tile_positions - 1) / tile_positions;
  Found found;
  found.lists.resize(kv_heads * static_cast<size_t>(tiles));
  std::vector<CudaSelection> selections(run.size());
  const auto layer_of = [&](size_t i) {
    return CudaPolicyLayer{1, q.data() + run[i].first * q_row, k.data(), v.data(), static_cast<int32_t>(i)};
  };
  for (size_t i = 0; i < run.size(); ++i) Expect(policy->Select(layer_of(i), nullptr, &selections[i]));
  CudaRecallGoal goal;
  goal.min_recall = 0.7f;
  for (size_t i = 0; i < run.size(); ++i) {
    const CudaSelection& selection = selections[i];
    CudaCountListsArgs count{selection.lists, c.tokens,           c.q_heads,
                             visited.data(),  dense_tiles.data(), selection.queries};
    count.accumulate = i > 0;
    count.overflows = selection.overflows;
    count.overflow_sum = overflows.data();
    Expect(CudaCountLists(count, nullptr));
    const auto low = std::lower_bound(positions.begin(), positions.end(), run[i].first) - positions.begin();
    const auto high =
        std::lower_bound(positions.begin(), positions.end(), run[i].first + run[i].count) - positions.begin();
    if (low < high) {
      CudaRowMassArgs sampled;
      sampled.problem = {layer_of(i).q, k.data(),   c.tokens, c.q_heads,
                         c.kv_heads,    c.head_dim, 0.2f,     run[i].first};
      sampled.rows = {rows.data() + low, nullptr, static_cast<int32_t>(high - low)};
      sampled.mass = mass.data() + static_cast<size_t>(low) * heads * blocks;
      Expect(CudaRowMass(sampled, nullptr));
      CudaRecallArgs held;
      held.mass = sampled.mass;
      held.rows = sampled.rows;
      held.num_tokens = c.tokens;
      held.num_q_heads = c.q_heads;
      held.lists = selection.lists;
      held.recall = recall.data() + static_cast<size_t>(low) * heads;
      held.queries = selection.queries;
      Expect(CudaRecallOfRows(held, nullptr));
      goal.rows = sampled.rows;
      goal.mass = sampled.mass;
      goal.curve = curve.data() + static_cast<size_t>(low) * kv_heads * steps;
      Expect(policy->ThresholdsForRecall(layer_of(i), goal, nullptr));
    }
    Expect(CudaAttentionOver(selection, policy.get(), shape, c.tokens, layer_of(i),
                             {out.data() + run[i].first * q_row, nullptr}, workspace.data(),
                             workspace.Bytes(), nullptr));
    const int64_t first = run[i].first / tile_positions,
                  own = (run[i].count + tile_positions - 1) / tile_positions;
    const auto counts = Fetch(selection.lists.counts, kv_heads * static_cast<size_t>(own));
    const auto offsets = Fetch(selection.lists.offsets, counts.size());
    for (size_t segment = 0; segment < counts.size(); ++segment) {
      const size_t head = segment / static_cast<size_t>(own), tile = segment % static_cast<size_t>(own);
      auto& list = found.lists[head * static_cast<size_t>(tiles) + static_cast<size_t>(first) + tile];
      list = counts[segment] < 0
                 ? std::vector<int32_t>{-1}
                 : Fetch(selection.lists.blocks + offsets[segment], static_cast<size_t>(counts[segment]));
    }
  }
  goal.rows = {rows.data(), nullptr, kRows};
  goal.curve = curve.data();
  goal.thresholds = thresholds.data();
  Expect(CudaThresholdsOfCurves(goal, c.kv_heads, nullptr));
  found.out = out.Host();
  found.visited = Fetch(visited.data(), kv_heads);
  found.dense_tiles = Fetch(dense_tiles.data(), kv_heads);
  found.mass = mass.Host();
  found.recall = recall.Host();
  found.curve = curve.Host();
  found.thresholds = thresholds.Host();
  EXPECT_EQ(overflows.Host()[0], 0u);
  EXPECT_TRUE(memory.Intact() && out.Intact() && mass.Intact() && recall.Intact() && curve.Intact());
  return found;
}

TEST_P(QueryRangesGpuTest, TogetherAreTheWholePrompt) {
  const Found wanted = Run({}), got = Run(GetParam().ranges);
  EXPECT_EQ(got.lists, wanted.lists);
  EXPECT_EQ(got.out, wanted.out);
  EXPECT_EQ(got.visited, wanted.visited);
  EXPECT_EQ(got.dense_tiles, wanted.dense_tiles);
  EXPECT_EQ(got.mass, wanted.mass);
  EXPECT_EQ(got.recall, wanted.recall);
  EXPECT_EQ(got.curve, wanted.curve);
  EXPECT_EQ(got.thresholds, wanted.thresholds);
  size_t dense = 0, empty = 0;
  for (const auto& list : wanted.lists) {
    dense += list == std::vector<int32_t>{-1} ? 1u : 0u;
    empty += list.empty() ? 1u : 0u;
  }
  EXPECT_GT(dense, 0u);
  EXPECT_EQ(empty, 0u);
  if (GetParam().tokens > 2000) {
    EXPECT_LT(dense, wanted.lists.size() / 2) << "nothing was searched";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, QueryRangesGpuTest,
    testing::Values(RangeCase{"one_token", 1, 4, 2, 64, {{0, 1}}},
                    RangeCase{"last_alone", 1281, 4, 2, 64, {{0, 1280}, {1280, 1}}},
                    RangeCase{"halves", 4000, 8, 2, 128, {{0, 2048}, {2048, 1952}}},
                    RangeCase{"gqa8", 3000, 8, 1, 128, {{0, 128}, {128, 1024}, {1152, 1848}}},
                    RangeCase{"mha", 2500, 2, 2, 64, {{0, 1280}, {1280, 1220}}},
                    // The last 200 tokens, which are dense, lie in three ranges.
                    RangeCase{"dense_over_ranges", 3003, 4, 2, 128, {{0, 2816}, {2816, 128}, {2944, 59}}}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace headwater::kernels
