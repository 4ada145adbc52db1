// Device arrays for all statistics of one sequence.
#ifndef HW_TESTS_KERNELS_CUDA_STATS_ARRAYS_H_
#define HW_TESTS_KERNELS_CUDA_STATS_ARRAYS_H_

#include <array>
#include <cstdint>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/block_stats.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {

class StatsArrays {
 public:
  StatsArrays(int64_t tokens, int heads, int head_dim)
      : rows_(static_cast<size_t>(CudaStatsBlocks(tokens) * heads)), elements_(rows_ * head_dim) {}

  CudaBlockStats Views() const {
    CudaBlockStats stats;
    stats.k_mean = wide_[0].data();
    stats.v_mean = wide_[1].data();
    stats.k_min = wide_[2].data();
    stats.k_max = wide_[3].data();
    stats.k_mean_square = narrow_[0].data();
    stats.v_mean_square = narrow_[1].data();
    stats.k_max_norm = narrow_[2].data();
    stats.v_max_norm = narrow_[3].data();
    return stats;
  }
  const DeviceArray<float>& wide(size_t i) const { return wide_[i]; }
  const DeviceArray<float>& narrow(size_t i) const { return narrow_[i]; }

  bool Intact() const {
    bool intact = true;
    for (const auto* arrays : {&wide_, &narrow_}) {
      for (const DeviceArray<float>& array : *arrays) intact = intact && array.Intact();
    }
    return intact;
  }
  void ExpectSameBits(const StatsArrays& other) const {
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_TRUE(SameBits(wide_[i].Host(), other.wide_[i].Host())) << "wide array " << i;
      EXPECT_TRUE(SameBits(narrow_[i].Host(), other.narrow_[i].Host())) << "narrow array " << i;
    }
  }

 private:
  size_t rows_, elements_;
  // k_mean, v_mean, k_min, k_max.
  std::array<DeviceArray<float>, 4> wide_{DeviceArray<float>(elements_), DeviceArray<float>(elements_),
                                          DeviceArray<float>(elements_), DeviceArray<float>(elements_)};
  // k_mean_square, v_mean_square, k_max_norm, v_max_norm.
  std::array<DeviceArray<float>, 4> narrow_{DeviceArray<float>(rows_), DeviceArray<float>(rows_),
                                            DeviceArray<float>(rows_), DeviceArray<float>(rows_)};
};

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_STATS_ARRAYS_H_
