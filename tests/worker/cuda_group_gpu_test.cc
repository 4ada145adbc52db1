// The loop of several ranks, which share one GPU here, against one rank's.
#include <string>
#include <vector>

#include "tests/kernels/cuda/gpu.h"
#include "tests/worker/cuda_group_runs.h"
#include "tests/worker/local_device_group.h"

namespace headwater {
namespace {

using testing::CheckpointShape;
using testing::GroupRun;
using testing::MakeLocalDeviceGroup;
using testing::RandomTokens;

// bf16 of products whose sizes differ.
constexpr double kTolerance = 1e-3;

class CudaGroupGpuTest : public testing::CudaGroupTest {
 protected:
  void LoadOnOneGpu(int num_ranks, int num_layers = 3) {
    CheckpointShape shape;
    shape.num_layers = num_layers;
    Load(shape, num_ranks, [](int) { return 0; });
  }
};

TEST_F(CudaGroupGpuTest, EqualsOneRank) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(3);
  for (const int count : {1, 129, 700, 2049, 5000}) {
    const std::vector<int32_t> tokens = RandomTokens(count, 512);
    for (const int world_size : {2, 3}) {
      for (const v1::Partition partition :
           {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED}) {
        for (const char* const policy : {"dense", "probe"}) {
          for (const v1::Strategy strategy : {v1::STRATEGY_ALLGATHER, v1::STRATEGY_RING}) {
            SCOPED_TRACE(absl::StrCat(count, " tokens, ", world_size, " ranks, ",
                                      v1::Partition_Name(partition), ", ", v1::Strategy_Name(strategy), ", ",
                                      policy));
            GroupRun run;
            run.world_size = world_size;
            run.partition = partition;
            run.strategy = strategy;
            run.block_tokens = 128;
            run.wire = v1::KV_DTYPE_BF16;
            run.policy = policy;
            if (run.policy == "probe") run.parameters = {{"dense_below_tokens", 0}, {"threshold", 0.3}};
            ExpectEqualsOneRank(tokens, run, MakeLocalDeviceGroup, kTolerance);
          }
        }
      }
    }
  }
}

TEST_F(CudaGroupGpuTest, TheSameRunTwiceIsBitwiseEqual) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(2);
  GroupRun run;
  run.world_size = 2;
  run.partition = v1::PARTITION_ZIGZAG;
  run.block_tokens = 256;
  const std::vector<int32_t> tokens = RandomTokens(3000, 512);
  EXPECT_TRUE(Run(tokens, run, MakeLocalDeviceGroup)->kv.bytes() ==
              Run(tokens, run, MakeLocalDeviceGroup)->kv.bytes());
}

TEST_F(CudaGroupGpuTest, OneRanksEndEndsAll) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(2, 6);
  GroupRun run;
  run.world_size = 2;
  run.block_tokens = 128;
  run.on_layer = [](int rank, JobControl* control, const PrefillProgress& progress) {
    if (rank == 1 && progress.layers_done == 2) control->Cancel(absl::CancelledError("test"));
  };
  const auto got = Run(RandomTokens(2000, 512), run, MakeLocalDeviceGroup);
  EXPECT_EQ(got->statuses[1].code(), absl::StatusCode::kCancelled) << got->statuses[1];
  EXPECT_EQ(got->statuses[0].code(), absl::StatusCode::kUnavailable) << got->statuses[0];
  // The GPU is whole.
  run.on_layer = nullptr;
  ExpectEqualsOneRank(RandomTokens(2000, 512), run, MakeLocalDeviceGroup, kTolerance);
}

TEST_F(CudaGroupGpuTest, RefusesWhatItDoesNotShare) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(2);
  const std::vector<int32_t> tokens = RandomTokens(600, 512);
  GroupRun run;
  run.world_size = 2;
  run.block_tokens = 64;
  EXPECT_THAT(Run(tokens, run, MakeLocalDeviceGroup)->statuses,
              ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kUnimplemented)));
  run.block_tokens = 128;
  run.policy = "flash";
  run.parameters = {{"dense_below_tokens", 0}};
  EXPECT_THAT(Run(tokens, run, MakeLocalDeviceGroup)->statuses,
              ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kUnimplemented)));
  run = {};
  run.world_size = 2;
  run.block_tokens = 128;
  run.strategy = v1::STRATEGY_SPARSE;
  EXPECT_THAT(Run(tokens, run, MakeLocalDeviceGroup)->statuses,
              ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kUnimplemented)));
  // Ranks of different prompts.
  run = {};
  run.world_size = 2;
  run.block_tokens = 128;
  run.change_job = [](int rank, PrefillJob* job) { job->tokens[0] = rank; };
  EXPECT_THAT(
      Run(tokens, run, MakeLocalDeviceGroup)->statuses,
      ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kFailedPrecondition)));
}

}  // namespace
}  // namespace headwater
