// Every policy through CudaPolicyAttention(): its output is attention over the lists that it says, in double.
#include "kernels/cuda/policy.h"

#include <map>
#include <memory>
#include <string>

#include "tests/kernels/cuda/attention_problem.h"

namespace headwater::kernels {
namespace {

struct PolicyCase {
  std::string policy;
  std::map<std::string, double> parameters;
  int tokens = 3000, q_heads = 8, kv_heads = 2, head_dim = 128;
};

std::ostream& operator<<(std::ostream& out, const PolicyCase& c) {
  return out << c.policy << " " << c.tokens << " " << c.q_heads << "/" << c.kv_heads << " " << c.head_dim;
}

Case ProblemOf(const PolicyCase& c) {
  return {"policy", c.q_heads, c.kv_heads, c.head_dim, c.tokens, c.tokens};
}

CudaPolicyShape ShapeOf(const PolicyCase& c) {
  return {6, c.q_heads, c.kv_heads, c.head_dim, static_cast<float>(1 / std::sqrt(c.head_dim))};
}

// A policy with the memory of one prompt.
struct Runner {
  CudaPolicyShape shape;
  int tokens;
  std::unique_ptr<CudaPolicy> policy;
  std::unique_ptr<DeviceArray<uint8_t>> memory, workspace;

  Runner(const PolicyParameters& parameters, const CudaPolicyShape& of, int num_tokens)
      : shape(of), tokens(num_tokens) {
    const Status made = MakeCudaPolicy(parameters, shape, &policy);
    EXPECT_TRUE(made.ok()) << made.message();
    memory = std::make_unique<DeviceArray<uint8_t>>(policy->MemoryBytes(tokens) + 1);
    workspace = std::make_unique<DeviceArray<uint8_t>>(CudaPolicyAttentionWorkspaceBytes(shape, tokens) + 1);
    const Status begun = policy->Begin(tokens, memory->data(), memory->Bytes(), nullptr);
    EXPECT_TRUE(begun.ok()) << begun.message();
  }

