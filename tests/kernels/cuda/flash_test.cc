// What FlashPrefill's selection and policies refuse: runs without a GPU.
#include "kernels/cuda/flash.h"

#include <cmath>
#include <limits>

#include "gtest/gtest.h"

#include "kernels/cuda/policies/flash.h"
#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

constexpr auto kBad = StatusCode::kInvalidArgument, kUnknown = StatusCode::kUnimplemented;

CudaFlashArgs ValidArgs() {
  CudaFlashArgs args;
  args.q = args.k_means = kAligned;
  args.mean_rows = 8;
  args.num_tokens = 1000;
  args.num_q_heads = 8;
  args.num_kv_heads = 2;
  args.head_dim = 128;
  args.softmax_scale = 0.1f;
  args.alpha = 0.1;
  args.masks = CudaBlockMasksOf(1000, 8, 2, false);
  args.masks.words = static_cast<uint32_t*>(kAligned);
  return args;
}

std::function<Status()> Changed(const std::function<void(CudaFlashArgs*)>& change) {
  return [change] {
    CudaFlashArgs args = ValidArgs();
    change(&args);
    return CudaFlashSelect(args, nullptr);
  };
}

INSTANTIATE_TEST_SUITE_P(
    Flash, RefusalTest,
    ::testing::Values(
        Refusal{"no_tokens", Changed([](auto* a) { a->num_tokens = 0; }), kBad, "total_q is 0"},
        Refusal{"many_tokens", Changed([](auto* a) { a->num_tokens = kCudaFlashMostTokens + 1; }), kUnknown,
                "num_tokens is 4194305"},
        Refusal{"heads", Changed([](auto* a) { a->num_kv_heads = 3; }), kBad, "8 query heads"},
        Refusal{"group", Changed([](auto* a) { a->num_q_heads = 18; }), kUnknown, "9 query heads"},
        Refusal{"head_dim", Changed([](auto* a) { a->head_dim = 96; }), kUnknown, "head_dim 96"},
        Refusal{"q", Changed([](auto* a) { a->q = nullptr; }), kBad, "q is null"},
        Refusal{"means", Changed([](auto* a) { a->k_means = kMisaligned; }), kBad, "k_means is not"},
        Refusal{"mean_rows", Changed([](auto* a) { a->mean_rows = 7; }), kBad, "mean_rows is 7"},
        Refusal{"scale", Changed([](auto* a) { a->softmax_scale = 0; }), kBad, "softmax_scale is 0"},
        Refusal{"alpha", Changed([](auto* a) { a->alpha = 1.5; }), kBad, "alpha is 1.5"},
        Refusal{"alpha_nan", Changed([](auto* a) { a->alpha = std::nan(""); }), kBad, "alpha is nan"},
        Refusal{"sinks", Changed([](auto* a) { a->sink_blocks = -1; }), kBad, "sink_blocks is -1"},
        Refusal{"window", Changed([](auto* a) { a->window_blocks = 0; }), kBad, "window_blocks is 0"},
        Refusal{"dense", Changed([](auto* a) { a->dense_last_tiles = -1; }), kBad, "dense_last_tiles is -1"},
        Refusal{"least", Changed([](auto* a) { a->min_blocks = -1; }), kBad, "min_blocks is -1"},
        Refusal{"words", Changed([](auto* a) { a->masks.words = nullptr; }), kBad, "masks.words is null"},
        Refusal{"other_tiles", Changed([](auto* a) { a->per_query_head = true; }), kBad, "8 and 128"},
        Refusal{"other_tokens", Changed([](auto* a) { a->num_tokens = 999; }), kBad, "masks of 1000"}),
    [](const auto& test) { return test.param.name; });

constexpr CudaPolicyShape kShape{4, 8, 2, 128, 0.1f};

Status Make(const std::function<void(CudaPolicyShape*)>& change) {
  CudaPolicyShape shape = kShape;
  change(&shape);
  std::unique_ptr<CudaPolicy> made;
  return MakeCudaFlash({}, shape, &made);
}

// Of both policies, `call` of a made one.
std::function<Status()> Made(bool v2, const std::function<Status(CudaPolicy*)>& call) {
  return [v2, call]() -> Status {
    std::unique_ptr<CudaPolicy> policy;
    HW_KERNELS_RETURN_IF_ERROR(v2 ? MakeCudaFlash2({}, kShape, &policy) : MakeCudaFlash({}, kShape, &policy));
    return call(policy.get());
  };
}

Status BeginWith(CudaPolicy* policy, void* memory, size_t bytes_less) {
  return policy->Begin(1000, memory, policy->MemoryBytes(1000) - bytes_less, nullptr);
}

Status SelectOf(CudaPolicy* policy, const CudaPolicyLayer& layer) {
  HW_KERNELS_RETURN_IF_ERROR(BeginWith(policy, kAligned, 0));
  CudaSelection selection;
  return policy->Select(layer, nullptr, &selection);
}

