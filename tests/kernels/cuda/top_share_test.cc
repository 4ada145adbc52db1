// What CudaTopShareRows() refuses: runs without a GPU.
#include "kernels/cuda/top_share.h"

#include <cmath>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

const double kShares[] = {0.9, 0.5, NAN};

CudaTopShareArgs ValidArgs() {
  CudaTopShareArgs args;
  args.scores = static_cast<float*>(kAligned);
  args.list_stride = 100;
  args.masks = {static_cast<uint32_t*>(kAligned), 1000, 4, 128};
  args.num_lists = 2;
  args.num_rows = 8;
  args.shares = kShares;
  args.num_shares = 2;
  return args;
}

std::function<Status()> Changed(const std::function<void(CudaTopShareArgs*)>& change) {
  return [change] {
    CudaTopShareArgs args = ValidArgs();
    change(&args);
    return CudaTopShareRows(args, nullptr);
  };
}

constexpr auto kBad = StatusCode::kInvalidArgument;
INSTANTIATE_TEST_SUITE_P(
    TopShare, RefusalTest,
    ::testing::Values(
        Refusal{"tokens", Changed([](auto* a) { a->masks.num_tokens = 0; }), kBad, "num_tokens is 0"},
        Refusal{"tile", Changed([](auto* a) { a->masks.tile_positions = 32; }), kBad, "tile_positions is 32"},
        Refusal{"blocks", Changed([](auto* a) { a->masks.num_tokens = 5'000'000; }),
                StatusCode::kUnimplemented, "39063 blocks"},
        Refusal{"words", Changed([](auto* a) { a->masks.words = nullptr; }), kBad, "words is null"},
        Refusal{"first_list", Changed([](auto* a) { a->first_list = 5; }), kBad, "first_list is 5"},
        Refusal{"num_lists", Changed([](auto* a) { a->first_list = 3; }), kBad, "num_lists is 2; 0 to 1"},
        Refusal{"first_row", Changed([](auto* a) { a->first_row = -1; }), kBad, "first_row is -1"},
        Refusal{"num_rows", Changed([](auto* a) { a->num_rows = 9; }), kBad, "num_rows is 9; 0 to 8"},
        Refusal{"num_shares", Changed([](auto* a) { a->num_shares = 3; }), kBad, "num_shares is 3"},
        Refusal{"null_shares", Changed([](auto* a) { a->shares = nullptr; }), kBad, "shares is null"},
        Refusal{"share_nan", Changed([](auto* a) {
                  a->shares = kShares + 2;
                  a->num_shares = 1;
                }),
                kBad, "outside 0 to 1"},
        Refusal{"stride", Changed([](auto* a) { a->list_stride = -1; }), kBad, "list_stride is -1"},
        Refusal{"scores", Changed([](auto* a) { a->scores = nullptr; }), kBad, "scores is null"}),
    [](const auto& test) { return test.param.name; });

TEST(CudaTopShareTest, NoRowsIsFine) {
  CudaTopShareArgs args = ValidArgs();
  args.num_rows = 0;

  EXPECT_TRUE(CudaTopShareRows(args, nullptr).ok());
}

}  // namespace
}  // namespace headwater::kernels
