// A prefill of an 8B model's layers that is cancelled at random times: the device is free again soon, and
// nothing is left.
#include <atomic>
#include <fstream>
#include <random>
#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "bench/prefill_job.h"
#include "model/presets.h"
#include "tests/kernels/cuda/gpu.h"
#include "worker/cuda/cuda_prefill.h"

namespace headwater {
namespace {

constexpr int kRuns = 200;
constexpr int64_t kTokens = 1 << 16;

uint64_t FreeDeviceBytes() {
  size_t free = 0, total = 0;
  EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  return free;
}

// Pinned memory counts as resident.
int64_t ResidentBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
  }
  ADD_FAILURE() << "no VmRSS in /proc/self/status";
  return 0;
}

TEST(CudaCancelGpuTest, AtRandomTimesLeavesTheDeviceSoonAndNothingBehind) {
  HW_REQUIRE_SM90();
  auto config = PresetConfig("llama-3-8b", kTokens);
  ASSERT_TRUE(config.ok()) << config.status();
  config->num_layers = 4;
  const auto model = CudaModel::Random(*config, {}, 1);
  ASSERT_TRUE(model.ok()) << model.status();
  const auto egress = CudaEgressMemory::Allocate();
  ASSERT_TRUE(egress.ok()) << egress.status();
  const auto dense = MakeBenchJob(*config, RandomPrompt(*config, kTokens), v1::KV_DTYPE_BF16, {});
  const auto searched =
      MakeBenchJob(*config, RandomPrompt(*config, kTokens), v1::KV_DTYPE_BF16, {"probe", 0.05, {}});
  ASSERT_TRUE(dense.ok() && searched.ok());

  const auto run = [&](const PrefillJob& job, JobControl* control) {
    DiscardingSender sender;
    const CudaPrefillPrompt prompt{&job, &sender, control, {}};
    return RunCudaPrefill({&prompt, 1}, {model->get(), egress->get(), nullptr})[0].status();
  };
  absl::Duration whole[2];
  for (int sparse = 0; sparse < 2; ++sparse) {
    for (int i = 0; i < 2; ++i) {  // the first makes what is made once
      JobControl control;
      const absl::Time start = absl::Now();
      ASSERT_EQ(run(sparse == 1 ? *searched : *dense, &control), absl::OkStatus());
      whole[sparse] = absl::Now() - start;
    }
  }
  const uint64_t free_before = FreeDeviceBytes();
  const int64_t resident_before = ResidentBytes();
  std::mt19937 random(11);
  int cancelled_runs = 0;
  absl::Duration longest;
  for (int i = 0; i < kRuns; ++i) {
    const int sparse = i % 2;
    JobControl control;
    const absl::Duration wait = whole[sparse] * (static_cast<double>(random() % 1000) / 1000);
    absl::Time cancelled = absl::InfiniteFuture();
    std::thread canceller([&] {
      absl::SleepFor(wait);
      cancelled = absl::Now();
      control.Cancel(absl::CancelledError("test"));
    });
    const absl::Status status = run(sparse == 1 ? *searched : *dense, &control);
    const absl::Time ended = absl::Now();
    canceller.join();
    ASSERT_EQ(FreeDeviceBytes(), free_before) << "run " << i << ", cancelled after " << wait;
    if (status.ok()) continue;  // it was faster
    ++cancelled_runs;
    EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
    longest = std::max(longest, ended - cancelled);
    EXPECT_LE(ended - cancelled, absl::Milliseconds(100)) << "run " << i << ", cancelled after " << wait;
  }
  EXPECT_GT(cancelled_runs, kRuns * 3 / 4);
  EXPECT_LE(ResidentBytes() - resident_before, 16 << 20);
  std::printf(
      "[ measured ] %d of %d runs cancelled, the longest to end took %s; whole runs take %s dense, %s "
      "searched\n",
      cancelled_runs, kRuns, absl::FormatDuration(longest).c_str(), absl::FormatDuration(whole[0]).c_str(),
      absl::FormatDuration(whole[1]).c_str());
}

}  // namespace
}  // namespace headwater
