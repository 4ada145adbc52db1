// A prompt over ranks on GPUs that are threads of the test, beside the same prompt on one GPU.
#ifndef HW_TESTS_WORKER_CUDA_GROUP_RUNS_H_
#define HW_TESTS_WORKER_CUDA_GROUP_RUNS_H_

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"
#include "tests/model/random_checkpoint.h"
#include "tests/worker/memory_sink.h"
#include "tests/worker/prefill_group.h"
#include "worker/cuda/cuda_prefill.h"
#include "worker/cuda/inprocess_device_group.h"
#include "worker/inprocess_collectives.h"

namespace headwater::testing {

using MakeDeviceGroup = std::function<std::vector<std::unique_ptr<DeviceGroup>>(int world_size)>;

inline std::vector<std::unique_ptr<DeviceGroup>> MakeOneGpuGroup(int world_size) {
  return MakeInProcessDeviceGroup(world_size, absl::Seconds(20));
}

class CudaGroupTest : public ::testing::Test {
 protected:
  // One model a rank: calls of one share scratch. device(rank): its GPU.
  void Load(const CheckpointShape& shape, int num_ranks, const std::function<int(int)>& device,
            int64_t chunk_tokens = 256) {
    WriteRandomCheckpoint(folder_.path(), shape, 3);
    auto host = Model::Load({folder_.path(), kernels::DType::kF32, 0});
    ASSERT_TRUE(host.ok()) << host.status();
    host_ = *std::move(host);
    models_.clear();
    for (int rank = 0; rank < num_ranks; ++rank) {
      auto model = CudaModel::Load({folder_.path(), device(rank), 3, 0, chunk_tokens});
      ASSERT_TRUE(model.ok()) << model.status();
      models_.push_back(*std::move(model));
    }
  }

  std::unique_ptr<GroupResult> Run(const std::vector<int32_t>& tokens, const GroupRun& run,
                                   const MakeDeviceGroup& make_devices) {
    const auto world = static_cast<size_t>(run.world_size);
    auto group = std::make_unique<GroupResult>(*MakeJob(*host_, tokens, run, 0).geometry);
    group->statuses.resize(world);
    group->results.resize(world);
    std::vector<std::unique_ptr<Collectives>> collectives(world);
    std::vector<std::unique_ptr<DeviceGroup>> devices(world);
    if (world > 1) {
      collectives = MakeInProcessGroup(run.world_size, absl::Seconds(20));
      devices = make_devices(run.world_size);
    }
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < world; ++rank) {
      threads.emplace_back([&, rank] {
        PrefillJob job = MakeJob(*host_, tokens, run, static_cast<int>(rank));
        if (run.change_job) run.change_job(static_cast<int>(rank), &job);
        JobControl control;
        MemorySink sink(&group->kv, run.sink);
        auto egress = CudaEgressMemory::Allocate(run.stall_timeout);
        ASSERT_TRUE(egress.ok()) << egress.status();
        const CudaPrefillPrompt prompt{&job, &sink, &control, [&](const PrefillProgress& progress) {
                                         if (run.on_layer)
                                           run.on_layer(static_cast<int>(rank), &control, progress);
                                       }};
        CudaPrefillContext context;
        context.model = models_[rank].get();
        context.egress = egress->get();
        context.collectives = collectives[rank].get();
        context.devices = devices[rank].get();
        if (rank < speeds_.size()) context.speed = &speeds_[rank];
        if (rank < run.checkpoints.size()) context.checkpoints = run.checkpoints[rank];
        context.checkpoint_layers = run.checkpoint_layers;
        context.least_checkpoint_tokens = 0;
        context.measure_link = run.measure_link;
        context.least_probe_bytes = run.least_probe_bytes;
        auto result = std::move(RunCudaPrefill({&prompt, 1}, context)[0]);
        if (result.ok()) {
          group->results[rank] = *std::move(result);
          group->statuses[rank] = sink.Finish();
        } else {
          group->statuses[rank] = result.status();
          sink.Cancel();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const PrefillResult& result : group->results) {
      if (result.top.empty()) continue;
      group->logits.resize(result.top.size());
      for (const TokenScore& score : result.top)
        group->logits[static_cast<size_t>(score.token)] = score.logit;
    }
    return group;
  }

  // KV once and within `tolerance` of one rank's, and the same first token.
  void ExpectEqualsOneRank(const std::vector<int32_t>& tokens, const GroupRun& run,
                           const MakeDeviceGroup& make_devices, double tolerance) {
    GroupRun alone = run;
    alone.world_size = 1;
    const auto wanted = Run(tokens, alone, make_devices);
    const auto got = Run(tokens, run, make_devices);
    ASSERT_THAT(wanted->statuses, ::testing::Each(absl::OkStatus()));
    ASSERT_THAT(got->statuses, ::testing::Each(absl::OkStatus()));
    EXPECT_THAT(got->kv.times(), ::testing::Each(1));
    for (uint32_t layer = 0; layer < static_cast<uint32_t>(host_->config().num_layers); ++layer) {
      for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
        EXPECT_LE(RelativeError(got->kv.Tensor(layer, kind), wanted->kv.Tensor(layer, kind)), tolerance)
            << "layer " << layer;
      }
    }
    ASSERT_FALSE(got->logits.empty());
    EXPECT_LE(RelativeError(got->logits, wanted->logits), tolerance);
    uint64_t computed = 0, possible = 0;
    for (const PrefillResult& result : got->results) {
      computed += result.progress.pairs_computed;
      possible += result.progress.pairs_possible;
    }
    EXPECT_EQ(possible, wanted->results[0].progress.pairs_possible);
    EXPECT_NEAR(static_cast<double>(computed),
                static_cast<double>(wanted->results[0].progress.pairs_computed),
                2e-2 * static_cast<double>(possible));
  }

  TempDir folder_;
  std::unique_ptr<Model> host_;
  std::vector<std::unique_ptr<CudaModel>> models_;
  std::vector<ComputeSpeed> speeds_;  // of the ranks; none: no time budgets
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_CUDA_GROUP_RUNS_H_
