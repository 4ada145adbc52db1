// The loop of several ranks, which share one GPU here, against one rank's.
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/cuda/gpu.h"
#include "tests/worker/cuda_group_runs.h"

namespace headwater {
namespace {

using testing::CheckpointShape;
using testing::GroupRun;
using testing::MakeOneGpuGroup;
using testing::RandomTokens;

// bf16 of products whose sizes differ.
constexpr double kTolerance = 1e-3;

// What the ranks of `run` report, which is the same of all layers and heads; and one rank's report.
struct Reports {
  v1::AttentionReport group, alone;
};

class CudaGroupGpuTest : public testing::CudaGroupTest {
 protected:
  // KV as on one rank, too.
  Reports ReportsOf(const std::vector<int32_t>& tokens, const GroupRun& run) {
    Reports reports;
    const auto reported = [](const PrefillResult& result) {
      v1::AttentionReport report = result.attention_report.value_or(v1::AttentionReport());
      report.clear_wait();
      report.clear_density();  // of a rank's own tokens
      return report;
    };
    const auto got = Run(tokens, run, MakeOneGpuGroup);
    EXPECT_THAT(got->statuses, ::testing::Each(absl::OkStatus()));
    reports.group = reported(got->results[0]);
    for (const PrefillResult& result : got->results) {
      EXPECT_EQ(reported(result).SerializeAsString(), reports.group.SerializeAsString());
    }
    GroupRun one = run;
    one.world_size = 1;
    const auto wanted = Run(tokens, one, MakeOneGpuGroup);
    EXPECT_THAT(wanted->statuses, ::testing::Each(absl::OkStatus()));
    reports.alone = reported(wanted->results[0]);
    for (uint32_t layer = 0; layer < static_cast<uint32_t>(host_->config().num_layers); ++layer) {
      EXPECT_LE(
          testing::RelativeError(got->kv.Tensor(layer, KvKind::kK), wanted->kv.Tensor(layer, KvKind::kK)),
          kTolerance)
          << "layer " << layer;
    }
    return reports;
  }

  void LoadOnOneGpu(int num_ranks, int num_layers = 3) {
    CheckpointShape shape;
    shape.num_layers = num_layers;
    Load(shape, num_ranks, [](int) { return 0; });
  }
};

TEST_F(CudaGroupGpuTest, EqualsOneRank) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(8);
  for (const int count : {1, 129, 700, 2049, 5000}) {
    const std::vector<int32_t> tokens = RandomTokens(count, 512);
    for (const int world_size : {2, 3, 8}) {
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
            ExpectEqualsOneRank(tokens, run, MakeOneGpuGroup, kTolerance);
          }
        }
      }
    }
  }
}

GroupRun HeadwaterRun(int world_size, v1::Partition partition) {
  GroupRun run;
  run.world_size = world_size;
  run.partition = partition;
  run.strategy = v1::STRATEGY_ALLGATHER;
  run.block_tokens = 128;
  run.wire = v1::KV_DTYPE_BF16;
  run.policy = "headwater";
  run.parameters = {{"dense_below_tokens", 0}, {"threshold", 0.5}, {"window_blocks", 2}};
  return run;
}

TEST_F(CudaGroupGpuTest, HeadwaterEqualsOneRank) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(3);
  for (const int count : {1, 129, 2049, 6000}) {
    for (const int world_size : {2, 3}) {
      for (const v1::Partition partition :
           {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED}) {
        SCOPED_TRACE(absl::StrCat(count, " tokens, ", world_size, " ranks, ", v1::Partition_Name(partition)));
        const std::vector<int32_t> tokens = RandomTokens(count, 512);
        ExpectEqualsOneRank(tokens, HeadwaterRun(world_size, partition), MakeOneGpuGroup, kTolerance);
      }
    }
  }
}

// Those that look at all queries select for the whole prompt on every rank.
TEST_F(CudaGroupGpuTest, PoliciesThatListBlocksEqualOneRank) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(3);
  const std::map<std::string, std::map<std::string, double>> policies = {
      {"flash", {{"alpha", 0.7}}},
      {"flash2", {{"alpha", 0.7}, {"dense_layers", 0}}},
      {"flex", {{"gamma", 0.5}, {"min_budget_tokens", 128}}},
      {"share", {{"gamma", 0.5}, {"pivots_per_layer", 1}, {"min_budget_tokens", 128}}},
      {"skeleton", {}},
      {"xattention", {{"threshold", 0.5}}}};
  const std::vector<std::int32_t> tokens = RandomTokens(5000, 512);
  for (const auto& [policy, parameters] : policies) {
    for (const int world_size : {2, 3}) {
      for (const v1::Partition partition : {v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED}) {
        SCOPED_TRACE(absl::StrCat(policy, ", ", world_size, " ranks, ", v1::Partition_Name(partition)));
        GroupRun run = HeadwaterRun(world_size, partition);
        run.policy = policy;
        run.parameters = parameters;
        run.parameters["dense_below_tokens"] = 0;
        run.block_tokens = 256;  // ranks' products are of the sizes of one rank's
        ExpectEqualsOneRank(tokens, run, MakeOneGpuGroup, kTolerance);
      }
    }
  }
}

