// What CudaMergePartials() refuses: runs without a GPU.
#include "kernels/cuda/merge.h"

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

CudaMergeArgs ValidArgs() {
  auto* const array = static_cast<float*>(kAligned);
  return {array, array, array, array, array, nullptr, array, 10, 128};
}

std::function<Status()> Changed(const std::function<void(CudaMergeArgs*)>& change) {
  return [change] {
    CudaMergeArgs args = ValidArgs();
    change(&args);
    return CudaMergePartials(args, nullptr);
  };
}

constexpr auto kBad = StatusCode::kInvalidArgument;
INSTANTIATE_TEST_SUITE_P(
    Merge, RefusalTest,
    ::testing::Values(
        Refusal{"negative_rows", Changed([](auto* a) { a->num_rows = -1; }), kBad, "num_rows is -1"},
        Refusal{"head_dim", Changed([](auto* a) { a->head_dim = 96; }), StatusCode::kUnimplemented, "96"},
        Refusal{"null_partial", Changed([](auto* a) { a->b = nullptr; }), kBad, "null"},
        Refusal{"null_lse", Changed([](auto* a) { a->a_lse_ln = nullptr; }), kBad, "null"},
        Refusal{"null_outputs", Changed([](auto* a) { a->out_f32 = nullptr; }), kBad, "both outputs"},
        Refusal{"misaligned", Changed([](auto* a) { a->a = static_cast<float*>(kMisaligned); }), kBad,
                "16-byte"}),
    [](const auto& test) { return test.param.name; });

TEST(CudaMergeTest, NoRowsIsFine) {
  CudaMergeArgs args;
  args.head_dim = 64;

  EXPECT_TRUE(CudaMergePartials(args, nullptr).ok());
}

}  // namespace
}  // namespace headwater::kernels
