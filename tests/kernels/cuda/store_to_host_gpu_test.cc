// CudaStoreToHost on the GPU.
#include <algorithm>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/layer_ops.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {
namespace {

void ExpectOk(const Status& status) {
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST(CudaStoreToHostGpuTest, CopiesWordsAndNoMore) {
  HW_REQUIRE_SM90();
  constexpr size_t kRoom = 100'003;
  void* memory = nullptr;
  ASSERT_EQ(cudaHostAlloc(&memory, kRoom * sizeof(uint32_t), cudaHostAllocMapped), cudaSuccess);
  auto* const host = static_cast<uint32_t*>(memory);
  std::vector<uint32_t> values(kRoom);
  for (size_t i = 0; i < kRoom; ++i) values[i] = static_cast<uint32_t>(i * 2654435761U) | 1;
  const DeviceArray<uint32_t> from(values);
  for (const size_t count : {size_t{0}, size_t{1}, size_t{3}, size_t{1023}, size_t{1025}, kRoom - 1}) {
    std::fill_n(host, kRoom, 0);
    ExpectOk(CudaStoreToHost(from.data() + 1, host, static_cast<int64_t>(count * sizeof(uint32_t)), nullptr));
    EXPECT_TRUE(std::equal(host, host + count, values.begin() + 1)) << count;
    EXPECT_TRUE(std::all_of(host + count, host + kRoom, [](uint32_t x) { return x == 0; })) << count;
  }
  EXPECT_EQ(cudaFreeHost(memory), cudaSuccess);
}

// The copy engine is busy with another stream's bytes; the small copy does not wait for them.
TEST(CudaStoreToHostGpuTest, DoesNotWaitForTheCopyEngine) {
  HW_REQUIRE_SM90();
  constexpr size_t kBytes = size_t{256} << 20;
  constexpr int kCopies = 8;  // about 40 ms
  void* memory = nullptr;
  ASSERT_EQ(cudaHostAlloc(&memory, kBytes + 64, cudaHostAllocMapped), cudaSuccess);
  auto* const host = static_cast<char*>(memory);
  const DeviceArray<unsigned char> from(kBytes);
  cudaStream_t busy = nullptr, stream = nullptr;
  cudaEvent_t copied = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&busy, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming), cudaSuccess);
  // Loads the kernel.
  ExpectOk(CudaStoreToHost(from.data(), host + kBytes, 64, stream));
  for (int i = 0; i < kCopies; ++i) {
    ASSERT_EQ(cudaMemcpyAsync(host, from.data(), kBytes, cudaMemcpyDeviceToHost, busy), cudaSuccess);
  }
  ASSERT_EQ(cudaEventRecord(copied, busy), cudaSuccess);
  const Status status = CudaStoreToHost(from.data(), host + kBytes, 64, stream);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(copied), cudaErrorNotReady);
  EXPECT_EQ(cudaStreamSynchronize(busy), cudaSuccess);
  (void)cudaGetLastError();
  EXPECT_EQ(cudaEventDestroy(copied), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(busy), cudaSuccess);
  EXPECT_EQ(cudaFreeHost(memory), cudaSuccess);
}

}  // namespace
}  // namespace headwater::kernels
