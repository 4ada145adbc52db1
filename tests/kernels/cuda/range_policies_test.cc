// What the policies of ranges and their stages refuse: runs without a GPU.
#include "gtest/gtest.h"

#include "kernels/cuda/policies/a_shape.h"
#include "kernels/cuda/policies/vertical_slash.h"
#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

constexpr CudaPolicyShape kShape = {2, 8, 2, 128, 0.1f};

std::function<Status()> AShape(const AShapeParameters& parameters, const CudaPolicyShape& shape = kShape) {
  return [=] {
    std::unique_ptr<CudaPolicy> made;
    return MakeCudaAShape(parameters, shape, &made);
  };
}

std::function<Status()> VerticalSlash(
    const std::function<void(reference::VerticalSlashParameters*, CudaPolicyShape*)>& change) {
  return [change] {
    reference::VerticalSlashParameters parameters;
    CudaPolicyShape shape = kShape;
    change(&parameters, &shape);
    std::unique_ptr<CudaPolicy> made;
    return MakeCudaVerticalSlash(parameters, shape, &made);
  };
}

constexpr auto kBad = StatusCode::kInvalidArgument;
constexpr auto kUnknown = StatusCode::kUnimplemented;
INSTANTIATE_TEST_SUITE_P(
    RangePolicies, RefusalTest,
    ::testing::Values(
        Refusal{"sinks", AShape({-1, 10}), kBad, "sink_tokens is -1; 0 to 4194304"},
        Refusal{"window", AShape({0, 0}), kBad, "window_tokens is 0; 1 to 4194304"},
        Refusal{"a_shape_dim", AShape({}, {1, 8, 2, 96, 0.1f}), kUnknown, "96"},
        Refusal{"a_shape_heads", AShape({}, {1, 8, 3, 64, 0.1f}), kBad, "8 query heads"},
        Refusal{"a_shape_scale", AShape({}, {1, 8, 2, 64, -1.0f}), kBad, "softmax_scale is -1"},
        Refusal{"layers", VerticalSlash([](auto*, auto* s) { s->num_layers = 0; }), kBad, "num_layers is 0"},
        Refusal{"budgets", VerticalSlash([](auto* p, auto*) { p->budgets.resize(3); }), kBad,
                "budgets has 3 entries"},
        Refusal{"n_vertical", VerticalSlash([](auto* p, auto*) { p->budgets[0].n_vertical = 0; }), kBad,
                "n_vertical is 0"},
        Refusal{"n_slash", VerticalSlash([](auto* p, auto*) { p->budgets[0].n_slash = 1 << 23; }), kBad,
                "n_slash is 8388608"},
        Refusal{"last_q", VerticalSlash([](auto* p, auto*) { p->last_q = 0; }), kBad, "last_q is 0"},
        Refusal{"many_last_q", VerticalSlash([](auto* p, auto*) { p->last_q = 129; }), kUnknown,
                "last_q 129"},
        Refusal{"forced_verticals", VerticalSlash([](auto* p, auto*) { p->forced_verticals = -1; }), kBad,
                "forced_verticals is -1"},
        Refusal{"forced_locals", VerticalSlash([](auto* p, auto*) { p->forced_locals = 0; }), kBad,
                "forced_locals is 0"},
        Refusal{"least_verticals", VerticalSlash([](auto* p, auto*) { p->least_verticals = 0; }), kBad,
                "least_verticals is 0"},
        Refusal{"least_slashes", VerticalSlash([](auto* p, auto*) { p->least_slashes = 0; }), kBad,
                "least_slashes is 0"},
        Refusal{"choose", [] { return CudaChooseVerticalSlash({}, {}, nullptr); }, kBad, "num_tokens is 0"},
        Refusal{"merge", [] { return CudaMergeVerticalSlash({}, nullptr); }, kBad, "num_tokens is 0"}),
    [](const auto& test) { return test.param.name; });

template <typename Make, typename Parameters>
void ExpectRefusesMemory(Make make, const Parameters& parameters) {
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE(make(parameters, kShape, &policy).ok());
  const size_t bytes = policy->MemoryBytes(1000);
  CudaSelection selection;

  EXPECT_EQ(policy->Begin(1000, kAligned, bytes - 1, nullptr).code(), kBad);
  EXPECT_EQ(policy->Begin(1000, kMisaligned, bytes, nullptr).code(), kBad);
  EXPECT_EQ(policy->Begin(0, kAligned, bytes, nullptr).code(), kBad);
  EXPECT_EQ(policy->Begin(INT32_MAX, kAligned, bytes, nullptr).code(), kBad);
  EXPECT_EQ(policy->Select({}, nullptr, &selection).code(), kBad);
}

TEST(RangePoliciesTest, MemoryIsChecked) {
  ExpectRefusesMemory(MakeCudaAShape, AShapeParameters());
  ExpectRefusesMemory(MakeCudaVerticalSlash, reference::VerticalSlashParameters());
}

}  // namespace
}  // namespace headwater::kernels
