// What XAttention on the GPU refuses: runs without a GPU.
#include "kernels/cuda/xattention.h"

#include <cmath>

#include "gtest/gtest.h"

#include "kernels/cuda/policies/xattention.h"
#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {

namespace {

const double kThresholds[] = {0.9, 1.5};

CudaXAttentionArgs ValidArgs() {
  CudaXAttentionArgs args;
  args.q = args.k = kAligned;
  args.num_tokens = 1000;
  args.num_q_heads = 8;
  args.num_kv_heads = 2;
  args.head_dim = 128;
  args.softmax_scale = 0.1f;
  args.thresholds = kThresholds;
  args.num_thresholds = 1;
  args.masks = {static_cast<uint32_t*>(kAligned), 1000, 8, 128};
  return args;
}

std::function<Status()> Changed(const std::function<void(CudaXAttentionArgs*)>& change) {
  return [change] {
    CudaXAttentionArgs args = ValidArgs();
    change(&args);
    return CudaXAttentionMasks(args, kAligned, size_t{1} << 30, nullptr);
  };
}

std::function<Status()> Made(
    const std::function<void(reference::XAttentionParameters*, CudaPolicyShape*)>& change) {
  return [change] {
    reference::XAttentionParameters parameters;
    CudaPolicyShape shape{4, 8, 2, 128, 0.1f};
    change(&parameters, &shape);
    std::unique_ptr<CudaPolicy> made;
    return MakeCudaXAttention(parameters, shape, &made);
  };
}

constexpr auto kBad = StatusCode::kInvalidArgument;
constexpr auto kUnknown = StatusCode::kUnimplemented;
INSTANTIATE_TEST_SUITE_P(
    XAttention, RefusalTest,
    ::testing::Values(
        Refusal{"tokens", Changed([](auto* a) { a->num_tokens = 0; }), kBad, "is 0"},
        Refusal{"many_tokens", Changed([](auto* a) { a->num_tokens = 5'000'000; }), kUnknown,
                "5000000 tokens; at most 4194304"},
        Refusal{"group", Changed([](auto* a) { a->num_kv_heads = 3; }), kBad, "KV heads"},
        Refusal{"head_dim", Changed([](auto* a) { a->head_dim = 32; }), kUnknown, "head_dim 32"},
        Refusal{"stride_3", Changed([](auto* a) { a->stride = 3; }), kBad, "stride is 3"},
        Refusal{"stride_32", Changed([](auto* a) { a->stride = 32; }), kUnknown, "stride 32"},
        Refusal{"norm", Changed([](auto* a) { a->norm = 0; }), kBad, "norm is 0"},
        Refusal{"scale", Changed([](auto* a) { a->softmax_scale = INFINITY; }), kBad, "softmax_scale is inf"},
        Refusal{"q", Changed([](auto* a) { a->q = kMisaligned; }), kBad, "q is not 16"},
        Refusal{"masks", Changed([](auto* a) { a->masks.num_lists = 2; }), kBad, "num_lists is 2; 8 to 8"},
        Refusal{"mask_tokens", Changed([](auto* a) { a->masks.num_tokens = 999; }), kBad,
                "num_tokens is 999"},
        Refusal{"thresholds", Changed([](auto* a) { a->num_thresholds = 2; }), kBad, "num_thresholds is 2"},
        Refusal{"threshold", Changed([](auto* a) { a->thresholds = kThresholds + 1; }), kBad,
                "threshold 1.5"},
        Refusal{"workspace", [] { return CudaXAttentionMasks(ValidArgs(), kAligned, 100, nullptr); }, kBad,
                "workspace"},
        Refusal{"compat", Made([](auto* p, auto*) { p->compat = true; }), kUnknown, "compat"},
        Refusal{"made_stride_2", Made([](auto* p, auto*) { p->stride = 2; }), kUnknown, "stride 2"},
        Refusal{"made_stride_5", Made([](auto* p, auto*) { p->stride = 5; }), kBad, "stride 5"},
        Refusal{"made_thresholds", Made([](auto* p, auto*) {
                  p->thresholds = {0.5, 0.6};
                }),
                kBad, "2 thresholds"},
        Refusal{"made_threshold", Made([](auto* p, auto*) { p->thresholds = {-0.5}; }), kBad,
                "threshold -0.5"},
        Refusal{"made_norm", Made([](auto* p, auto*) { p->norm = NAN; }), kBad, "norm nan"},
        Refusal{"made_chunk", Made([](auto* p, auto*) { p->chunk_tokens = 100; }), kBad, "chunk_tokens 100"},
        Refusal{"made_head_dim", Made([](auto*, auto* s) { s->head_dim = 80; }), kUnknown, "head_dim 80"},
        Refusal{"made_layers", Made([](auto*, auto* s) { s->num_layers = 0; }), kBad, "num_layers is 0"}),
    [](const auto& test) { return test.param.name; });

TEST(CudaXAttentionTest, WorkspaceIsBounded) {
  CudaXAttentionArgs args = ValidArgs();
  args.num_q_heads = 32;
  args.num_kv_heads = 8;
  for (const int stride : {4, 8, 16}) {
    args.stride = stride;
    for (const int64_t tokens : {1, 128, 1000, 131072, 200'000, 1 << 20, 1 << 22}) {
      args.num_tokens = tokens;
      const size_t bytes = CudaXAttentionWorkspaceBytes(args);
      EXPECT_GT(bytes, 0u);
      EXPECT_LE(bytes, size_t{256} << 20) << tokens;
    }
  }
}

TEST(CudaXAttentionTest, BeginRefusesWhatItCannotUse) {
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE(MakeCudaXAttention({}, {4, 8, 2, 128, 0.1f}, &policy).ok());
  const size_t bytes = policy->MemoryBytes(1000);

  EXPECT_TRUE(policy->Begin(1000, kAligned, bytes, nullptr).ok());
  EXPECT_EQ(policy->Begin(1000, kAligned, bytes - 1, nullptr).code(), kBad);
  EXPECT_EQ(policy->Begin(1000, kMisaligned, bytes, nullptr).code(), kBad);
  EXPECT_EQ(policy->Begin(0, kAligned, bytes, nullptr).code(), kBad);
  const Status many = policy->Begin((1 << 22) + 1, kAligned, bytes, nullptr);
  EXPECT_EQ(many.code(), kUnknown);
  EXPECT_EQ(many.message(), "xattention of 4194305 tokens; at most 4194304 are known");
  EXPECT_EQ(policy->MemoryBytes((1 << 22) + 1), 0u);
}

}  // namespace
}  // namespace headwater::kernels