// SharePrefill by clusters: pivots of one layer serve later ones, by sums of all ranks' rows.
TEST_F(CudaGroupGpuTest, PivotsServeLaterLayersOnAllRanks) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(2, 4);
  GroupRun run = HeadwaterRun(2, v1::PARTITION_ZIGZAG);
  run.policy = "share";
  run.parameters = {{"gamma", 0.5},
                    {"min_budget_tokens", 128},
                    {"similarity", 1},
                    {"query_aware", 0},
                    {"dense_below_tokens", 0}};
  run.block_tokens = 256;
  run.change_job = [](int, PrefillJob* job) {
    kernels::PolicyParameters parameters = job->policy->parameters();
    auto& clusters = std::get<kernels::ShareWithClusters>(parameters).clusters;
    for (int32_t layer = 0; layer < 4; ++layer) {
      for (int32_t head = 0; head < 4; ++head) clusters.cluster_of[{layer, head}] = head % 2;
    }
    clusters.shareable = {0, 1};
    job->policy = kernels::MakePolicy("share", std::move(parameters));
  };
  ExpectEqualsOneRank(RandomTokens(3000, 512), run, MakeOneGpuGroup, kTolerance);
}

// Thresholds, rounds and sampled queries are those of one rank, and every rank tells of all.
TEST_F(CudaGroupGpuTest, AQualityIsKeptAsOnOneRank) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(3);
  const std::vector<int32_t> tokens = RandomTokens(6000, 512);
  for (const bool bounded : {false, true}) {
    for (const v1::Partition partition : {v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED}) {
      SCOPED_TRACE(absl::StrCat(bounded ? "max_density " : "min_recall ", v1::Partition_Name(partition)));
      GroupRun run = HeadwaterRun(3, partition);
      run.parameters["threshold"] = bounded ? 0.001 : 1;  // nearly everything, or next to nothing
      run.change_job = [bounded](int, PrefillJob* job) {
        (bounded ? job->quality.max_density : job->quality.min_recall) = bounded ? 0.4 : 0.9;
      };
      const Reports reports = ReportsOf(tokens, run);
      ASSERT_EQ(reports.group.groups_size(), reports.alone.groups_size());
      ASSERT_GT(reports.group.groups_size(), 0);
      EXPECT_EQ(reports.group.sampled_queries(), reports.alone.sampled_queries());
      bool again = false;
      for (int i = 0; i < reports.group.groups_size(); ++i) {
        const v1::AttentionGroup &got = reports.group.groups(i), &wanted = reports.alone.groups(i);
        EXPECT_EQ(got.rounds(), wanted.rounds());
        EXPECT_EQ(got.fallback(), wanted.fallback());
        // One step of the curves at most: K and V of other sizes of products are rounded otherwise.
        EXPECT_NEAR(got.threshold(), wanted.threshold(), 0.05 * wanted.threshold());
        if (got.threshold() == wanted.threshold()) {
          EXPECT_NEAR(got.density(), wanted.density(), 2e-2);
          EXPECT_NEAR(got.recall(), wanted.recall(), 5e-3);
        }
        again = again || got.rounds() > 0;
      }
      EXPECT_TRUE(again) << "nothing was searched again: the bound is too weak to test anything";
    }
  }
}

// A job's time is up before it has begun: all ranks say so, though they measured different speeds.
TEST_F(CudaGroupGpuTest, RanksAgreeThatATimeBudgetIsTooShort) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(2);
  GroupRun run = HeadwaterRun(2, v1::PARTITION_ZIGZAG);
  run.change_job = [](int, PrefillJob* job) { job->quality.time_budget = absl::Microseconds(40); };
  speeds_ = {ComputeSpeed{1e15, 1e15}, ComputeSpeed{1e9, 1e9}};
  const auto got = Run(RandomTokens(2000, 512), run, MakeOneGpuGroup);
  for (const absl::Status& status : got->statuses) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_EQ(status.message(), got->statuses[0].message());
  }
  run.change_job = [](int, PrefillJob* job) { job->quality.time_budget = absl::Minutes(10); };
  EXPECT_THAT(Run(RandomTokens(2000, 512), run, MakeOneGpuGroup)->statuses,
              ::testing::Each(absl::OkStatus()));
}

TEST_F(CudaGroupGpuTest, TheSameRunTwiceIsBitwiseEqual) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(2);
  GroupRun run;
  run.world_size = 2;
  run.partition = v1::PARTITION_ZIGZAG;
  run.block_tokens = 256;
  const std::vector<int32_t> tokens = RandomTokens(3000, 512);
  for (const bool searched : {false, true}) {
    if (searched) run = HeadwaterRun(2, v1::PARTITION_ZIGZAG);
    EXPECT_TRUE(Run(tokens, run, MakeOneGpuGroup)->kv.bytes() ==
                Run(tokens, run, MakeOneGpuGroup)->kv.bytes());
  }
}

