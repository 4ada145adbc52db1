// What SharePrefill's policy refuses, and that its cases decide what they say: runs without a GPU.
#include "kernels/cuda/policies/share.h"

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"
#include "tests/kernels/cuda/share_cases.h"

namespace headwater::kernels {
namespace {

constexpr auto kBad = StatusCode::kInvalidArgument;
constexpr auto kUnknown = StatusCode::kUnimplemented;
constexpr CudaPolicyShape kShape = {2, 8, 2, 128, 0.1f};

ShareWithClusters TwoLayers() {
  ShareWithClusters p;
  p.clusters = {{{{0, 1}, 7}, {{1, 3}, 7}, {{1, 4}, 8}}, {7}};
  return p;
}

std::function<Status()> Made(const std::function<void(ShareWithClusters*, CudaPolicyShape*)>& change) {
  return [change] {
    ShareWithClusters parameters = TwoLayers();
    CudaPolicyShape shape = kShape;
    change(&parameters, &shape);
    std::unique_ptr<CudaPolicy> policy;
    return MakeCudaShare(parameters, shape, &policy);
  };
}

INSTANTIATE_TEST_SUITE_P(
    Share, RefusalTest,
    ::testing::Values(
        Refusal{"gamma", Made([](auto* p, auto*) { p->share.gamma = 0; }), kBad, "gamma is 0"},
        Refusal{"similarity", Made([](auto* p, auto*) { p->share.similarity = 1.5; }), kBad,
                "similarity is 1.5"},
        Refusal{"fallback", Made([](auto* p, auto*) { p->share.fallback = -1; }), kBad, "fallback is -1"},
        Refusal{"query_aware", Made([](auto* p, auto*) { p->share.query_aware = NAN; }), kBad,
                "query_aware is nan"},
        Refusal{"min", Made([](auto* p, auto*) { p->share.min_budget_tokens = 0; }), kBad,
                "min_budget_tokens is 0"},
        Refusal{"max", Made([](auto* p, auto*) { p->share.max_budget_tokens = -1; }), kBad,
                "max_budget_tokens is -1"},
        Refusal{"pivots", Made([](auto* p, auto*) { p->share.pivots_per_layer = 65537; }), kBad,
                "pivots_per_layer is 65537; 0 to 65536"},
        Refusal{"block", Made([](auto* p, auto*) { p->share.block_tokens = 64; }), kUnknown,
                "block_tokens is 64"},
        Refusal{"ratio", Made([](auto* p, auto*) { p->share.compat_ratio = true; }), kUnknown,
                "compat_ratio"},
        Refusal{"head", Made([](auto* p, auto*) {
                  p->clusters.cluster_of[{1, 8}] = 3;
                }),
                kBad, "cluster 3 has head 8 of layer 1; there are 8 heads in 2 layers"},
        Refusal{"layer", Made([](auto* p, auto*) {
                  p->clusters.cluster_of[{2, 0}] = 3;
                }),
                kBad, "head 0 of layer 2"},
        Refusal{"dim", Made([](auto*, auto* s) { s->head_dim = 96; }), kUnknown, "96"},
        Refusal{"layers", Made([](auto*, auto* s) { s->num_layers = 0; }), kBad, "num_layers is 0"},
        Refusal{"scale", Made([](auto*, auto* s) { s->softmax_scale = 0; }), kBad, "softmax_scale is 0"},
        Refusal{"heads", Made([](auto*, auto* s) { s->num_q_heads = s->num_kv_heads = 513; }), kUnknown,
                "513 query heads; at most 512"}),
    [](const auto& test) { return test.param.name; });

TEST(SharePolicyTest, RefusesWrongMemoryAndOrder) {
  SharePolicy policy(TwoLayers(), kShape);
  CudaSelection selection;
  const CudaPolicyLayer layer = {0, kAligned, kAligned, kAligned};
  const size_t bytes = policy.MemoryBytes(1000);

  EXPECT_EQ(policy.Select(layer, nullptr, &selection).code(), kBad);
  EXPECT_EQ(policy.Finish(layer, static_cast<float*>(kAligned), nullptr).code(), kBad);
  EXPECT_EQ(policy.Begin(0, kAligned, bytes, nullptr).code(), kBad);
  EXPECT_EQ(policy.Begin(1000, kMisaligned, bytes, nullptr).code(), kBad);
  EXPECT_EQ(policy.Begin(1000, kAligned, bytes - 1, nullptr).code(), kBad);
  EXPECT_EQ(policy.Begin(SharePolicy::kMostTokens + 1, kAligned, bytes, nullptr).code(), kUnknown);
  EXPECT_EQ(policy.MemoryBytes(SharePolicy::kMostTokens + 1), 0u);
}

TEST(SharePolicyTest, SlotsAreOfClustersThatShareAndPatternsOfThoseThatAreAskedFor) {
  ShareWithClusters p;
  p.clusters = {{{{0, 1}, 7}, {{0, 2}, 5}, {{1, 0}, 9}, {{1, 3}, 7}, {{1, 4}, 8}, {{3, 0}, 7}, {{3, 1}, 9}},
                {7, 8, 9}};

  const SharePolicy policy(p, {5, 8, 2, 128, 0.1f});

  const ShareSlots& slots = policy.slots();
  const std::vector<int32_t> none;
  EXPECT_EQ(slots.count, 3);
  EXPECT_EQ(slots.of_head[0], (std::vector<int32_t>{-1, 0, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(slots.of_head[1], (std::vector<int32_t>{1, -1, -1, 0, 2, -1, -1, -1}));
  EXPECT_EQ(slots.of_head[2], none);
  EXPECT_EQ(slots.of_head[3], (std::vector<int32_t>{0, 1, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(slots.wanted, (std::vector<std::vector<int32_t>>{{0}, {0, 1}, none, none, none}));
}

TEST(SharePolicyTest, WantsLseWhereAPatternMayBeMade) {
  ShareWithClusters p = TwoLayers();
  EXPECT_TRUE(SharePolicy(p, kShape).wants_lse());
  p.share.pivots_per_layer = 2;
  EXPECT_FALSE(SharePolicy(p, kShape).wants_lse());
  EXPECT_FALSE(SharePolicy(ShareWithClusters(), kShape).wants_lse());
}

// A pattern of 131,072 tokens is 128 KiB.
TEST(SharePolicyTest, MemoryOfSlots) {
  ShareWithClusters p = TwoLayers();
  const size_t one = SharePolicy(p, kShape).MemoryBytes(131072);
  p.clusters.shareable = {7, 8};

  const size_t two = SharePolicy(p, kShape).MemoryBytes(131072);

  EXPECT_EQ(two - one, (size_t{128} << 10) + size_t{2} * 1024 * sizeof(float));
}

class ShareCaseTest : public ::testing::TestWithParam<ShareCase> {};

TEST_P(ShareCaseTest, HasItsRoles) {
  const ShareCase& c = GetParam();
  const ShareWithClusters parameters = c.Parameters();
  const std::vector<ShareInput> inputs = c.Inputs();
  reference::ShareState state;
  for (size_t layer = 0; layer < inputs.size(); ++layer) {
    reference::ShareLayer selected;
    const Status status =
        reference::ShareSelect(inputs[layer].Problem(), parameters.share, parameters.clusters,
                               static_cast<int32_t>(layer), &state, &selected);
    ASSERT_TRUE(status.ok()) << status.message();
    std::string roles, why;
    for (const reference::ShareHead& head : selected.heads) {
      roles += RoleName(static_cast<int>(head.role));
      why += head.why + " (" + std::to_string(head.vertical_distance) + ", " +
             std::to_string(head.slash_distance) + ", " + std::to_string(head.ratio) + ", " +
             std::to_string(head.flex.js_distance) + ")\n";
    }
    EXPECT_EQ(roles, c.roles[layer]) << "layer " << layer << "\n" << why;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, ShareCaseTest, ::testing::ValuesIn(ShareCases()),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace headwater::kernels
