// What cuda/recall_threshold.h refuses: runs without a GPU.
#include "kernels/cuda/recall_threshold.h"

#include <cmath>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

std::function<Status()> Call(const std::function<void(CudaRecallThresholdArgs*)>& change) {
  return [change] {
    CudaRecallThresholdArgs args;
    args.q = args.k_means = kAligned;
    args.num_tokens = 1000;
    args.num_q_heads = 8;
    args.num_kv_heads = 2;
    args.head_dim = 128;
    args.softmax_scale = 0.1f;
    args.goal.rows = {static_cast<int64_t*>(kAligned), nullptr, 10};
    args.goal.mass = args.goal.curve = args.goal.thresholds = static_cast<float*>(kAligned);
    args.goal.min_recall = 0.95f;
    change(&args);
    return CudaThresholdsForRecall(args, nullptr);
  };
}

const int32_t kNoWindow[] = {4, 0};
constexpr auto kBad = StatusCode::kInvalidArgument;
constexpr auto kUnknown = StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    RecallThreshold, RefusalTest,
    ::testing::Values(
        Refusal{"no_tokens", Call([](auto* a) { a->num_tokens = 0; }), kBad, "total_q is 0"},
        Refusal{"odd_group", Call([](auto* a) { a->num_kv_heads = 3; }), kBad, "8 query heads"},
        Refusal{"head_dim", Call([](auto* a) { a->head_dim = 96; }), kUnknown, "head_dim 96"},
        Refusal{"kv_heads", Call([](auto* a) { a->num_q_heads = a->num_kv_heads = 129; }), kUnknown,
                "129 KV heads; at most 128"},
        Refusal{"scale", Call([](auto* a) { a->softmax_scale = INFINITY; }), kBad, "softmax_scale"},
        Refusal{"null_q", Call([](auto* a) { a->q = nullptr; }), kBad, "q is null"},
        Refusal{"odd_means", Call([](auto* a) { a->k_means = kMisaligned; }), kBad, "k_means is not 16"},
        Refusal{"sinks", Call([](auto* a) { a->sink_blocks = -1; }), kBad, "sink_blocks is -1"},
        Refusal{"window", Call([](auto* a) { a->window_blocks = 0; }), kBad, "window_blocks is 0"},
        Refusal{"windows", Call([](auto* a) { a->windows = kNoWindow; }), kBad, "windows is 0"},
        Refusal{"last", Call([](auto* a) { a->dense_last_tokens = -3; }), kBad, "dense_last_tokens is -3"},
        Refusal{"recall", Call([](auto* a) { a->goal.min_recall = 1.5f; }), kBad, "min_recall is 1.5"},
        Refusal{"nan_recall", Call([](auto* a) { a->goal.min_recall = NAN; }), kBad, "min_recall is nan"},
        Refusal{"errors", Call([](auto* a) { a->goal.errors = -1; }), kBad, "errors is -1"},
        Refusal{"no_rows", Call([](auto* a) { a->goal.rows.num_rows = 0; }), kBad, "num_rows is 0"},
        Refusal{"no_positions", Call([](auto* a) { a->goal.rows.positions = nullptr; }), kBad, "positions"},
        Refusal{"null_mass", Call([](auto* a) { a->goal.mass = nullptr; }), kBad, "mass is null"},
        Refusal{"null_curve", Call([](auto* a) { a->goal.curve = nullptr; }), kBad, "curve is null"},
        Refusal{"queries", Call([](auto* a) { a->queries = {900, 101}; }), kBad, "101 from 900 on; some of 1000"},
        Refusal{"first_of_none", Call([](auto* a) { a->queries = {128, 0}; }), kBad, "0 from 128 on"},
        Refusal{"odd_thresholds",
                Call([](auto* a) { a->goal.thresholds = reinterpret_cast<float*>(uintptr_t{2}); }), kBad,
                "thresholds is not 4-byte"},
        Refusal{"curves_without_thresholds",
                [] {
                  CudaRecallGoal goal;
                  goal.rows.num_rows = 1;
                  goal.min_recall = 0.9f;
                  goal.curve = static_cast<float*>(kAligned);
                  return CudaThresholdsOfCurves(goal, 2, nullptr);
                },
                kBad, "thresholds is null"}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace headwater::kernels
