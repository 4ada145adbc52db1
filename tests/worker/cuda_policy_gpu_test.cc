// Every policy of kernels/cuda/policy.h in the loop on a GPU, and the quality that a job is bound to.
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"
#include "tests/model/random_checkpoint.h"
#include "tests/worker/memory_sink.h"
#include "tests/worker/prefill_group.h"
#include "worker/cuda/cuda_policy_pass.h"
#include "worker/cuda/cuda_prefill.h"
#include "worker/cuda/cuda_sequences.h"

namespace headwater {
namespace {

using testing::CheckpointShape;
using testing::GroupRun;
using testing::KvCapture;
using testing::MemorySink;
using testing::RandomTokens;
using testing::RelativeError;

constexpr int32_t kLayers = 4, kKvHeads = 2;

class CudaPolicyGpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    HW_REQUIRE_SM90();
    CheckpointShape shape;
    shape.num_layers = kLayers;
    shape.num_q_heads = 8;
    shape.num_kv_heads = kKvHeads;
    shape.head_dim = 128;
    testing::WriteRandomCheckpoint(folder_.path(), shape, 3);
    auto host = Model::Load({folder_.path(), kernels::DType::kF32, 0});
    ASSERT_TRUE(host.ok()) << host.status();
    host_ = *std::move(host);
    auto device = CudaModel::Load({folder_.path(), 0, 3, 0, 8192});
    ASSERT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
    auto egress = CudaEgressMemory::Allocate();
    ASSERT_TRUE(egress.ok()) << egress.status();
    egress_ = *std::move(egress);
  }

  struct Outcome {
    explicit Outcome(const KvGeometry& geometry) : kv(geometry) {}
    KvCapture kv;
    absl::StatusOr<PrefillResult> result;
    KvDigest digest;

    const v1::AttentionReport& report() const { return *result->attention_report; }
  };

  std::unique_ptr<Outcome> Run(int tokens, const std::string& policy,
                               const std::map<std::string, double>& parameters,
                               const QualityBound& quality = {}, bool measure = false,
                               ComputeSpeed* speed = nullptr) {
    GroupRun run;
    run.block_tokens = 256;
    run.wire = v1::KV_DTYPE_BF16;
    run.policy = policy;
    run.parameters = parameters;
    PrefillJob job = testing::MakeJob(*host_, RandomTokens(tokens, 512), run, 0);
    job.quality = quality;
    auto outcome = std::make_unique<Outcome>(*job.geometry);
    MemorySink sink(&outcome->kv, run.sink);
    JobControl control;
    const CudaPrefillPrompt prompt{&job, &sink, &control, {}};
    outcome->result =
        std::move(RunCudaPrefill({&prompt, 1}, {device_.get(), egress_.get(), nullptr, measure, speed})[0]);
    if (outcome->result.ok()) {
      EXPECT_TRUE(sink.Finish().ok());
      EXPECT_THAT(outcome->kv.times(), ::testing::Each(1)) << policy;
    }
    outcome->digest = sink.Stats().digest;
    return outcome;
  }

  testing::TempDir folder_;
  std::unique_ptr<Model> host_;
  std::unique_ptr<CudaModel> device_;
  std::unique_ptr<CudaEgressMemory> egress_;
};

TEST_F(CudaPolicyGpuTest, EveryPolicyRunsAndSaysWhatItRead) {
  for (const std::string& name : kernels::PolicyNames()) {
    if (name == "dense" || name == "probe") continue;
    SCOPED_TRACE(name);
    const std::map<std::string, double> searched = {{"dense_below_tokens", 0}};
    const auto got = Run(9000, name, searched), again = Run(9000, name, searched);
    ASSERT_TRUE(got->result.ok()) << got->result.status();
    EXPECT_EQ(got->digest.Bytes(), again->digest.Bytes());
    EXPECT_EQ(got->report().policy(), name);
    EXPECT_GT(got->report().density(), 0);
    EXPECT_LE(got->report().density(), 1);
    EXPECT_THAT(got->report().groups_size(), ::testing::AnyOf(kLayers - 1, (kLayers - 1) * kKvHeads));
    for (const v1::AttentionGroup& group : got->report().groups()) {
      EXPECT_GT(group.density(), 0);
      EXPECT_LE(group.density(), 1);
    }
  }
}

// Where everything is read, attention is exact.
TEST_F(CudaPolicyGpuTest, PoliciesThatReadEverythingEqualTheCpu) {
  const auto wanted = testing::RunGroup(*host_, RandomTokens(1500, 512), [] {
    GroupRun run;
    run.block_tokens = 256;
    run.wire = v1::KV_DTYPE_BF16;
    return run;
  }());
  const std::vector<std::pair<std::string, std::map<std::string, double>>> rows = {
      {"headwater", {{"window_blocks", 1000}, {"dense_below_tokens", 0}}},
      {"headwater", {}},
      {"flash2", {{"window_blocks", 1000}, {"dense_below_tokens", 0}}},
      {"flash", {{"window_blocks", 1000}, {"dense_below_tokens", 0}}},
      {"a_shape", {{"window_tokens", 4000}, {"dense_below_tokens", 0}}}};
  for (const auto& [name, parameters] : rows) {
    SCOPED_TRACE(name);
    const auto got = Run(1500, name, parameters);
    ASSERT_TRUE(got->result.ok()) << got->result.status();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
        EXPECT_LE(RelativeError(got->kv.Tensor(layer, kind), wanted->kv.Tensor(layer, kind)), 2e-2)
            << "layer " << layer;
      }
    }
    EXPECT_NEAR(got->report().density(), 1, 1e-9);
    const bool is_short = parameters.empty();
    EXPECT_EQ(got->report().fallback(),
              is_short ? v1::ATTENTION_FALLBACK_DENSE_SHORT_PROMPT : v1::ATTENTION_FALLBACK_UNSPECIFIED);
  }
}