  Status Run(int layer, const DeviceProblem& device, CudaSelection* selection) {
    return CudaPolicyAttention(
        policy.get(), shape, tokens, {layer, device.q.data(), device.k.data(), device.v.data()},
        {device.out.data(), device.lse.data()}, workspace->data(), workspace->Bytes(), nullptr, selection);
  }
};

template <typename T>
std::vector<T> Fetch(const T* from, size_t count) {
  std::vector<T> to(count);
  EXPECT_EQ(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
  return to;
}

// The problem under the lists that the selection holds.
void TakeLists(const CudaSelection& selection, Problem* problem) {
  Case& c = problem->c;
  if (selection.lists.num_lists == 0) return;
  c.lists = selection.lists.num_lists == c.q_heads ? Lists::kPerQueryHead : Lists::kPerKvHead;
  problem->pack = c.q_heads / selection.lists.num_lists;
  const int positions = 128 / problem->pack, tiles = (c.q_len + positions - 1) / positions;
  const auto segments = static_cast<size_t>(selection.lists.num_lists) * static_cast<size_t>(tiles);
  problem->counts = Fetch(selection.lists.counts, segments);
  problem->offsets = Fetch(selection.lists.offsets, segments);
  int64_t end = 1;
  for (size_t i = 0; i < segments; ++i) {
    if (problem->counts[i] > 0) end = std::max(end, problem->offsets[i] + problem->counts[i]);
  }
  problem->blocks = Fetch(selection.lists.blocks, static_cast<size_t>(end));
  if (selection.correction.k_means != nullptr) {
    c.corrected = true;
    problem->k_means = problem->Means(problem->k);
    problem->v_means = problem->Means(problem->v);
  }
}

class PolicyGpu : public testing::TestWithParam<PolicyCase> {};

TEST_P(PolicyGpu, OutputIsAttentionOverItsLists) {
  HW_REQUIRE_SM90();
  const PolicyCase& c = GetParam();
  PolicyParameters parameters;
  const Status parsed = ParsePolicyParameters(c.policy, c.parameters, &parameters);
  ASSERT_TRUE(parsed.ok()) << parsed.message();
  parameters.dense_below_tokens = 0;
  Problem problem(ProblemOf(c), 7);
  DeviceProblem device(problem);
  Runner runner(parameters, ShapeOf(c), c.tokens);
  for (int layer = 4; layer < 6; ++layer) {  // flash2's first four are dense
    CudaSelection selection;
    const Status status = runner.Run(layer, device, &selection);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_EQ(selection.ranges, nullptr);
    const bool dense = c.policy == "dense" || (c.policy == "headwater" && c.parameters.empty());
    ASSERT_EQ(selection.lists.num_lists == 0, dense) << "what selects nothing would pass below";
    Problem under = problem;
    TakeLists(selection, &under);
    std::vector<double> out, lse;
    under.Reference(&out, &lse);
    EXPECT_LE(RelativeError(ToFloat(device.out.Host()), out), kRelativeError) << "layer " << layer;
    if (selection.visited != nullptr) {
      uint64_t visited = 0;
      const int positions = 128 / under.pack;
      for (size_t i = 0; i < under.counts.size(); ++i) {
        const int tile = static_cast<int>(i) % ((c.tokens + positions - 1) / positions);
        const int last = std::min((tile + 1) * positions, c.tokens) - 1;
        visited += static_cast<uint64_t>(under.counts[i] < 0 ? last / 128 + 1 : under.counts[i]);
      }
      EXPECT_EQ(Fetch(selection.visited, 1)[0], visited);
      EXPECT_LE(visited, selection.possible);
    }
  }
  EXPECT_TRUE(runner.memory->Intact());
  EXPECT_TRUE(runner.workspace->Intact());
  EXPECT_TRUE(device.out.Intact());
}

TEST_P(PolicyGpu, PartsAreTheWhole) {
  HW_REQUIRE_SM90();
  const PolicyCase& c = GetParam();
  PolicyParameters parameters;
  ASSERT_TRUE(ParsePolicyParameters(c.policy, c.parameters, &parameters).ok());
  parameters.dense_below_tokens = 0;
  DeviceProblem device(Problem(ProblemOf(c), 7));
  Runner runner(parameters, ShapeOf(c), c.tokens);
  CudaSelection selection;
  ASSERT_TRUE(runner.Run(4, device, &selection).ok());
  ASSERT_TRUE(CudaPolicyListsBlocks(parameters));

  const DeviceArray<uint16_t> out(device.out.size());
  const DeviceArray<float> lse(device.lse.size());
  const DeviceArray<uint8_t> scratch(CudaPartBytes(runner.shape, c.tokens));
  const int64_t row = int64_t{c.q_heads} * c.head_dim, middle = c.tokens > 256 ? 256 : c.tokens;
  for (const CudaQueryRange& queries :
       {CudaQueryRange{middle, c.tokens - middle}, CudaQueryRange{0, middle}}) {
    if (queries.count == 0) continue;
    const Status status =
        CudaAttentionOverPart(selection, queries, runner.shape, c.tokens,
                              {4, device.q.data() + queries.first * row, device.k.data(), device.v.data()},
                              {out.data() + queries.first * row, lse.data() + queries.first * c.q_heads},
                              scratch.data(), runner.workspace->data(), runner.workspace->Bytes(), nullptr);
    const int32_t lists = selection.lists.num_lists;
    if (lists > 0 && queries.first % (128 / (c.q_heads / lists)) != 0) {
      EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
      return;
    }
    ASSERT_TRUE(status.ok()) << status.message();
  }
  EXPECT_EQ(out.Host(), device.out.Host());
  EXPECT_EQ(lse.Host(), device.lse.Host());
  EXPECT_TRUE(out.Intact() && lse.Intact() && scratch.Intact());
}

INSTANTIATE_TEST_SUITE_P(
    All, PolicyGpu,
    testing::Values(
        PolicyCase{"dense", {}}, PolicyCase{"probe", {{"density", 0.3}}},
        PolicyCase{"headwater", {{"threshold", 0.6}, {"window_blocks", 2}, {"dense_below_tokens", 0}}},
        PolicyCase{"headwater", {{"dense_below_tokens", 0}}, 1, 8, 2, 64},
        PolicyCase{"headwater",
                   {{"dense_below_tokens", 0}, {"window_blocks", 1}, {"correction", 0}},
                   1025,
                   6,
                   2,
                   64},
        PolicyCase{"headwater", {}}, PolicyCase{"flash", {{"alpha", 0.7}}},
        PolicyCase{"flash", {{"alpha", 0.5}}, 1025, 6, 2, 64}, PolicyCase{"flash2", {{"alpha", 0.7}}},
        PolicyCase{"flash2", {{"alpha", 0.9}}, 1300, 3, 1, 64},
        PolicyCase{"flex", {{"gamma", 0.3}, {"min_budget_tokens", 128}}},
        PolicyCase{"flex", {{"gamma", 0.5}, {"tau", 0.6}, {"min_budget_tokens", 128}}, 1025, 6, 2, 64},
        PolicyCase{"share", {{"min_budget_tokens", 128}}},
        PolicyCase{"share",
                   {{"gamma", 0.3}, {"pivots_per_layer", 2}, {"query_aware", 0}, {"min_budget_tokens", 128}}},
        PolicyCase{"share",
                   {{"gamma", 0.5}, {"pivots_per_layer", 1}, {"similarity", 1}, {"min_budget_tokens", 128}},
                   1025,
                   6,
                   2,
                   64},
        PolicyCase{"xattention", {{"threshold", 0.5}}},
        PolicyCase{"xattention", {{"threshold", 0.3}, {"stride", 8}}, 1025, 6, 2, 64},
        PolicyCase{"skeleton", {}}, PolicyCase{"skeleton", {{"epsilon", 100}}, 1025, 6, 2, 64}));

// A head's lists do not depend on what other heads are told.
TEST(HeadwaterGpu, HeadsHaveThresholdsAndWindowsOfTheirOwn) {
  HW_REQUIRE_SM90();
  const PolicyCase c{"headwater", {}, 5000, 8, 4, 128};
  Problem problem(ProblemOf(c), 11);
  DeviceProblem device(problem);
  HeadwaterParameters parameters;
  parameters.dense_below_tokens = 0;
  const auto lists = [&](const HeadwaterParameters& p, int layer) {
    Runner runner(p, ShapeOf(c), c.tokens);
    CudaSelection selection;
    const Status status = runner.Run(layer, device, &selection);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    Problem under = problem;
    TakeLists(selection, &under);
    std::vector<std::vector<int32_t>> made;
    for (size_t i = 0; i < under.counts.size(); ++i) {
      made.emplace_back();
      if (under.counts[i] < 0) made.back().push_back(-1);
      for (int32_t at = 0; at < under.counts[i]; ++at)
        made.back().push_back(under.blocks[under.offsets[i] + at]);
    }
    return made;
  };
  const float thresholds[] = {0.5f, 0.0f, 2.0f, 0.8f};
  const int32_t windows[] = {1, 4, 9, 16};
  parameters.thresholds.assign(6 * 4, 0.3f);
  parameters.windows.assign(6 * 4, 2);
  std::copy(thresholds, thresholds + 4, parameters.thresholds.begin() + 5 * 4);
  std::copy(windows, windows + 4, parameters.windows.begin() + 5 * 4);
  const auto own = lists(parameters, 5);
  const size_t tiles = own.size() / 4;
  for (const size_t head : {size_t{0}, size_t{3}}) {
    HeadwaterParameters alone;
    alone.dense_below_tokens = 0;
    alone.threshold = thresholds[head];
    alone.window_blocks = windows[head];
    const auto wanted = lists(alone, 0);
    for (size_t tile = 0; tile < tiles; ++tile)
      EXPECT_EQ(own[head * tiles + tile], wanted[head * tiles + tile]);
  }
  for (size_t tile = 0; tile < tiles; ++tile) {
    EXPECT_EQ(own[tiles + tile], std::vector<int32_t>{-1}) << "dense head, tile " << tile;
    const auto first = static_cast<int32_t>(tile) * 64;
    if (first + 64 > c.tokens - parameters.dense_last_tokens) continue;
    const int32_t total = (std::min(first + 64, c.tokens) + 127) / 128, complete = (first + 1) / 128;
    std::vector<int32_t> local;
    for (int32_t block = 0; block < total; ++block) {
      if (block < parameters.sink_blocks || block >= std::min(total - windows[2], complete))
        local.push_back(block);
    }
    EXPECT_EQ(own[2 * tiles + tile], local) << "local head, tile " << tile;
  }
  const float unsearched[] = {2.0f, 0.0f, 2.0f, 0.0f};
  std::copy(unsearched, unsearched + 4, parameters.thresholds.begin() + 5 * 4);
  const auto none = lists(parameters, 5);
  for (size_t i = tiles; i < 3 * tiles; ++i)
    EXPECT_EQ(none[i], own[i]) << "with no head searched, list " << i;
}

TEST(DenseBelowGpu, ShortPromptsAreDenseAndTakeNoMemory) {
  HW_REQUIRE_SM90();
  const PolicyCase c{"share", {{"pivots_per_layer", 1}, {"dense_below_tokens", 3001}}};
  PolicyParameters parameters;
  ASSERT_TRUE(ParsePolicyParameters(c.policy, c.parameters, &parameters).ok());
  Problem problem(ProblemOf(c), 5);
  DeviceProblem device(problem);
  Runner runner(parameters, ShapeOf(c), c.tokens);
  EXPECT_EQ(runner.policy->MemoryBytes(3000), 0u);
  EXPECT_GT(runner.policy->MemoryBytes(3001), 0u);
  EXPECT_FALSE(runner.policy->wants_lse());
  CudaSelection selection;
  ASSERT_TRUE(runner.Run(0, device, &selection).ok());
  EXPECT_EQ(selection.lists.num_lists, 0);
  std::vector<double> out, lse;
  problem.Reference(&out, &lse);
  EXPECT_LE(RelativeError(ToFloat(device.out.Host()), out), kRelativeError);
}

TEST(PolicyGpuRefusals, NamesWhatIsWrong) {
  HW_REQUIRE_SM90();
  const PolicyCase c{"headwater", {}};
  HeadwaterParameters parameters;
  std::unique_ptr<CudaPolicy> policy;
  parameters.thresholds.assign(3, 0.1f);
  EXPECT_NE(MakeCudaPolicy(parameters, ShapeOf(c), &policy).message().find("3 thresholds or windows; 12"),
            std::string::npos);
  parameters.thresholds.clear();
  ASSERT_TRUE(MakeCudaPolicy(parameters, ShapeOf(c), &policy).ok());
  CudaSelection selection;
  EXPECT_EQ(policy->Select({0, nullptr, nullptr, nullptr}, nullptr, &selection).code(),
            StatusCode::kInvalidArgument);
  const int64_t tokens = std::max<int64_t>(10000, parameters.dense_below_tokens);  // dense wants no memory
  EXPECT_EQ(policy->Begin(tokens, nullptr, 0, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(policy->Begin(0, nullptr, 0, nullptr).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace headwater::kernels
