// Device memory for tests, and the one way to skip a test for want of a GPU.
#ifndef HW_TESTS_KERNELS_CUDA_GPU_H_
#define HW_TESTS_KERNELS_CUDA_GPU_H_

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include <cuda_runtime_api.h>

#include "gtest/gtest.h"

#include "kernels/dtype.h"

#define HW_REQUIRE_SM90()                                                                         \
  do {                                                                                            \
    int hw_devices = 0, hw_major = 0;                                                             \
    if (cudaGetDeviceCount(&hw_devices) != cudaSuccess || hw_devices == 0 ||                      \
        cudaDeviceGetAttribute(&hw_major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || \
        hw_major != 9) {                                                                          \
      (void)cudaGetLastError();                                                                   \
      GTEST_SKIP() << "no GPU of compute capability 9.0";                                         \
    }                                                                                             \
  } while (0)

namespace headwater::kernels {

// Elements in device memory with guard bytes around them: Intact() proves that nothing else was written. New
// memory holds NaN patterns: what a kernel does not write shows.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&base_), Bytes() + 2 * kGuard), cudaSuccess);
    EXPECT_EQ(cudaMemset(base_, 0xFF, Bytes() + 2 * kGuard), cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    EXPECT_EQ(cudaMemcpy(data(), values.data(), Bytes(), cudaMemcpyHostToDevice), cudaSuccess);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(base_); }

  T* data() const { return reinterpret_cast<T*>(base_ + kGuard); }
  size_t size() const { return count_; }
  size_t Bytes() const { return count_ * sizeof(T); }

  std::vector<T> Host() const {
    std::vector<T> values(count_);
    EXPECT_EQ(cudaMemcpy(values.data(), data(), Bytes(), cudaMemcpyDeviceToHost), cudaSuccess);
    return values;
  }
  bool Intact() const {
    std::vector<unsigned char> guard(2 * kGuard);
    EXPECT_EQ(cudaMemcpy(guard.data(), base_, kGuard, cudaMemcpyDeviceToHost), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(guard.data() + kGuard, base_ + kGuard + Bytes(), kGuard, cudaMemcpyDeviceToHost),
              cudaSuccess);
    for (const unsigned char byte : guard) {
      if (byte != 0xFF) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 4096;
  size_t count_;
  unsigned char* base_ = nullptr;
};

inline std::vector<uint16_t> ToBf16(const std::vector<float>& values) {
  std::vector<uint16_t> bits(values.size());
  Convert(values.data(), DType::kF32, bits.data(), DType::kBF16, values.size());
  return bits;
}

inline std::vector<float> ToFloat(const std::vector<uint16_t>& bits) {
  std::vector<float> values(bits.size());
  Convert(bits.data(), DType::kBF16, values.data(), DType::kF32, bits.size());
  return values;
}

// Normal, rounded to bf16.
inline std::vector<float> RandomBf16(size_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return ToFloat(ToBf16(values));
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_GPU_H_
