// What FlexPrefill's policy and stages refuse: runs without a GPU.
#include "kernels/cuda/policies/flex.h"

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

constexpr auto kBad = StatusCode::kInvalidArgument;
constexpr auto kUnknown = StatusCode::kUnimplemented;
constexpr size_t kLarge = size_t{1} << 40;

template <class Args>
Args Sized() {
  Args args;
  args.q = kAligned;
  args.num_tokens = 1000;
  args.num_q_heads = 4;
  args.num_kv_heads = 2;
  args.head_dim = 64;
  args.softmax_scale = 0.125f;
  return args;
}

std::function<Status()> Profile(const std::function<void(CudaTailProfileArgs*)>& change) {
  return [change] {
    auto args = Sized<CudaTailProfileArgs>();
    args.k = kAligned;
    args.rows = 128;
    args.factor = 1;
    args.vertical = args.slash = static_cast<float*>(kAligned);
    change(&args);
    return CudaTailProfile(args, kAligned, kLarge, nullptr);
  };
}

std::function<Status()> Covering(const std::function<void(CudaCoverArgs*)>& change) {
  return [change] {
    CudaCoverArgs args{static_cast<float*>(kAligned), 10, 2, 0.9, 1, static_cast<int64_t*>(kAligned)};
    change(&args);
    return CudaCover(args, kAligned, kLarge, nullptr);
  };
}

std::function<Status()> Budgets(const std::function<void(CudaFlexBudgetsArgs*)>& change) {
  return [change] {
    auto args = Sized<CudaFlexBudgetsArgs>();
    auto* const floats = static_cast<float*>(kAligned);
    args.k_mean = args.column_scores = args.pooled = args.js_distance = floats;
    args.covers = static_cast<int64_t*>(kAligned);
    args.query_aware = static_cast<uint8_t*>(kAligned);
    args.budgets = static_cast<int32_t*>(kAligned);
    args.min_blocks = args.max_blocks = 8;
    change(&args);
    return CudaFlexBudgets(args, nullptr);
  };
}

std::function<Status()> Top(const std::function<void(CudaFlexTopArgs*)>& change) {
  return [change] {
    CudaFlexTopArgs args{static_cast<float*>(kAligned), static_cast<int32_t*>(kAligned), 10, 2,
                         static_cast<uint32_t*>(kAligned)};
    change(&args);
    return CudaFlexTop(args, nullptr);
  };
}

std::function<Status()> Masks(const std::function<void(CudaBlockMasks*)>& change) {
  return [change] {
    CudaBlockMasks masks{static_cast<uint32_t*>(kAligned), 1000, 4, 128};
    change(&masks);
    return CudaFlexMasks(static_cast<uint32_t*>(kAligned), masks, nullptr);
  };
}

std::function<Status()> Pooled(const std::function<void(CudaFlexPooledArgs*)>& change,
                               size_t workspace = kLarge) {
  return [change, workspace] {
    auto args = Sized<CudaFlexPooledArgs>();
    args.k_mean = static_cast<float*>(kAligned);
    args.query_aware = static_cast<uint8_t*>(kAligned);
    args.gamma = 0.9;
    args.masks = {static_cast<uint32_t*>(kAligned), 1000, 4, 128};
    change(&args);
    return CudaFlexPooled(args, kAligned, workspace, nullptr);
  };
}

INSTANTIATE_TEST_SUITE_P(
    Stages, RefusalTest,
    ::testing::Values(
        Refusal{"rows", Profile([](auto* a) { a->rows = 129; }), kBad, "rows is 129; 1 to 128"},
        Refusal{"rows_over_tokens", Profile([](auto* a) { a->num_tokens = 100; }), kBad, "1 to 100"},
        Refusal{"profile_tokens", Profile([](auto* a) { a->num_tokens = 0; }), kBad, "2147483647"},
        Refusal{"factor", Profile([](auto* a) { a->factor = 0; }), kBad, "factor"},
        Refusal{"profile_scale", Profile([](auto* a) { a->softmax_scale = -1; }), kBad, "softmax_scale"},
        Refusal{"profile_dim", Profile([](auto* a) { a->head_dim = 96; }), kUnknown, "96"},
        Refusal{"profile_group", Profile([](auto* a) { a->num_q_heads = 18; }), kUnknown, "9 query"},
        Refusal{"profile_k", Profile([](auto* a) { a->k = kMisaligned; }), kBad, "k is not 16-byte"},
        Refusal{"profile_null", Profile([](auto* a) { a->slash = nullptr; }), kBad, "null"},
        Refusal{"length", Covering([](auto* a) { a->length = 0; }), kBad, "length is 0"},
        Refusal{"num_rows", Covering([](auto* a) { a->num_rows = 70000; }), kBad, "num_rows is 70000"},
        Refusal{"share", Covering([](auto* a) { a->share = 1.5; }), kBad, "share is 1.5"},
        Refusal{"most_sum", Covering([](auto* a) { a->most_sum = 0; }), kBad, "most_sum is 0"},
        Refusal{"counts", Covering([](auto* a) { a->counts = nullptr; }), kBad, "counts is null"},
        Refusal{"stage_tau", Budgets([](auto* a) { a->tau = 2; }), kBad, "tau is 2"},
        Refusal{"min_blocks", Budgets([](auto* a) { a->min_blocks = 0; }), kBad, "min_blocks is 0"},
        Refusal{"k_mean", Budgets([](auto* a) { a->k_mean = nullptr; }), kBad, "k_mean is null"},
        Refusal{"num_blocks", Top([](auto* a) { a->num_blocks = 0; }), kBad, "num_blocks is 0"},
        Refusal{"bits", Top([](auto* a) { a->bits = nullptr; }), kBad, "bits is null"},
        Refusal{"tiles", Masks([](auto* a) { a->tile_positions = 32; }), kBad, "tile_positions is 32"},
        Refusal{"words", Masks([](auto* a) { a->words = nullptr; }), kBad, "masks.words is null"},
        Refusal{"stage_gamma", Pooled([](auto* a) { a->gamma = 1; }), kBad, "gamma is 1"},
        Refusal{"mask_tokens", Pooled([](auto* a) { a->masks.num_tokens = 999; }), kBad, "999"},
        Refusal{"map_bytes", Pooled([](auto* a) { a->map_bytes = 0; }), kBad, "map_bytes is 0"},
        Refusal{"pooled_workspace", Pooled([](auto*) {}, 100), kBad, "workspace has 100 bytes"}),
    [](const auto& test) { return test.param.name; });