TEST_F(CudaPolicyGpuTest, GroupsShortOfRecallReadMoreOrGoDense) {
  QualityBound quality;
  quality.min_recall = 0.95;
  // Sinks, window and the best block of nearly even attention hold little of it.
  const auto got = Run(12'000, "headwater", {{"threshold", 1}, {"dense_below_tokens", 0}}, quality);
  const auto free = Run(12'000, "headwater", {{"threshold", 1}, {"dense_below_tokens", 0}});
  ASSERT_TRUE(got->result.ok()) << got->result.status();
  ASSERT_TRUE(free->result.ok()) << free->result.status();

  const v1::AttentionReport& report = got->report();
  EXPECT_EQ(report.sampled_queries(), 128u);
  EXPECT_GE(report.recall_mean(), 0.95);
  EXPECT_GT(report.density(), free->report().density());
  ASSERT_EQ(report.groups_size(), (kLayers - 1) * kKvHeads);
  uint32_t rounds = 0;
  for (const v1::AttentionGroup& group : report.groups()) {
    SCOPED_TRACE(group.DebugString());
    EXPECT_GE(group.recall(), 0.95);
    EXPECT_LE(group.rounds(), 2u) << "the threshold that was found is enough";
    const bool dense = group.fallback() == v1::ATTENTION_FALLBACK_DENSE_RECALL;
    EXPECT_EQ(dense, group.threshold() == 0);
    if (dense) {
      EXPECT_NEAR(group.density(), 1, 1e-9);
    }
    rounds += group.rounds();
  }
  EXPECT_GT(rounds, 0u);
  EXPECT_FALSE(free->report().has_recall_mean());
}

TEST_F(CudaPolicyGpuTest, LayersReadNoMoreThanTheBound) {
  QualityBound quality;
  quality.max_density = 0.25;
  const std::map<std::string, double> parameters = {{"threshold", 0.001}};
  const auto natural = Run(20'000, "headwater", parameters),
             got = Run(20'000, "headwater", parameters, quality);
  ASSERT_TRUE(got->result.ok()) << got->result.status();
  EXPECT_GT(natural->report().density(), 0.3) << "the bound binds";
  for (const v1::AttentionGroup& group : got->report().groups()) {
    SCOPED_TRACE(group.DebugString());
    EXPECT_EQ(group.fallback(), v1::ATTENTION_FALLBACK_DENSITY_BOUND);
    EXPECT_LE(group.density(), 0.26);
    EXPECT_GE(group.density(), 0.2);
    EXPECT_LE(group.rounds(), 3u);
    EXPECT_FALSE(group.has_threshold()) << "it was not used";
    EXPECT_GT(group.forced_density(), 0);
    EXPECT_LE(group.forced_density(), 0.25);
    EXPECT_EQ(group.no_room_tiles(), 0u);
  }
  // What no list can be shorter than.
  quality.max_density = 0.001;
  const auto floor = Run(20'000, "headwater", parameters, quality);
  ASSERT_TRUE(floor->result.ok()) << floor->result.status();
  for (const v1::AttentionGroup& group : floor->report().groups()) {
    EXPECT_EQ(group.fallback(), v1::ATTENTION_FALLBACK_DENSITY_FLOOR);
  }
}

TEST_F(CudaPolicyGpuTest, ATimeBudgetBecomesADensityOrIsRefused) {
  constexpr int kTokens = 20'000;
  const LayerWork work = WorkOf(host_->config(), kTokens);
  QualityBound quality;
  quality.time_budget = absl::Nanoseconds(1);
  ComputeSpeed speed;
  const auto refused = Run(kTokens, "headwater", {}, quality, false, &speed);
  EXPECT_EQ(refused->result.status().code(), absl::StatusCode::kFailedPrecondition)
      << refused->result.status();
  EXPECT_EQ(ReasonOf(refused->result.status()), v1::ERROR_REASON_TIME_BUDGET_TOO_SHORT);

  // So slow that the budget, a minute, is that of density 0.3: the real device takes milliseconds.
  speed.linear = 1e30;
  const double slow = speed.attention = kLayers * 0.3 * work.dense_attention / 60;
  quality.time_budget = absl::Minutes(1);
  const auto bound = Run(kTokens, "headwater", {{"threshold", 0.001}}, quality, false, &speed);
  ASSERT_TRUE(bound->result.ok()) << bound->result.status();
  EXPECT_NEAR(bound->report().groups(0).density(), 0.3, 0.02);
  EXPECT_EQ(bound->report().groups(0).fallback(), v1::ATTENTION_FALLBACK_DENSITY_BOUND);
  EXPECT_GT(speed.attention, 2 * slow) << "the layers that ran were measured";
}

TEST_F(CudaPolicyGpuTest, MeasuringChangesNothing) {
  const auto plain = Run(40'000, "headwater", {}), measured = Run(40'000, "headwater", {}, {}, true);
  ASSERT_TRUE(measured->result.ok()) << measured->result.status();
  EXPECT_EQ(measured->digest.Bytes(), plain->digest.Bytes());
  EXPECT_EQ(measured->report().density(), plain->report().density());
  EXPECT_FALSE(plain->report().has_recall_mean());
  ASSERT_TRUE(measured->report().has_recall_mean());
  EXPECT_GT(measured->report().recall_mean(), 0);
  EXPECT_LE(measured->report().recall_mean(), 1.001);
  EXPECT_LE(measured->report().recall_p1(), measured->report().recall_mean());
}

}  // namespace
}  // namespace headwater
