// What CudaSelectBlocks() refuses before it touches a device: runs without a GPU.
#include "kernels/cuda/pattern.h"

#include <cmath>
#include <functional>
#include <string>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

CudaSearchArgs ValidArgs() {
  CudaSearchArgs args;
  args.q = args.k = kAligned;
  args.total_q = 100;
  args.total_k = 200;
  args.num_q_heads = 8;
  args.num_kv_heads = 2;
  args.head_dim = 128;
  args.softmax_scale = 0.1f;
  args.counts = args.blocks = static_cast<int32_t*>(kAligned);
  args.offsets = static_cast<int64_t*>(kAligned);
  args.used = static_cast<uint64_t*>(kAligned);
  args.overflows = static_cast<uint32_t*>(kAligned);
  args.capacity = 100;
  return args;
}

Refusal Case(const char* name, const std::function<void(CudaSearchArgs*)>& change, StatusCode code,
             const char* says) {
  return {name,
          [change] {
            CudaSearchArgs args = ValidArgs();
            change(&args);
            return CudaSelectBlocks(args, kAligned, size_t{1} << 30, nullptr);
          },
          code, says};
}

constexpr auto kBad = StatusCode::kInvalidArgument;
INSTANTIATE_TEST_SUITE_P(
    Arguments, RefusalTest,
    ::testing::Values(
        Case(
            "null_q", [](auto* a) { a->q = nullptr; }, kBad, "null"),
        Case(
            "null_counts", [](auto* a) { a->counts = nullptr; }, kBad, "output"),
        Case(
            "no_capacity", [](auto* a) { a->capacity = 0; }, kBad, "capacity 0"),
        Case(
            "no_tokens", [](auto* a) { a->total_q = 0; }, kBad, "total_q is 0"),
        Case(
            "heads_do_not_divide", [](auto* a) { a->num_kv_heads = 3; }, kBad, "not a multiple of 3"),
        Case(
            "head_dim", [](auto* a) { a->head_dim = 80; }, StatusCode::kUnimplemented, "head_dim 80"),
        Case(
            "threshold_zero", [](auto* a) { a->threshold = 0; }, kBad, "threshold is 0"),
        Case(
            "threshold_over_one", [](auto* a) { a->threshold = 1.5f; }, kBad, "threshold is 1.5"),
        Case(
            "threshold_nan", [](auto* a) { a->threshold = std::nanf(""); }, kBad, "threshold"),
        Case(
            "density_negative", [](auto* a) { a->forced_density = -0.5; }, kBad, "forced_density is -0.5"),
        Case(
            "density_over_one", [](auto* a) { a->forced_density = 1.5; }, kBad, "forced_density is 1.5"),
        Case(
            "density_nan", [](auto* a) { a->forced_density = std::nan(""); }, kBad, "forced_density is nan"),
        Case(
            "no_window", [](auto* a) { a->window_blocks = 0; }, kBad, "window_blocks 0"),
        Case(
            "negative_sink", [](auto* a) { a->sink_blocks = -1; }, kBad, "sink_blocks -1"),
        Case(
            "scale", [](auto* a) { a->softmax_scale = -1; }, kBad, "softmax_scale"),
        Case(
            "kv_shorter_than_q", [](auto* a) { a->total_k = 99; }, kBad, "kv_len 99"),
        Case(
            "position_overflows", [](auto* a) { a->query_position = INT32_MAX; }, kBad,
            "to 2147483291 is wanted"),
        Case(
            "too_long", [](auto* a) { a->total_q = a->total_k = 100'000'000; }, StatusCode::kUnimplemented,
            "kv_len 100000000 is over 83886080")),
    [](const auto& test) { return test.param.name; });

// The search must fit beside a model: means of K, and at most 64 MiB for those of Q.
TEST(CudaSearchWorkspaceTest, IsLinearInTokens) {
  CudaSearchArgs args = ValidArgs();
  args.num_q_heads = 32;
  args.num_kv_heads = 8;
  args.total_q = args.total_k = 1 << 20;

  EXPECT_LE(CudaSearchWorkspaceBytes(args), size_t{96} << 20);
  EXPECT_EQ(CudaSearchTiles(args), (1 << 20) / 32);
  args.threshold = 0;
  EXPECT_EQ(CudaSearchWorkspaceBytes(args), 0u);
}

TEST(CudaSearchWavesTest, CallsFillTheDevice) {
  CudaSearchArgs args = ValidArgs();
  args.num_q_heads = 32;
  args.num_kv_heads = 8;
  args.total_q = args.total_k = 1 << 22;
  args.forced_density = 0.01;
  // 32 tiles of 32 queries a CTA, 8 of them for as many queries: 16.5 a wave of 132.
  EXPECT_EQ(CudaSearchWaves(args, 132, 17'000), 16 * 1024);
  EXPECT_EQ(CudaSearchWaves(args, 132, 36'000), 33 * 1024);
  EXPECT_EQ(CudaSearchWaves(args, 132, 70'000), 66 * 1024);
  EXPECT_EQ(CudaSearchWaves(args, 132, 100), 16 * 1024);  // never less than one
  args.num_q_heads = args.num_kv_heads = 1;               // the bitmaps of 40 tiles of 128 queries
  EXPECT_EQ(CudaSearchWaves(args, 132, 0), 132 * 40 * 128);
  args.num_q_heads = 0;
  EXPECT_EQ(CudaSearchWaves(args, 132, 100), 0);
}

TEST(CudaSearchWorkspaceTest, AForcedDensityNeedsNoThreshold) {
  CudaSearchArgs args = ValidArgs();
  const size_t by_threshold = CudaSearchWorkspaceBytes(args);
  args.threshold = 0;
  args.forced_density = 1;

  EXPECT_EQ(CudaSearchWorkspaceBytes(args), by_threshold);
}

}  // namespace
}  // namespace headwater::kernels
