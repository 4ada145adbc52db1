// What CudaAttention() refuses before it touches a device: runs without a GPU.
#include "kernels/cuda/attention.h"

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

CudaAttentionArgs ValidArgs() {
  CudaAttentionArgs args;
  args.q = args.k = args.v = kAligned;
  args.out = kAligned;
  args.total_q = 100;
  args.total_k = 200;
  args.num_q_heads = 8;
  args.num_kv_heads = 2;
  args.head_dim = 128;
  args.softmax_scale = 0.1f;
  return args;
}

CudaBlockLists Lists() {
  return {2, static_cast<int32_t*>(kAligned), static_cast<int64_t*>(kAligned),
          static_cast<int32_t*>(kAligned)};
}

Refusal Case(const char* name, const std::function<void(CudaAttentionArgs*)>& change, StatusCode code,
             const char* says) {
  return {name,
          [change] {
            CudaAttentionArgs args = ValidArgs();
            change(&args);
            return CudaAttention(args, kAligned, size_t{1} << 20, nullptr);
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
            "null_outputs", [](auto* a) { a->out = nullptr; }, kBad, "both outputs"),
        Case(
            "misaligned_k", [](auto* a) { a->k = kMisaligned; }, kBad, "16-byte"),
        Case(
            "misaligned_f32", [](auto* a) { a->out_f32 = static_cast<float*>(kMisaligned); }, kBad,
            "16-byte"),
        Case(
            "no_tokens", [](auto* a) { a->total_q = 0; }, kBad, "total_q is 0"),
        Case(
            "too_many_tokens", [](auto* a) { a->total_k = int64_t{1} << 31; }, kBad, "2147483648"),
        Case(
            "heads_do_not_divide", [](auto* a) { a->num_kv_heads = 3; }, kBad, "not a multiple of 3"),
        Case(
            "negative_heads", [](auto* a) { a->num_q_heads = -8; }, kBad, "-8"),
        Case(
            "gqa_ratio", [](auto* a) { a->num_q_heads = 18; }, StatusCode::kUnimplemented, "9 query heads"),
        Case(
            "head_dim", [](auto* a) { a->head_dim = 96; }, StatusCode::kUnimplemented, "head_dim 96"),
        Case(
            "scale_zero", [](auto* a) { a->softmax_scale = 0; }, kBad, "softmax_scale"),
        Case(
            "scale_nan", [](auto* a) { a->softmax_scale = std::nanf(""); }, kBad, "softmax_scale"),
        Case(
            "scale_infinite", [](auto* a) { a->softmax_scale = std::numeric_limits<float>::infinity(); },
            kBad, "softmax_scale"),
        Case(
            "kv_shorter_than_q", [](auto* a) { a->total_k = 99; }, kBad, "kv_len 99 is less than q_len 100"),
        Case(
            "position_overflows", [](auto* a) { a->query_position = INT32_MAX; }, kBad,
            "to 2147483291 is wanted"),
        Case(
            "prompt_shorter_than_kv", [](auto* a) { a->prompt_k = 50; }, kBad, "prompt_k is 50"),
        Case(
            "sequences_without_offsets", [](auto* a) { a->num_sequences = 2; }, kBad, "cu_seqlens"),
        Case(
            "one_offset_array", [](auto* a) { a->cu_seqlens_q = static_cast<int32_t*>(kAligned); }, kBad,
            "cu_seqlens"),
        Case(
            "list_count", [](auto* a) { a->lists.num_lists = 4; }, kBad, "num_lists is 4"),
        Case(
            "null_lists", [](auto* a) { a->lists.num_lists = 2; }, kBad, "null arrays"),
        Case(
            "one_mean_table", [](auto* a) { a->correction.k_means = kAligned; }, kBad, "v_means is null"),
        Case(
            "misaligned_means",
            [](auto* a) {
              a->correction = {kAligned, kMisaligned};
            },
            kBad, "16-byte"),
        Case(
            "correction_without_lists",
            [](auto* a) {
              a->correction = {kAligned, kAligned};
            },
            kBad, "without block lists"),
        Case(
            "correction_of_sequences",
            [](auto* a) {
              a->lists = Lists();
              a->correction = {kAligned, kAligned};
              a->cu_seqlens_q = a->cu_seqlens_k = static_cast<int32_t*>(kAligned);
            },
            StatusCode::kUnimplemented, "cu_seqlens"),
        Case(
            "correction_of_too_many",
            [](auto* a) {
              a->lists = Lists();
              a->correction = {kAligned, kAligned};
              a->total_k = (1 << 24) + 1;
            },
            StatusCode::kUnimplemented, "16777217 keys; at most 16777216")),
    [](const auto& test) { return test.param.name; });

TEST(CudaAttentionWorkspaceTest, TooSmallOrMisalignedIsRefused) {
  const CudaAttentionArgs args = ValidArgs();
  const size_t bytes = CudaAttentionWorkspaceBytes(args);

  EXPECT_GT(bytes, 0u);
  for (const Status& status :
       {CudaAttention(args, kAligned, bytes - 1, nullptr), CudaAttention(args, nullptr, bytes, nullptr),
        CudaAttention(args, kMisaligned, bytes, nullptr)}) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(std::to_string(bytes)), std::string::npos) << status.message();
  }
}

TEST(CudaAttentionWorkspaceTest, ListsNeedFourBytesATile) {
  CudaAttentionArgs args = ValidArgs();
  args.total_q = args.total_k = 1 << 20;
  const size_t dense = CudaAttentionWorkspaceBytes(args);
  args.lists = Lists();

  const size_t tiles = 2 * ((size_t{1} << 20) / 32);

  EXPECT_LE(dense, 64u);
  EXPECT_GE(CudaAttentionWorkspaceBytes(args), dense + 4 * tiles);
  EXPECT_LE(CudaAttentionWorkspaceBytes(args), dense + 4 * tiles + 64);
}

TEST(CudaCheckBlockListsTest, RefusesWhatItCannotCheck) {
  CudaAttentionArgs args = ValidArgs();
  auto* const first_bad = static_cast<int64_t*>(kAligned);
  EXPECT_EQ(CudaCheckBlockLists(args, 10, first_bad, kAligned, 1 << 20, nullptr).code(), kBad) << "no lists";
  args.lists = Lists();
  EXPECT_EQ(CudaCheckBlockLists(args, -1, first_bad, kAligned, 1 << 20, nullptr).code(), kBad);
  EXPECT_EQ(CudaCheckBlockLists(args, 10, nullptr, kAligned, 1 << 20, nullptr).code(), kBad);
  EXPECT_EQ(CudaCheckBlockLists(args, 10, first_bad, kAligned, 1, nullptr).code(), kBad) << "workspace";
}

}  // namespace
}  // namespace headwater::kernels
