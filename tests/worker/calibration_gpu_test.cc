// What a GPU worker measures of itself at its start.
#include "gtest/gtest.h"

#include "tests/kernels/cuda/gpu.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/random_checkpoint.h"
#include "worker/cuda/cuda_backend.h"
#include "worker/options.h"

namespace headwater::testing {
namespace {

TEST(CalibrationGpuTest, AWorkerSeesThatItComputes) {
  HW_REQUIRE_SM90();
  const TempDir folder;
  WriteRandomCheckpoint(folder.path(), {}, 1);
  WorkerOptions options;
  options.model = folder.path();
  options.device = "cuda:0";
  options.threads = 2;
  auto backend = CudaBackend::Load(options);
  ASSERT_TRUE(backend.ok()) << backend.status();

  const absl::StatusOr<ComputeSpeed> speed = (*backend)->MeasureSpeed();

  ASSERT_TRUE(speed.ok()) << speed.status();
  // Two small layers do not fill the device; its peak is about 1e15.
  for (const double rate : {speed->linear, speed->attention}) {
    EXPECT_GT(rate, 1e10);
    EXPECT_LT(rate, 2e15);
  }
}

}  // namespace
}  // namespace headwater::testing