INSTANTIATE_TEST_SUITE_P(
    FlashPolicies, RefusalTest,
    ::testing::Values(
        Refusal{"parameters",
                [] {
                  std::unique_ptr<CudaPolicy> made;
                  return MakeCudaFlash({.alpha = 2}, kShape, &made);
                },
                kBad, "alpha"},
        Refusal{"parameters2",
                [] {
                  std::unique_ptr<CudaPolicy> made;
                  return MakeCudaFlash2({.window_blocks = 0}, kShape, &made);
                },
                kBad, "window_blocks"},
        Refusal{"compat",
                [] {
                  std::unique_ptr<CudaPolicy> made;
                  return MakeCudaFlash({.compat = true}, kShape, &made);
                },
                kUnknown, "V1 with compat"},
        Refusal{"compat2",
                [] {
                  std::unique_ptr<CudaPolicy> made;
                  return MakeCudaFlash2({.compat = true}, kShape, &made);
                },
                kUnknown, "V2 with compat"},
        Refusal{"layers", [] { return Make([](auto* s) { s->num_layers = 0; }); }, kBad, "num_layers is 0"},
        Refusal{"group", [] { return Make([](auto* s) { s->num_kv_heads = 3; }); }, kBad, "3 KV heads"},
        Refusal{"head_dim", [] { return Make([](auto* s) { s->head_dim = 80; }); }, kUnknown, "head_dim 80"},
        Refusal{
            "scale",
            [] { return Make([](auto* s) { s->softmax_scale = std::numeric_limits<float>::infinity(); }); },
            kBad, "softmax_scale is inf"},
        Refusal{"no_tokens", Made(false, [](auto* p) { return p->Begin(0, kAligned, 1 << 20, nullptr); }),
                kBad, "num_tokens is 0"},
        Refusal{"many_tokens",
                Made(true, [](auto* p) { return p->Begin(int64_t{1} << 23, kAligned, 1 << 20, nullptr); }),
                kUnknown, "num_tokens is 8388608"},
        Refusal{"little_memory", Made(true, [](auto* p) { return BeginWith(p, kAligned, 1); }), kBad,
                "256-byte aligned"},
        Refusal{"misaligned_memory", Made(false, [](auto* p) { return BeginWith(p, kMisaligned, 0); }), kBad,
                "256-byte aligned"},
        Refusal{"before_begin",
                Made(false,
                     [](auto* p) {
                       CudaSelection selection;
                       return p->Select({0, kAligned, kAligned, kAligned}, nullptr, &selection);
                     }),
                kBad, "before Begin"},
        Refusal{"layer",
                Made(true,
                     [](auto* p) {
                       return SelectOf(p, {4, kAligned, kAligned, kAligned});
                     }),
                kBad, "layer is 4"},
        Refusal{"null_k",
                Made(false,
                     [](auto* p) {
                       return SelectOf(p, {0, kAligned, nullptr, kAligned});
                     }),
                kBad, "k is null"},
        Refusal{"null_v",
                Made(true,
                     [](auto* p) {
                       return SelectOf(p, {0, kAligned, kAligned, nullptr});
                     }),
                kBad, "v is null"}),
    [](const auto& test) { return test.param.name; });

TEST(CudaFlashPolicyTest, DenseLayersAndShortPromptsHaveNoLists) {
  std::unique_ptr<CudaPolicy> policy;
  CudaSelection selection;
  ASSERT_TRUE(MakeCudaFlash2({.dense_layers = 2}, kShape, &policy).ok());
  ASSERT_TRUE(BeginWith(policy.get(), kAligned, 0).ok());
  EXPECT_TRUE(policy->Select({1, kAligned, kAligned, kAligned}, nullptr, &selection).ok());
  EXPECT_EQ(selection.lists.num_lists, 0);
  EXPECT_EQ(selection.visited, nullptr);
  EXPECT_EQ(selection.correction.k_means, nullptr);

  ASSERT_TRUE(MakeCudaFlash2({.dense_layers = 0, .dense_tokens = 1000}, kShape, &policy).ok());
  ASSERT_TRUE(BeginWith(policy.get(), kAligned, 0).ok());
  EXPECT_TRUE(policy->Select({0, kAligned, kAligned, kAligned}, nullptr, &selection).ok());
  EXPECT_EQ(selection.lists.num_lists, 0);
}

TEST(CudaFlashPolicyTest, ListsTakeAtMost256MiB) {
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE(MakeCudaFlash({}, {1, 32, 8, 128, 0.1f}, &policy).ok());

  // 1,024 tiles of 32 heads: (1 + 1,024) / 2 blocks each, 128 bytes of mask, 12 of count and offset.
  const size_t lists = size_t{32} * 1024 * (1025 * 4 / 2 + 128 + 12);
  EXPECT_GT(policy->MemoryBytes(128 * 1024), lists);
  EXPECT_LT(policy->MemoryBytes(128 * 1024), lists + (16 << 20));
  // Masks of 256 MiB, lists of as much.
  EXPECT_LT(policy->MemoryBytes(1 << 20), size_t{600} << 20);
  EXPECT_EQ(policy->MemoryBytes(0), 0u);
}

}  // namespace
}  // namespace headwater::kernels
