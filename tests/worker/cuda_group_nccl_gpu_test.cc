// The loop of two ranks on two GPUs against one rank's.
#include <string>
#include <thread>
#include <vector>

#include "tests/kernels/cuda/gpu.h"
#include "tests/worker/cuda_group_runs.h"
#include "tests/worker/nccl_ranks.h"

namespace headwater {
namespace {

using testing::CheckpointShape;
using testing::GroupRun;
using testing::RandomTokens;

// bf16 of products whose sizes differ.
constexpr double kTolerance = 1e-3;

class CudaGroupNcclGpuTest : public testing::CudaGroupTest {
 protected:
  void LoadOnTwoGpus(int num_layers) {
    CheckpointShape shape;
    shape.num_layers = num_layers;
    Load(shape, 2, [](int rank) { return rank; });
  }

  std::vector<std::unique_ptr<DeviceGroup>> MakeGroup() {
    testing::NcclPair pair = testing::MakeNcclPair(server_, absl::Seconds(10));
    std::vector<std::unique_ptr<DeviceGroup>> group;
    for (auto& rank : pair.ranks) group.push_back(std::move(rank));
    return group;
  }

  testing::RendezvousServer server_;
};

TEST_F(CudaGroupNcclGpuTest, EqualsOneRank) {
  HW_REQUIRE_TWO_GPUS();
  HW_REQUIRE_SM90();
  LoadOnTwoGpus(3);
  for (const int count : {1, 129, 5000}) {
    const std::vector<int32_t> tokens = RandomTokens(count, 512);
    for (const v1::Partition partition : {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG}) {
      for (const char* const policy : {"dense", "probe", "headwater"}) {
        for (const v1::Strategy strategy : {v1::STRATEGY_ALLGATHER, v1::STRATEGY_RING}) {
          SCOPED_TRACE(absl::StrCat(count, " tokens, ", v1::Partition_Name(partition), ", ",
                                    v1::Strategy_Name(strategy), ", ", policy));
          GroupRun run;
          run.world_size = 2;
          run.partition = partition;
          run.strategy = strategy;
          run.block_tokens = 128;
          run.wire = v1::KV_DTYPE_BF16;
          run.policy = policy;
          if (run.policy != "dense") run.parameters = {{"dense_below_tokens", 0}, {"threshold", 0.3}};
          if (run.policy == "headwater" && strategy == v1::STRATEGY_RING) continue;
          run.measure_link = count == 5000;
          ExpectEqualsOneRank(
              tokens, run, [this](int) { return MakeGroup(); }, kTolerance);
        }
      }
    }
  }
}

TEST_F(CudaGroupNcclGpuTest, OneRanksEndEndsTheOther) {
  HW_REQUIRE_TWO_GPUS();
  HW_REQUIRE_SM90();
  LoadOnTwoGpus(6);
  GroupRun run;
  run.world_size = 2;
  run.block_tokens = 128;
  run.on_layer = [](int rank, JobControl* control, const PrefillProgress& progress) {
    if (rank == 1 && progress.layers_done == 2) control->Cancel(absl::CancelledError("test"));
  };
  const auto make = [this](int) { return MakeGroup(); };
  const auto got = Run(RandomTokens(2000, 512), run, make);
  EXPECT_EQ(got->statuses[1].code(), absl::StatusCode::kCancelled) << got->statuses[1];
  EXPECT_EQ(got->statuses[0].code(), absl::StatusCode::kUnavailable) << got->statuses[0];
  run.on_layer = nullptr;
  ExpectEqualsOneRank(RandomTokens(2000, 512), run, make, kTolerance);
}

}  // namespace
}  // namespace headwater
