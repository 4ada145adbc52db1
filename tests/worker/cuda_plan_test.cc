// The memory plan of a prompt on a GPU: pure arithmetic, no GPU.
#include "worker/cuda/cuda_plan.h"

#include "gtest/gtest.h"

#include "worker/cuda/cuda_checkpoints.h"
#include "worker/cuda/cuda_sequences.h"

namespace headwater {
namespace {

ModelConfig Llama8b() {
  ModelConfig config;
  config.num_layers = 32;
  config.hidden_size = 4096;
  config.intermediate_size = 14'336;
  config.num_q_heads = 32;
  config.num_kv_heads = 8;
  config.head_dim = 128;
  config.vocab_size = 128'256;
  return config;
}

TEST(CudaPrefillPlan, AMillionTokensOfAnEightBillionModelFitBesideItsWeights) {
  constexpr uint64_t kGiB = 1 << 30;
  const CudaPrefillPlan plan = PlanCudaPrefill(Llama8b(), 8192, 1 << 20);
  EXPECT_EQ(plan.hidden, 16 * kGiB);
  EXPECT_EQ(plan.q, 8 * kGiB);
  EXPECT_EQ(plan.kv, 4 * kGiB);
  EXPECT_EQ(plan.num_kv, 2);
  EXPECT_GE(plan.total_bytes(), 32 * kGiB);
  EXPECT_LE(plan.total_bytes(), 33 * kGiB);
}

TEST(CudaPrefillPlan, ListsAreBounded) {
  constexpr uint64_t kMiB = 1 << 20;
  EXPECT_LE(PlanCudaPattern(Llama8b(), 1 << 20).total_bytes(), 160 * kMiB);
  EXPECT_LE(PlanCudaPattern(Llama8b(), 1000).total_bytes(), kMiB);
}

TEST(CudaPrefillPlan, PackedPromptsHaveLogitsEachAndNoLists) {
  const CudaPrefillPlan one = PlanCudaPrefill(Llama8b(), 8192, 8192),
                        packed = PlanCudaPrefill(Llama8b(), 8192, 8192, 7);
  EXPECT_EQ(packed.logits, 7 * one.logits);
  EXPECT_EQ(packed.positions, uint64_t{8192 * 4});
  EXPECT_EQ(packed.pattern.total_bytes(), 0);
  EXPECT_GT(one.pattern.total_bytes(), 0);
}

TEST(CudaPrefillPlan, APolicysMemoryIsItsOwnAndWhatItsMeasurementTakes) {
  constexpr uint64_t kMiB = 1 << 20;
  std::unique_ptr<kernels::CudaPolicy> policy;
  ASSERT_TRUE(
      kernels::MakeCudaPolicy(kernels::HeadwaterParameters{}, CudaPolicyShapeOf(Llama8b()), &policy).ok());
  const CudaPolicyPlan plan = PlanCudaPolicy(*policy, Llama8b(), 1 << 17);
  EXPECT_EQ(plan.policy, policy->MemoryBytes(1 << 17));
  EXPECT_GT(plan.policy, 16 * kMiB);
  EXPECT_LT(plan.policy, 128 * kMiB);
  EXPECT_EQ(plan.mass, uint64_t{512} * 32 * 1024 * 4);
  EXPECT_EQ(PlanCudaPolicy(*policy, Llama8b(), 1 << 20).sampled_rows, 64) << "masses of 64 MiB";
  EXPECT_EQ(plan.lse + plan.out, 0u) << "headwater wants no sums";
  const uint64_t without = PlanCudaPrefill(Llama8b(), 8192, 1 << 17).total_bytes();
  EXPECT_EQ(PlanCudaPrefill(Llama8b(), 8192, 1 << 17, 1, plan).total_bytes(), without + plan.total_bytes());
  EXPECT_EQ(CudaPolicyPlan{}.total_bytes(), 0u);
}

TEST(CudaPrefillPlan, OfARankHasItsRowsAndAllKeys) {
  const CudaPrefillPlan all = PlanCudaPrefill(Llama8b(), 8192, 1 << 20),
                        half = PlanCudaPrefill(Llama8b(), 8192, 1 << 20, 1, {}, 1 << 19),
                        none = PlanCudaPrefill(Llama8b(), 8192, 1 << 20, 1, {}, 0);
  EXPECT_EQ(half.hidden, all.hidden / 2);
  EXPECT_EQ(half.q, all.q / 2);
  EXPECT_EQ(half.kv, all.kv);
  EXPECT_EQ(none.hidden + none.q, 0u);
  EXPECT_EQ(none.kv, all.kv);
}

TEST(CudaPrefillPlan, DoesNotDependOnTheNumberOfLayers) {
  ModelConfig deep = Llama8b();
  deep.num_layers = 320;
  EXPECT_EQ(PlanCudaPrefill(deep, 8192, 100'000).total_bytes(),
            PlanCudaPrefill(Llama8b(), 8192, 100'000).total_bytes());
}

TEST(CudaPrefillPlan, OfAPartHasAllQueriesAndItsOwnLists) {
  constexpr int64_t kTokens = 1 << 17;
  kernels::PolicyParameters parameters;
  ASSERT_TRUE(kernels::ParsePolicyParameters("flex", {}, &parameters).ok());
  std::unique_ptr<kernels::CudaPolicy> policy;
  ASSERT_TRUE(kernels::MakeCudaPolicy(parameters, CudaPolicyShapeOf(Llama8b()), &policy).ok());
  const CudaPolicyPlan whole = PlanCudaPolicy(*policy, Llama8b(), kTokens),
                       part = PlanCudaPolicyOfPart(*policy, Llama8b(), kTokens);
  EXPECT_EQ(part.policy, whole.policy) << "it selects for the whole prompt";
  EXPECT_EQ(whole.part, 0u);
  // A count and an offset of every query head's tile, for either kind of lists.
  EXPECT_GE(part.part, uint64_t{32} * (kTokens / 128) * 12);
  EXPECT_GE(part.total_bytes() - whole.total_bytes(), uint64_t{32} * (kTokens / 128) * 12);
  EXPECT_EQ(AllQueryBytes(Llama8b(), kTokens), uint64_t{4096} * 2 * kTokens);
  CudaPrefillPlan pass = PlanCudaPrefill(Llama8b(), 8192, kTokens, 1, part, kTokens / 2);
  const uint64_t before = pass.total_bytes();
  pass.all_q = AllQueryBytes(Llama8b(), kTokens);
  pass.checkpoints = 1000;
  EXPECT_EQ(pass.total_bytes(), before + pass.all_q + 1024);
}

TEST(CudaCheckpointsTest, TakeACopyAndASliceOnTheDeviceAndFourStatesOnTheHost) {
  EXPECT_EQ(CheckpointSlices(1, 32), 1);
  EXPECT_EQ(CheckpointSlices(3, 32), 1);
  EXPECT_EQ(CheckpointSlices(8, 32), 6);
  EXPECT_EQ(CheckpointSlices(8, 10), 1) << "the first one leaves in time";
  EXPECT_EQ(CheckpointSlices(1000, 32), 1);
  EXPECT_EQ(CheckpointSlices(20, 80), 8);
  constexpr uint64_t kRow = 4096 * sizeof(float);
  EXPECT_EQ(CheckpointDeviceBytes(6000, 6000, 4096, 8, 32), (6000 + 1000) * kRow);
  EXPECT_EQ(CheckpointDeviceBytes(0, 6001, 4096, 8, 32), 1001 * kRow);
  // Own and left neighbour's rows, twice: rank 0 of the first two keeps 300 and 100.
  EXPECT_EQ(CheckpointHostBytes({{{0, 300}}, {{300, 400}}, {}}, 4096), 2 * 400 * kRow);
}

TEST(CudaRankTest, WhoSharesAndWhatAPartTakes) {
  const auto parameters_of = [](const std::string& name) {
    kernels::PolicyParameters parameters;
    EXPECT_TRUE(kernels::ParsePolicyParameters(name, {}, &parameters).ok());
    return parameters;
  };
  ModelConfig three = Llama8b();  // query heads a KV head, of which 128 is no multiple
  three.num_q_heads = 24;
  for (const char* const name : {"dense", "probe", "headwater"}) {
    EXPECT_TRUE(MayShare(Llama8b(), parameters_of(name))) << name;
    EXPECT_TRUE(MayShare(three, parameters_of(name))) << name;
  }
  for (const char* const name : {"flash", "flash2", "flex", "share", "skeleton", "xattention"}) {
    EXPECT_TRUE(MayShare(Llama8b(), parameters_of(name))) << name;
    EXPECT_FALSE(MayShare(three, parameters_of(name))) << name;
  }
  for (const char* const name : {"a_shape", "vertical_slash"}) {
    EXPECT_FALSE(MayShare(Llama8b(), parameters_of(name))) << name;
  }

  constexpr int64_t kTokens = 1 << 17;
  const auto plan = [&](const char* name, const CudaRankSize& size) {
    auto planned = PlanCudaRank(Llama8b(), 8192, parameters_of(name), size);
    EXPECT_TRUE(planned.ok()) << planned.status();
    return *planned;
  };
  const CudaRankSize half{kTokens, kTokens / 2, kTokens / 2, 2, 8};
  EXPECT_EQ(plan("flex", {kTokens, kTokens, kTokens}).all_q, 0u);
  EXPECT_EQ(plan("flex", half).all_q, AllQueryBytes(Llama8b(), kTokens));
  EXPECT_EQ(plan("headwater", half).all_q, 0u);
  EXPECT_GT(plan("dense", half).checkpoints, 0u);
  const int64_t little = kLeastCheckpointTokens - 1;
  EXPECT_EQ(plan("dense", {little, little / 2, little / 2 + 1, 2, 8}).checkpoints, 0u) << "it takes none";
  EXPECT_EQ(plan("dense", {kTokens, kTokens, kTokens, 1, 8}).checkpoints, 0u);
}

TEST(QueriesOfCallTest, CallsTakeAboutAsLongAndNoneIsShort) {
  constexpr double kFlopPerPair = 4 * 4096;
  constexpr int64_t kMost = 1 << 17;
  for (const double density : {1.0, 0.3, 0.01}) {
    for (const TokenRange range :
         {TokenRange{0, 1}, TokenRange{0, 1000}, TokenRange{0, 1 << 20}, TokenRange{786432, 1048576},
          TokenRange{786432, 1048577}, TokenRange{1 << 19, 786432}, TokenRange{0, 200'000}}) {
      std::vector<int64_t> counts;
      for (int64_t begin = range.begin; begin < range.end; begin += counts.back()) {
        const int64_t count = QueriesOfCall(kFlopPerPair * density, begin, range.end, kMost);
        ASSERT_GT(count, 0);
        ASSERT_LE(count, std::min(kMost, range.end - begin));
        if (begin + count < range.end) {
          EXPECT_EQ(count % 128, 0);
          EXPECT_GE(count, kLeastQueries);
        }
        counts.push_back(count);
        if (count > kLeastQueries * 2) {
          const double pairs = static_cast<double>(count) * static_cast<double>(begin + count / 2);
          EXPECT_LE(pairs * kFlopPerPair * density, 1.8 * 12e12);
        }
      }
      if (counts.size() > 1) {
        EXPECT_GE(counts.back(), counts[counts.size() - 2] / 2 - 128) << range.begin;
      }
    }
  }
  // What fits is asked for before the rest is looked at.
  const auto fit = [](int64_t count) { return count / 16384 * 16384; };
  EXPECT_EQ(QueriesOfCall(kFlopPerPair * 0.01, 1 << 20, 2 << 20, kMost, fit) % 16384, 0);
  EXPECT_EQ(QueriesOfCall(kFlopPerPair * 0.01, (2 << 20) - 1000, 2 << 20, kMost, fit), 1000);
  // Without the rule the last call would have 20,480.
  EXPECT_EQ(QueriesOfCall(kFlopPerPair * 0.01, 954624, 1 << 20, kMost), (1 << 20) - 954624);
}

}  // namespace
}  // namespace headwater
