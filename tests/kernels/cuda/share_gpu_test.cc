// SharePrefill's policy on the GPU against the reference, layer by layer, with its attention.
#include "kernels/cuda/policies/share.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/flex_bounds.h"
#include "tests/kernels/cuda/near.h"
#include "tests/kernels/cuda/share_cases.h"
#include "tests/kernels/cuda/top_share.h"

namespace headwater::kernels {
namespace {

using reference::ShareRole;

constexpr double kDistanceError = 2e-4, kRatioError = 1e-4;
constexpr double kNearShare = 1e-4;  // of a row's attention

// What one layer left on the device.
struct GotLayer {
  std::vector<sm90::ShareHead> heads;
  std::vector<uint32_t> masks, patterns;  // patterns after Finish()
  std::vector<double> ratios;
  std::vector<int32_t> layers, fresh;
  std::vector<int32_t> counts;  // of the lists
};

bool SameHeads(const GotLayer& a, const GotLayer& b) {
  bool same = a.heads.size() == b.heads.size();
  for (size_t i = 0; same && i < a.heads.size(); ++i) {
    same = a.heads[i].role == b.heads[i].role && a.heads[i].slot == b.heads[i].slot &&
           std::memcmp(&a.heads[i].vertical_distance, &b.heads[i].vertical_distance, sizeof(double)) == 0 &&
           std::memcmp(&a.heads[i].slash_distance, &b.heads[i].slash_distance, sizeof(double)) == 0;
  }
  return same;
}

template <typename T>
std::vector<T> HostOf(const T* data, size_t count) {
  std::vector<T> host(count);
  EXPECT_EQ(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
  return host;
}

// A prompt in device memory that is not the policy's.
struct Prompt {
  Prompt(const ShareCase& share_case, uint32_t seed)
      : c(share_case),
        inputs(c.Inputs(seed)),
        v(ToBf16(RandomBf16(inputs[0].k.size(), 77))),
        out(inputs[0].q.size()),
        lse(size_t{1} * c.shape.tokens * c.shape.q_heads),
        workspace(CudaPolicyAttentionWorkspaceBytes(c.Policy(), c.shape.tokens)) {}

  // All layers; `memory` is the policy's.
  std::vector<GotLayer> Run(SharePolicy* policy, const DeviceArray<unsigned char>& memory) const {
    std::vector<GotLayer> got;
    Status status = policy->Begin(c.shape.tokens, memory.data(), memory.size(), nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
    for (size_t layer = 0; layer < inputs.size(); ++layer) {
      const DeviceArray<uint16_t> q(ToBf16(inputs[layer].q)), k(ToBf16(inputs[layer].k));
      CudaSelection selection;
      status = CudaPolicyAttention(
          policy, c.Policy(), c.shape.tokens, {static_cast<int32_t>(layer), q.data(), k.data(), v.data()},
          {out.data(), lse.data()}, workspace.data(), workspace.size(), nullptr, &selection);
      EXPECT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      const SharePolicy::Stages s = policy->stages();
      const auto slots = static_cast<size_t>(s.pivots.count);
      got.push_back(
          {HostOf(s.heads, static_cast<size_t>(c.shape.q_heads)), HostOf(s.masks.words, s.masks.bytes() / 4),
           HostOf(s.pivots.patterns.words, s.pivots.patterns.bytes() / 4), HostOf(s.pivots.ratios, slots),
           HostOf(s.pivots.layers, slots), HostOf(s.pivots.fresh, slots),
           HostOf(selection.lists.counts, static_cast<size_t>(s.masks.num_lists * s.masks.tiles()))});
    }
    EXPECT_TRUE(memory.Intact() && out.Intact() && lse.Intact() && workspace.Intact());
    return got;
  }

  const ShareCase& c;
  std::vector<ShareInput> inputs;
  DeviceArray<uint16_t> v, out;
  DeviceArray<float> lse;
  DeviceArray<char> workspace;
};

void ExpectSame(const std::vector<GotLayer>& a, const std::vector<GotLayer>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t layer = 0; layer < a.size(); ++layer) {
    EXPECT_TRUE(SameHeads(a[layer], b[layer])) << "layer " << layer;
    EXPECT_EQ(a[layer].masks, b[layer].masks) << "layer " << layer;
    EXPECT_EQ(a[layer].layers, b[layer].layers) << "layer " << layer;
    EXPECT_EQ(a[layer].counts, b[layer].counts) << "layer " << layer;
  }
}

bool NearGate(double value, double limit) { return std::fabs(value - limit) <= kNearGate; }

void ExpectDistance(double got, double want) {
  if (std::isnan(want)) {
    EXPECT_TRUE(std::isnan(got)) << got;
  } else {
    EXPECT_NEAR(got, want, kDistanceError);
  }
}

class ShareGpuTest : public ::testing::TestWithParam<ShareCase> {
 protected:
  void ExpectHead(const reference::ShareHead& want, const sm90::ShareHead& got, int slot) const {
    const reference::ShareParameters& p = GetParam().parameters;
    ASSERT_EQ(RoleName(static_cast<int>(got.role)), RoleName(static_cast<int>(want.role))) << want.why;
    ASSERT_EQ(got.slot, slot) << want.why;
    EXPECT_FALSE(p.query_aware > 0 && NearGate(want.flex.js_distance, p.query_aware)) << "decides nothing";
    if (want.pivot_head < 0) return;
    EXPECT_FALSE(NearGate(want.vertical_distance, p.similarity)) << "the case decides nothing";
    EXPECT_FALSE(NearGate(want.slash_distance, p.similarity)) << "the case decides nothing";
    EXPECT_FALSE(NearGate(want.ratio, p.fallback)) << "the case decides nothing";
    ExpectDistance(got.vertical_distance, want.vertical_distance);
    ExpectDistance(got.slash_distance, want.slash_distance);
  }

  // The slot's pattern and ratio.
  void ExpectPivot(const reference::SharePivot& want, const GotLayer& got, int slot) const {
    EXPECT_NEAR(got.ratios[slot], want.ratio, kRatioError);
    const auto blocks = static_cast<int64_t>(want.column_scores.size()), words = (blocks + 31) / 32;
    for (int64_t row = 0; row < blocks; ++row) {
      const auto begin = want.average.begin() + row * blocks;
      const TopShare top = TopShareOf({begin, begin + row + 1}, GetParam().parameters.gamma,
                                      CudaTopShareRule::kUntilSum, kNearShare);
      for (int64_t block = 0; block < 32 * words; ++block) {
        const bool has = BitOf(got.patterns, (slot * blocks + row) * words, block);
        if (block <= row && top.undecided[block]) continue;
        ASSERT_EQ(has, block <= row && top.kept[block]) << "row " << row << ", block " << block;
      }
    }
  }

  // The head's mask: its own columns and offsets, with the pattern of its slot in `got`.
  void ExpectBlocks(const reference::PolicyProblem& problem, int head, const GotLayer& got) const {
    const reference::FlexParameters flex = GetParam().parameters.Flex();
    const sm90::ShareHead& decided = got.heads[head];
    const bool aware = decided.role == sm90::ShareRole::kQueryAware;
    const bool shared = decided.role == sm90::ShareRole::kShared;
    const FlexScored scored(problem, flex, head);
    FlexRange range = ColumnsAndOffsets(scored, aware || shared);
    if (aware) AddPooled(problem, scored, head, &range);
    const int64_t blocks = range.must.num_blocks(), words = (blocks + 31) / 32;
    int64_t added = 0;
    for (int64_t row = 0; shared && row < blocks; ++row) {
      for (int64_t block = 0; block <= row; ++block) {
        if (!BitOf(got.patterns, (decided.slot * blocks + row) * words, block)) continue;
        added += range.may.Has(row, block) ? 0 : 1;
        range.must.Add(row, block);
        range.may.Add(row, block);
      }
    }
    EXPECT_TRUE(!shared || added > 0) << "the case shares nothing";
    int64_t undecided = 0;
    ExpectMask(&got.masks[head * blocks * words], range, &undecided);
    EXPECT_LE(undecided, blocks * 4) << "the case decides too little";
    for (int64_t tile = 0; tile < blocks; ++tile) {
      int64_t set = 0;
      for (int64_t word = 0; word < words; ++word) {
        set += __builtin_popcount(got.masks[(head * blocks + tile) * words + word]);
      }
      const bool dense = decided.role == sm90::ShareRole::kPivot || set == tile + 1;
      EXPECT_EQ(got.counts[head * blocks + tile], dense ? -1 : set) << "tile " << tile;
    }
  }
};

// The slot that a head is the pivot of or was compared with; -1: none.
int SlotOf(const ShareSlots& slots, const reference::ShareState& state, const reference::ShareHead& head,
           size_t layer, int number) {
  const bool pivot = head.role == ShareRole::kPivot;
  if (!pivot && head.pivot_head < 0) return -1;
  if (!slots.of_head.empty()) return slots.of_head[layer][number];
  return static_cast<int>(
      std::distance(state.pivots.begin(), state.pivots.find(pivot ? number : head.pivot_head)));
}

bool HasPattern(const ShareSlots& slots, size_t layer, int slot) {
  if (slots.of_head.empty()) return true;
  return std::count(slots.wanted[layer].begin(), slots.wanted[layer].end(), slot) > 0;
}

TEST_P(ShareGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const ShareCase& c = GetParam();
  const ShareWithClusters parameters = c.Parameters();
  const Prompt prompt(c, 1), other(c, 2);
  SharePolicy policy(parameters, c.Policy()), fresh(parameters, c.Policy());
  const DeviceArray<unsigned char> memory(policy.MemoryBytes(c.shape.tokens)), more(memory.size());

  const std::vector<GotLayer> got = prompt.Run(&policy, memory);

  reference::ShareState state;
  for (size_t layer = 0; layer < got.size(); ++layer) {
    SCOPED_TRACE("layer " + std::to_string(layer));
    const reference::PolicyProblem problem = prompt.inputs[layer].Problem();
    reference::ShareLayer want;
    const Status status = reference::ShareSelect(problem, parameters.share, parameters.clusters,
                                                 static_cast<int32_t>(layer), &state, &want);
    ASSERT_TRUE(status.ok()) << status.message();
    for (int head = 0; head < c.shape.q_heads; ++head) {
      SCOPED_TRACE("head " + std::to_string(head));
      const reference::ShareHead& wanted = want.heads[head];
      const int slot = SlotOf(policy.slots(), state, wanted, layer, head);
      ASSERT_NO_FATAL_FAILURE(ExpectHead(wanted, got[layer].heads[head], slot));
      if (wanted.role == ShareRole::kPivot) {
        EXPECT_EQ(got[layer].layers[slot], static_cast<int32_t>(layer));
        EXPECT_EQ(got[layer].fresh[slot], head);
        if (HasPattern(policy.slots(), layer, slot)) {
          const int32_t key = policy.slots().of_head.empty() ? head : wanted.cluster;
          ASSERT_NO_FATAL_FAILURE(ExpectPivot(state.pivots.at(key), got[layer], slot));
        }
      }
      ASSERT_NO_FATAL_FAILURE(ExpectBlocks(problem, head, got[layer]));
    }
  }

  // Nothing of a prompt outlives it, and equal prompts give equal bits.
  const std::vector<GotLayer> second = other.Run(&policy, memory);
  ExpectSame(second, other.Run(&fresh, more));
  ExpectSame(got, prompt.Run(&policy, memory));
}

INSTANTIATE_TEST_SUITE_P(Cases, ShareGpuTest, ::testing::ValuesIn(ShareCases()),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(SharePolicyGpuTest, LayersGoUpAndFinishIsAskedFor) {
  HW_REQUIRE_SM90();
  const ShareCase c = ShareCases()[1];
  const Prompt prompt(c, 1);
  const DeviceArray<uint16_t> q(ToBf16(prompt.inputs[0].q)), k(ToBf16(prompt.inputs[0].k));
  SharePolicy policy(c.Parameters(), c.Policy());
  const DeviceArray<unsigned char> memory(policy.MemoryBytes(c.shape.tokens));
  CudaSelection selection;
  const auto layer = [&](int number) { return CudaPolicyLayer{number, q.data(), k.data(), nullptr}; };
  ASSERT_TRUE(policy.Begin(c.shape.tokens, memory.data(), memory.size(), nullptr).ok());
  ASSERT_EQ(cudaMemset(prompt.lse.data(), 0, prompt.lse.Bytes()), cudaSuccess);

  ASSERT_TRUE(policy.Select(layer(1), nullptr, &selection).ok());
  EXPECT_EQ(policy.Select(layer(2), nullptr, &selection).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(policy.Finish(layer(0), prompt.lse.data(), nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(policy.Finish(layer(1), nullptr, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(policy.Finish(layer(1), prompt.lse.data(), nullptr).ok());
  EXPECT_EQ(policy.Select(layer(1), nullptr, &selection).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(policy.Select(layer(2), nullptr, &selection).ok());
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

// What is not finite neither hangs nor leaves its arrays.
TEST(SharePolicyGpuTest, WhatIsNotFiniteStillGivesLists) {
  HW_REQUIRE_SM90();
  for (const ShareCase& c : ShareCases()) {
    if (std::string(c.name) != "gqa3_d64" && std::string(c.name) != "one_pivot_d64") continue;
    Prompt prompt(c, 1);
    prompt.inputs[0].q[size_t{100} * c.shape.q_heads * c.shape.head_dim] = std::nanf("");
    prompt.inputs[0].k[size_t{500} * c.shape.kv_heads * c.shape.head_dim] = INFINITY;
    prompt.inputs[1].k[5] = std::nanf("");
    SharePolicy policy(c.Parameters(), c.Policy());
    const DeviceArray<unsigned char> memory(policy.MemoryBytes(c.shape.tokens));

    EXPECT_EQ(prompt.Run(&policy, memory).size(), 3u);
  }
}

}  // namespace
}  // namespace headwater::kernels
