// Comparison of results with double-precision references.
#ifndef HW_TESTS_KERNELS_CUDA_NEAR_H_
#define HW_TESTS_KERNELS_CUDA_NEAR_H_

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

namespace headwater::kernels {

// One rounding to bf16, and a few in f32.
inline constexpr double kBf16Error = 0x1p-8 + 4e-6;

// Largest |got - want| / (|want| + scale); infinite where the sizes differ, or one is not finite and the
// other is.
inline double WorstError(const std::vector<float>& got, const std::vector<double>& want, double scale) {
  double worst = got.size() == want.size() ? 0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < want.size() && i < got.size(); ++i) {
    const double value = got[i];
    double error = std::fabs(value - want[i]) / (std::fabs(want[i]) + scale);
    if (!std::isfinite(value) || !std::isfinite(want[i])) {
      const bool same = std::isnan(value) ? std::isnan(want[i]) : value == want[i];
      error = same ? 0 : std::numeric_limits<double>::infinity();
    }
    worst = std::fmax(worst, error);
  }
  return worst;
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_NEAR_H_
