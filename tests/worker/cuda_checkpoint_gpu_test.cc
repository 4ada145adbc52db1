// Checkpoints of ranks that share one GPU, and what goes on from them.
#include <cstring>
#include <string>
#include <vector>

#include "absl/time/clock.h"

#include "tests/kernels/cuda/gpu.h"
#include "tests/worker/cuda_group_runs.h"

namespace headwater {
namespace {

using testing::CheckpointShape;
using testing::GroupResult;
using testing::GroupRun;
using testing::MakeOneGpuGroup;
using testing::RandomTokens;
using testing::RelativeError;

constexpr int32_t kLayers = 9;
constexpr int64_t kHidden = 256;  // of CheckpointShape
// bf16 of products whose sizes differ.
constexpr double kTolerance = 1e-3;

class CudaCheckpointGpuTest : public testing::CudaGroupTest {
 protected:
  void SetUp() override {
    HW_REQUIRE_SM90();
    CheckpointShape shape;
    shape.num_layers = kLayers;
    Load(shape, 3, [](int) { return 0; });
  }

  GroupRun RunOf(int world_size, v1::Partition partition, const std::string& policy) {
    GroupRun run;
    run.world_size = world_size;
    run.partition = partition;
    run.strategy = v1::STRATEGY_ALLGATHER;
    run.block_tokens = 128;
    run.wire = v1::KV_DTYPE_BF16;
    run.policy = policy;
    if (policy != "dense") run.parameters = {{"dense_below_tokens", 0}, {"threshold", 0.5}};
    run.checkpoint_layers = 3;
    for (int rank = 0; rank < world_size; ++rank) run.checkpoints.push_back(&stores_[rank]);
    // Layers of this size are enqueued long before the first of them has run, let alone left.
    run.on_layer = [](int, JobControl*, const PrefillProgress&) { absl::SleepFor(absl::Milliseconds(10)); };
    return run;
  }

  // The last rank ends once it has seen a checkpoint of layer 3 that can be gone on from.
  std::unique_ptr<GroupResult> RunUntilCheckpoint(const std::vector<int32_t>& tokens, GroupRun run) {
    run.on_layer = [last = run.world_size - 1](int rank, JobControl* control,
                                               const PrefillProgress& progress) {
      absl::SleepFor(absl::Milliseconds(10));
      if (rank == last && progress.checkpoint.has_value()) control->Cancel(absl::CancelledError("test"));
    };
    return Run(tokens, run, MakeOneGpuGroup);
  }

  CheckpointStore stores_[3];
};

TEST_F(CudaCheckpointGpuTest, NeighboursHoldTheSameRows) {
  const std::vector<int32_t> tokens = RandomTokens(3000, 512);
  for (const int world_size : {2, 3}) {
    const GroupRun run = RunOf(world_size, v1::PARTITION_ZIGZAG, "dense");
    const auto got = Run(tokens, run, MakeOneGpuGroup);
    ASSERT_THAT(got->statuses, ::testing::Each(absl::OkStatus()));
    const auto partition = testing::MakeJob(*host_, tokens, run, 0).partition;
    for (const int32_t layer : {3, 6}) {
      for (int rank = 0; rank < world_size; ++rank) {
        const float* const own = stores_[rank].Find("test", 0, layer, rank);
        const float* const kept = stores_[(rank + 1) % world_size].Find("test", 0, layer, rank);
        ASSERT_TRUE(own != nullptr && kept != nullptr) << "layer " << layer << ", rank " << rank;
        const auto rows = NumTokens(partition[static_cast<size_t>(rank)]);
        EXPECT_EQ(std::memcmp(own, kept, static_cast<size_t>(rows * kHidden) * sizeof(float)), 0);
        double sum = 0;
        for (int64_t i = 0; i < rows * kHidden; ++i) sum += own[i] * own[i];
        EXPECT_GT(sum, 0);
      }
    }
    for (const PrefillResult& result : got->results) {
      ASSERT_TRUE(result.progress.checkpoint.has_value());
      EXPECT_EQ(result.progress.checkpoint->layer, 6u);
      EXPECT_GT(result.progress.checkpoint->share.blocks, 0u);
    }
  }
}

// Of three ranks one is lost, and two go on; of two, one goes on alone.
TEST_F(CudaCheckpointGpuTest, SurvivorsGoOn) {
  const std::vector<int32_t> tokens = RandomTokens(3000, 512);
  for (const int world_size : {2, 3}) {
    for (const char* const policy : {"dense", "headwater"}) {
      SCOPED_TRACE(absl::StrCat(world_size, " ranks, ", policy));
      GroupRun whole = RunOf(1, v1::PARTITION_CONTIGUOUS, policy);
      whole.checkpoints.clear();
      const auto wanted = Run(tokens, whole, MakeOneGpuGroup);
      ASSERT_THAT(wanted->statuses, ::testing::Each(absl::OkStatus()));

      const GroupRun before = RunOf(world_size, v1::PARTITION_ZIGZAG, policy);
      const auto lost = RunUntilCheckpoint(tokens, before);
      EXPECT_THAT(lost->statuses, ::testing::Each(::testing::Not(absl::OkStatus())));
      ResumePoint resume;
      resume.layer = 3;
      resume.partition = testing::MakeJob(*host_, tokens, before, 0).partition;
      // The last rank's rows are with its right neighbour, rank 0.
      for (int rank = 0; rank + 1 < world_size; ++rank) resume.providers.push_back(rank);
      resume.providers.push_back(0);
      GroupRun after = RunOf(world_size - 1, v1::PARTITION_ZIGZAG, policy);
      after.change_job = [&](int, PrefillJob* job) {
        job->epoch = 1;
        job->resume = resume;
      };
      const auto got = Run(tokens, after, MakeOneGpuGroup);
      ASSERT_THAT(got->statuses, ::testing::Each(absl::OkStatus()));
      for (uint32_t layer = 3; layer < kLayers; ++layer) {
        for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
          EXPECT_LE(RelativeError(got->kv.Tensor(layer, kind), wanted->kv.Tensor(layer, kind)), kTolerance)
              << "layer " << layer;
        }
      }
      EXPECT_LE(RelativeError(got->logits, wanted->logits), kTolerance);
      for (const PrefillResult& result : got->results)
        EXPECT_EQ(result.progress.layers_done, uint32_t{kLayers});
    }
  }
}

// Twice from the same checkpoint: the same bits.
TEST_F(CudaCheckpointGpuTest, EqualEpochsGiveEqualBits) {
  const std::vector<int32_t> tokens = RandomTokens(2000, 512);
  std::vector<std::unique_ptr<GroupResult>> runs;
  for (int i = 0; i < 2; ++i) {
    const GroupRun before = RunOf(2, v1::PARTITION_ZIGZAG, "dense");
    (void)RunUntilCheckpoint(tokens, before);
    GroupRun after = RunOf(1, v1::PARTITION_CONTIGUOUS, "dense");
    after.change_job = [&](int, PrefillJob* job) {
      job->epoch = 1;
      job->resume.emplace();
      job->resume->layer = 3;
      job->resume->partition = testing::MakeJob(*host_, tokens, before, 0).partition;
      job->resume->providers = {0, 0};
    };
    runs.push_back(Run(tokens, after, MakeOneGpuGroup));
    ASSERT_THAT(runs.back()->statuses, ::testing::Each(absl::OkStatus()));
  }
  EXPECT_TRUE(runs[0]->kv.bytes() == runs[1]->kv.bytes());
}

}  // namespace
}  // namespace headwater