std::function<Status()> Made(
    const std::function<void(reference::FlexParameters*, CudaPolicyShape*)>& change) {
  return [change] {
    reference::FlexParameters parameters;
    CudaPolicyShape shape{2, 8, 2, 128, 0.1f};
    change(&parameters, &shape);
    std::unique_ptr<CudaPolicy> policy;
    return MakeCudaFlex(parameters, shape, &policy);
  };
}

INSTANTIATE_TEST_SUITE_P(
    Policy, RefusalTest,
    ::testing::Values(
        Refusal{"gamma", Made([](auto* p, auto*) { p->gamma = 1; }), kBad, "gamma is 1"},
        Refusal{"tau", Made([](auto* p, auto*) { p->tau = -1; }), kBad, "tau is -1"},
        Refusal{"min", Made([](auto* p, auto*) { p->min_budget_tokens = 0; }), kBad,
                "min_budget_tokens is 0"},
        Refusal{"max", Made([](auto* p, auto*) { p->max_budget_tokens = -1; }), kBad, "max_budget_tokens"},
        Refusal{"block", Made([](auto* p, auto*) { p->block_tokens = 64; }), kUnknown, "block_tokens is 64"},
        Refusal{"dim", Made([](auto*, auto* s) { s->head_dim = 96; }), kUnknown, "96"},
        Refusal{"heads", Made([](auto*, auto* s) { s->num_kv_heads = 3; }), kBad, "not a multiple"},
        Refusal{"scale", Made([](auto*, auto* s) { s->softmax_scale = 0; }), kBad, "softmax_scale is 0"}),
    [](const auto& test) { return test.param.name; });

class FlexPolicyTest : public ::testing::Test {
 protected:
  FlexPolicyTest() { EXPECT_TRUE(MakeCudaFlex({}, {2, 8, 2, 128, 0.1f}, &policy_).ok()); }

  std::unique_ptr<CudaPolicy> policy_;
  CudaSelection selection_;
};

TEST_F(FlexPolicyTest, ShortPromptsAreDense) {
  ASSERT_TRUE(policy_->Begin(1024, kAligned, policy_->MemoryBytes(1024), nullptr).ok());

  ASSERT_TRUE(policy_->Select({0, kAligned, kAligned, kAligned}, nullptr, &selection_).ok());

  EXPECT_EQ(selection_.lists.num_lists, 0);
  EXPECT_EQ(selection_.visited, nullptr);
}

TEST_F(FlexPolicyTest, RefusesWrongMemoryAndOrder) {
  EXPECT_EQ(policy_->Select({0, kAligned, kAligned, kAligned}, nullptr, &selection_).code(), kBad);
  EXPECT_EQ(policy_->Begin(0, kAligned, kLarge, nullptr).code(), kBad);
  EXPECT_EQ(policy_->Begin(1025, kMisaligned, kLarge, nullptr).code(), kBad);
  EXPECT_EQ(policy_->Begin(1025, kAligned, policy_->MemoryBytes(1025) - 1, nullptr).code(), kBad);
  ASSERT_TRUE(policy_->Begin(1025, kAligned, policy_->MemoryBytes(1025), nullptr).ok());
  EXPECT_EQ(policy_->Select({0, nullptr, kAligned, kAligned}, nullptr, &selection_).code(), kBad);
}

}  // namespace
}  // namespace headwater::kernels
