// What CudaRangeAttention() refuses: runs without a GPU.
#include "kernels/cuda/range_attention.h"

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

CudaRangeAttentionArgs ValidArgs() {
  CudaRangeAttentionArgs args = {kAligned, kAligned, kAligned, kAligned, nullptr, 1000, 8, 2, 128, 0.1f, {}};
  args.ranges.num_lists = 8;
  args.ranges.range_counts = static_cast<int32_t*>(kAligned);
  args.ranges.range_offsets = static_cast<int64_t*>(kAligned);
  args.ranges.ranges = static_cast<CudaKeyRange*>(kAligned);
  return args;
}

std::function<Status()> Changed(const std::function<void(CudaRangeAttentionArgs*)>& change) {
  return [change] {
    CudaRangeAttentionArgs args = ValidArgs();
    change(&args);
    return CudaRangeAttention(args, nullptr);
  };
}

constexpr auto kBad = StatusCode::kInvalidArgument;
constexpr auto kUnknown = StatusCode::kUnimplemented;
INSTANTIATE_TEST_SUITE_P(
    RangeAttention, RefusalTest,
    ::testing::Values(
        Refusal{"no_tokens", Changed([](auto* a) { a->num_tokens = 0; }), kBad, "num_tokens is 0"},
        Refusal{"many_tokens", Changed([](auto* a) { a->num_tokens = INT32_MAX; }), kBad, "2147483647"},
        Refusal{"many_tiles", Changed([](auto* a) {
                  a->num_tokens = INT32_MAX - 256;
                  a->num_q_heads = a->num_kv_heads = 65;
                }),
                kBad, "tiles of all heads"},
        Refusal{"head_dim", Changed([](auto* a) { a->head_dim = 96; }), kUnknown, "96"},
        Refusal{"gqa", Changed([](auto* a) { a->num_q_heads = 18; }), kUnknown, "9 query heads"},
        Refusal{"null_k", Changed([](auto* a) { a->k = nullptr; }), kBad, "k is null"},
        Refusal{"misaligned", Changed([](auto* a) { a->out = kMisaligned; }), kBad, "out is not 16-byte"},
        Refusal{"scale", Changed([](auto* a) { a->softmax_scale = 0; }), kBad, "softmax_scale is 0"},
        Refusal{"lists", Changed([](auto* a) { a->ranges.num_lists = 2; }), kBad, "num_lists is 2"},
        Refusal{"null_ranges", Changed([](auto* a) { a->ranges.ranges = nullptr; }), kBad, "ranges is null"},
        Refusal{"some_columns", Changed([](auto* a) { a->ranges.columns = static_cast<int32_t*>(kAligned); }),
                kBad, "1 are given"},
        Refusal{"half_a_mask", Changed([](auto* a) { a->ranges.window_tokens = 5; }), kBad,
                "window_tokens 5"}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace headwater::kernels
