// Times of GPU operations, printed: for tests that run where HW_TIMING is set.
#ifndef HW_TESTS_KERNELS_CUDA_TIMING_H_
#define HW_TESTS_KERNELS_CUDA_TIMING_H_

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>

#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {

// Fills the array by repetition of a million normal numbers, which is quick.
inline void FillRandom(const DeviceArray<uint16_t>& array) {
  const std::vector<uint16_t> some = ToBf16(RandomBf16(size_t{1} << 20, 3));
  for (size_t at = 0; at < array.size(); at += some.size()) {
    const size_t count = std::min(some.size(), array.size() - at);
    EXPECT_EQ(cudaMemcpy(array.data() + at, some.data(), 2 * count, cudaMemcpyHostToDevice), cudaSuccess);
  }
}

// The best of three runs after a first one.
inline void PrintTime(const std::string& what, const std::function<Status()>& run) {
  cudaEvent_t begin, end;
  ASSERT_EQ(cudaEventCreate(&begin), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&end), cudaSuccess);
  float best = 1e9f;
  for (int i = 0; i < 4; ++i) {
    cudaEventRecord(begin);
    const Status status = run();
    ASSERT_TRUE(status.ok()) << status.message();
    cudaEventRecord(end);
    ASSERT_EQ(cudaEventSynchronize(end), cudaSuccess);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i > 0) best = std::min(best, ms);
  }
  std::printf("%s: %.3f ms\n", what.c_str(), static_cast<double>(best));
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_TIMING_H_
