// What the operations of cuda/block_mass.h refuse: runs without a GPU.
#include "kernels/cuda/block_mass.h"

#include <cmath>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

void* const kOdd = reinterpret_cast<void*>((uintptr_t{1} << 20) + 2);

CudaMassProblem ValidProblem() { return {kAligned, kAligned, 1000, 8, 2, 128, 0.1f}; }

std::function<Status()> Map(const std::function<void(CudaBlockMassArgs*)>& change) {
  return [change] {
    CudaBlockMassArgs args;
    args.problem = ValidProblem();
    args.lse_ln = args.average = static_cast<float*>(kAligned);
    args.num_heads = 8;
    change(&args);
    return CudaBlockMass(args, nullptr);
  };
}

std::function<Status()> Lse(const std::function<void(CudaLogSumExpArgs*)>& change) {
  return [change] {
    CudaLogSumExpArgs args{ValidProblem(), nullptr, 8, static_cast<float*>(kAligned)};
    change(&args);
    return CudaLogSumExp(args, nullptr);
  };
}

std::function<Status()> Rows(const std::function<void(CudaRowMassArgs*)>& change) {
  return [change] {
    CudaRowMassArgs args;
    args.problem = ValidProblem();
    args.rows = {static_cast<int64_t*>(kAligned), nullptr, 10};
    args.mass = static_cast<float*>(kAligned);
    change(&args);
    return CudaRowMass(args, nullptr);
  };
}

std::function<Status()> Recall(const std::function<void(CudaRecallArgs*)>& change) {
  return [change] {
    CudaRecallArgs args;
    args.mass = args.recall = static_cast<float*>(kAligned);
    args.rows = {nullptr, static_cast<int32_t*>(kAligned), 10};
    args.num_tokens = 1000;
    args.num_q_heads = 8;
    args.lists = {2, static_cast<int32_t*>(kAligned), static_cast<int64_t*>(kAligned),
                  static_cast<int32_t*>(kAligned)};
    change(&args);
    return CudaRecallOfRows(args, nullptr);
  };
}

constexpr auto kBad = StatusCode::kInvalidArgument;
constexpr auto kUnknown = StatusCode::kUnimplemented;
INSTANTIATE_TEST_SUITE_P(
    BlockMass, RefusalTest,
    ::testing::Values(
        Refusal{"lse_tokens", Lse([](auto* a) { a->problem.num_tokens = 0; }), kBad, "total_q is 0"},
        Refusal{"lse_heads", Lse([](auto* a) { a->num_heads = 9; }), kBad, "num_heads is 9"},
        Refusal{"odd_lse_heads", Lse([](auto* a) { a->heads = static_cast<int32_t*>(kOdd); }), kBad,
                "heads is not 4-byte"},
        Refusal{"lse_null", Lse([](auto* a) { a->lse_ln = nullptr; }), kBad, "lse_ln is null"},
        Refusal{"no_tokens", Map([](auto* a) { a->problem.num_tokens = 0; }), kBad, "total_q is 0"},
        Refusal{"odd_group", Map([](auto* a) { a->problem.num_kv_heads = 3; }), kBad, "8 query heads"},
        Refusal{"head_dim", Map([](auto* a) { a->problem.head_dim = 96; }), kUnknown, "head_dim 96"},
        Refusal{"scale", Map([](auto* a) { a->problem.softmax_scale = NAN; }), kBad, "softmax_scale"},
        Refusal{"misaligned_q", Map([](auto* a) { a->problem.q = kMisaligned; }), kBad, "q is not 16"},
        Refusal{"null_k", Map([](auto* a) { a->problem.k = nullptr; }), kBad, "k is null"},
        Refusal{"null_lse", Map([](auto* a) { a->lse_ln = nullptr; }), kBad, "lse_ln is null"},
        Refusal{"odd_average", Map([](auto* a) { a->average = static_cast<float*>(kOdd); }), kBad,
                "average is not 4-byte"},
        Refusal{"heads", Map([](auto* a) { a->num_heads = 9; }), kBad, "num_heads is 9; 0 to 8"},
        Refusal{"many_heads", Map([](auto* a) {
                  a->num_heads = 65536;
                  a->heads = static_cast<int32_t*>(kAligned);
                }),
                kBad, "num_heads is 65536"},
        Refusal{"rows", Rows([](auto* a) { a->rows.num_rows = -1; }), kBad, "num_rows is -1"},
        Refusal{"no_positions", Rows([](auto* a) { a->rows.positions = nullptr; }), kBad, "positions"},
        Refusal{"both_positions",
                Rows([](auto* a) { a->rows.positions_i32 = static_cast<int32_t*>(kAligned); }), kBad,
                "both given"},
        Refusal{"null_mass", Rows([](auto* a) { a->mass = nullptr; }), kBad, "mass is null"},
        Refusal{"recall_tokens", Recall([](auto* a) { a->num_tokens = -5; }), kBad, "num_tokens is -5"},
        Refusal{"recall_lists", Recall([](auto* a) { a->lists.num_lists = 3; }), kBad, "3 lists for 8"},
        Refusal{"recall_pack", Recall([](auto* a) {
                  a->num_q_heads = 32;
                  a->lists.num_lists = 2;
                }),
                kBad, "2 lists for 32"},
        Refusal{"recall_counts", Recall([](auto* a) { a->lists.counts = nullptr; }), kBad, "counts is null"},
        Refusal{"recall_null", Recall([](auto* a) { a->recall = nullptr; }), kBad, "recall is null"}),
    [](const auto& test) { return test.param.name; });

TEST(CudaBlockMassTest, NothingToDoIsFine) {
  CudaBlockMassArgs map;
  map.problem = ValidProblem();
  CudaRowMassArgs rows;
  rows.problem = ValidProblem();

  EXPECT_TRUE(CudaBlockMass(map, nullptr).ok());
  EXPECT_TRUE(CudaRowMass(rows, nullptr).ok());
}

}  // namespace
}  // namespace headwater::kernels
