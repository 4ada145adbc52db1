// What SparseSkeleton's selection and its policy refuse: runs without a GPU.
#include "kernels/cuda/skeleton.h"

#include <memory>

#include "gtest/gtest.h"

#include "kernels/cuda/policies/skeleton.h"
#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

struct Call {
  reference::SkeletonParameters parameters;
  CudaSkeletonArgs args;
  CudaBlockMasks masks{static_cast<uint32_t*>(kAligned), 1000, 4, 128};
  void* workspace = kAligned;
  size_t bytes = SIZE_MAX;
};

std::function<Status()> Changed(const std::function<void(Call*)>& change) {
  return [change] {
    Call call;
    call.args = {kAligned, kAligned, 1000, 4, 2, 128, 0.1f, &call.parameters};
    change(&call);
    return CudaSkeletonSelect(call.args, call.masks, call.workspace, call.bytes, nullptr);
  };
}

std::function<Status()> Made(
    const std::function<void(reference::SkeletonParameters*, CudaPolicyShape*)>& change) {
  return [change] {
    reference::SkeletonParameters parameters;
    CudaPolicyShape shape{2, 4, 2, 128, 0.1f};
    change(&parameters, &shape);
    std::unique_ptr<CudaPolicy> policy;
    return MakeCudaSkeleton(parameters, shape, &policy);
  };
}

constexpr auto kBad = StatusCode::kInvalidArgument;
constexpr auto kUnknown = StatusCode::kUnimplemented;
INSTANTIATE_TEST_SUITE_P(
    Skeleton, RefusalTest,
    ::testing::Values(
        Refusal{"no_parameters", Changed([](Call* c) { c->args.parameters = nullptr; }), kBad, "parameters"},
        Refusal{"bad_parameter", Changed([](Call* c) { c->parameters.ridge = 2; }), kBad, "ridge"},
        Refusal{"no_interior", Changed([](Call* c) { c->args.num_tokens = 256; }), kBad, "num_tokens is 256"},
        Refusal{"too_long", Changed([](Call* c) { c->args.num_tokens = int64_t{1} << 31; }), kBad,
                "2147483648"},
        Refusal{"heads", Changed([](Call* c) { c->args.num_kv_heads = 3; }), kBad, "3 KV heads"},
        Refusal{"head_dim", Changed([](Call* c) { c->args.head_dim = 96; }), kUnknown, "head_dim 96"},
        Refusal{"scale", Changed([](Call* c) { c->args.softmax_scale = 0; }), kBad, "softmax_scale"},
        Refusal{"frequencies", Changed([](Call* c) {
                  c->parameters.frequencies = {1, 2};
                }),
                kBad, "64"},
        Refusal{"null_q", Changed([](Call* c) { c->args.q = nullptr; }), kBad, "q is null"},
        Refusal{"misaligned_k", Changed([](Call* c) { c->args.k = kMisaligned; }), kBad, "k is not 16-byte"},
        Refusal{"null_words", Changed([](Call* c) { c->masks.words = nullptr; }), kBad, "words is null"},
        Refusal{"other_tokens", Changed([](Call* c) { c->masks.num_tokens = 999; }), kBad, "999"},
        Refusal{"other_lists", Changed([](Call* c) { c->masks.num_lists = 2; }), kBad, "num_lists is 2"},
        Refusal{"other_tiles", Changed([](Call* c) { c->masks.tile_positions = 32; }), kBad,
                "tile_positions"},
        Refusal{"null_workspace", Changed([](Call* c) { c->workspace = nullptr; }), kBad, "workspace"},
        Refusal{"small_workspace", Changed([](Call* c) { c->bytes = 1000; }), kBad, "1000 bytes"},
        Refusal{"policy_parameter", Made([](auto* p, auto*) { p->local_tokens = 0; }), kBad, "local_tokens"},
        Refusal{"policy_layers", Made([](auto*, auto* s) { s->num_layers = 0; }), kBad, "num_layers"},
        Refusal{"policy_group", Made([](auto*, auto* s) { s->num_q_heads = 18; }), kUnknown, "9 query heads"},
        Refusal{"policy_head_dim", Made([](auto*, auto* s) { s->head_dim = 256; }), kUnknown, "256"}),
    [](const auto& test) { return test.param.name; });

TEST(CudaSkeletonTest, WorkspaceGrowsWithThePrompt) {
  Call call;
  call.args = {nullptr, nullptr, 1000, 4, 2, 128, 0.1f, &call.parameters};
  const size_t little = CudaSkeletonWorkspaceBytes(call.args);
  call.args.num_tokens = 1 << 20;
  const size_t much = CudaSkeletonWorkspaceBytes(call.args);
  call.args.num_tokens = 256;

  EXPECT_GT(little, 0u);
  EXPECT_LT(much, size_t{1} << 30);
  EXPECT_GT(much, little);
  EXPECT_EQ(CudaSkeletonWorkspaceBytes(call.args), 0u);
}

TEST(CudaSkeletonTest, ShortPromptsAreDense) {
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE(MakeCudaSkeleton({}, {2, 4, 2, 128, 0.1f}, &policy).ok());
  CudaSelection selection;
  const CudaPolicyLayer layer{1, kAligned, kAligned, kAligned};

  EXPECT_EQ(policy->Select(layer, nullptr, &selection).code(), kBad);
  EXPECT_EQ(policy->MemoryBytes(256), 0u);
  ASSERT_TRUE(policy->Begin(256, nullptr, 0, nullptr).ok());
  selection.lists.num_lists = 4;
  ASSERT_TRUE(policy->Select(layer, nullptr, &selection).ok());

  EXPECT_EQ(selection.lists.num_lists, 0);
  EXPECT_EQ(policy->Select({2, kAligned, kAligned, kAligned}, nullptr, &selection).code(), kBad);
  EXPECT_EQ(policy->Begin(257, kAligned, 1000, nullptr).code(), kBad);
  EXPECT_EQ(policy->Begin(0, kAligned, 1000, nullptr).code(), kBad);
}

}  // namespace
}  // namespace headwater::kernels