TEST_F(CudaGroupGpuTest, MeasuringTheLinkChangesNothingElse) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(3);
  const std::vector<int32_t> tokens = RandomTokens(3000, 512);
  for (const char* const policy : {"dense", "headwater", "share"}) {
    for (const v1::Partition partition : {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG}) {
      SCOPED_TRACE(absl::StrCat(policy, " ", v1::Partition_Name(partition)));
      GroupRun run = HeadwaterRun(3, partition);
      run.policy = policy;
      if (run.policy == "dense") run.parameters.clear();
      if (run.policy == "share") {
        run.parameters = {
            {"dense_below_tokens", 0}, {"gamma", 0.5}, {"pivots_per_layer", 1}, {"min_budget_tokens", 128}};
      }
      const auto plain = Run(tokens, run, MakeOneGpuGroup);
      run.measure_link = true;
      const auto measured = Run(tokens, run, MakeOneGpuGroup);
      run.least_probe_bytes = uint64_t{1} << 40;
      const auto too_short = Run(tokens, run, MakeOneGpuGroup);
      for (const auto* const group : {&plain, &measured, &too_short}) {
        ASSERT_THAT((*group)->statuses, ::testing::Each(absl::OkStatus()));
        EXPECT_TRUE((*group)->kv.bytes() == plain->kv.bytes());
        EXPECT_EQ((*group)->logits, plain->logits);
      }
      for (size_t rank = 0; rank < 3; ++rank) {
        EXPECT_EQ(plain->results[rank].link_bytes_per_s, 0);
        EXPECT_EQ(too_short->results[rank].link_bytes_per_s, 0);
        // Copies within one GPU.
        EXPECT_GT(measured->results[rank].link_bytes_per_s, 1e7);
        EXPECT_LT(measured->results[rank].link_bytes_per_s, 1e13);
        EXPECT_EQ(measured->results[rank].link_bytes_per_s, measured->results[0].link_bytes_per_s);
        EXPECT_EQ(measured->results[rank].exchange_bytes, plain->results[rank].exchange_bytes);
      }
    }
  }
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
  const auto got = Run(RandomTokens(2000, 512), run, MakeOneGpuGroup);
  EXPECT_EQ(got->statuses[1].code(), absl::StatusCode::kCancelled) << got->statuses[1];
  EXPECT_EQ(got->statuses[0].code(), absl::StatusCode::kUnavailable) << got->statuses[0];
  // The GPU is whole.
  run.on_layer = nullptr;
  ExpectEqualsOneRank(RandomTokens(2000, 512), run, MakeOneGpuGroup, kTolerance);
}

TEST_F(CudaGroupGpuTest, RefusesWhatItDoesNotShare) {
  HW_REQUIRE_SM90();
  LoadOnOneGpu(2);
  const std::vector<int32_t> tokens = RandomTokens(600, 512);
  GroupRun run;
  run.world_size = 2;
  run.block_tokens = 64;
  EXPECT_THAT(Run(tokens, run, MakeOneGpuGroup)->statuses,
              ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kUnimplemented)));
  run.block_tokens = 128;
  run.policy = "vertical_slash";
  run.parameters = {{"dense_below_tokens", 0}};
  EXPECT_THAT(Run(tokens, run, MakeOneGpuGroup)->statuses,
              ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kUnimplemented)));
  run = {};
  run.world_size = 2;
  run.block_tokens = 128;
  run.strategy = v1::STRATEGY_SPARSE;
  EXPECT_THAT(Run(tokens, run, MakeOneGpuGroup)->statuses,
              ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kUnimplemented)));
  // Ranks whose tables differ.
  run = HeadwaterRun(2, v1::PARTITION_ZIGZAG);
  run.change_job = [](int rank, PrefillJob* job) {
    auto parameters = std::get<kernels::HeadwaterParameters>(job->policy->parameters());
    parameters.thresholds.assign(6, rank == 0 ? 0.5f : 0.25f);
    job->policy = kernels::MakePolicy("headwater", std::move(parameters));
  };
  EXPECT_THAT(
      Run(tokens, run, MakeOneGpuGroup)->statuses,
      ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kFailedPrecondition)));
  // Ranks of different prompts.
  run = {};
  run.world_size = 2;
  run.block_tokens = 128;
  run.change_job = [](int rank, PrefillJob* job) { job->tokens[0] = rank; };
  EXPECT_THAT(
      Run(tokens, run, MakeOneGpuGroup)->statuses,
      ::testing::Each(::testing::Property(&absl::Status::code, absl::StatusCode::kFailedPrecondition)));
}

}  // namespace
}  // namespace headwater
