#include "kernels/reference/dot.h"

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kLanes = 16;

double Finish(double (&lanes)[kLanes], const float* x, const float* y, int64_t begin, int64_t count) {
  for (int64_t i = begin; i < count; ++i)
    lanes[i - begin] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

double DotPortable(const float* x, const float* y, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(y[i + lane]);
    }
  }
  return Finish(lanes, x, y, i, count);
}

#if defined(__x86_64__)
// Products of floats are exact in double, so that fusing them changes nothing.
__attribute__((target("avx512f"))) double DotAvx512(const float* x, const float* y, int64_t count) {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    low = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(x + i)), _mm512_cvtps_pd(_mm256_loadu_ps(y + i)),
                          low);
    high = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(x + i + 8)),
                           _mm512_cvtps_pd(_mm256_loadu_ps(y + i + 8)), high);
  }
  double lanes[kLanes];
  _mm512_storeu_pd(lanes, low);
  _mm512_storeu_pd(lanes + 8, high);
  return Finish(lanes, x, y, i, count);
}

// count is a multiple of kLanes.
__attribute__((target("avx512f"))) void DotRowsAvx512(const double* x, const float* y, int64_t count,
                                                      double* out) {
  __m512d low[kDotRows], high[kDotRows];
#pragma GCC unroll 8
  for (int64_t row = 0; row < kDotRows; ++row) low[row] = high[row] = _mm512_setzero_pd();
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512d first = _mm512_cvtps_pd(_mm256_loadu_ps(y + i));
    const __m512d second = _mm512_cvtps_pd(_mm256_loadu_ps(y + i + 8));
#pragma GCC unroll 8
    for (int64_t row = 0; row < kDotRows; ++row) {
      low[row] = _mm512_fmadd_pd(_mm512_loadu_pd(x + row * count + i), first, low[row]);
      high[row] = _mm512_fmadd_pd(_mm512_loadu_pd(x + row * count + i + 8), second, high[row]);
    }
  }
#pragma GCC unroll 8
  for (int64_t row = 0; row < kDotRows; ++row) {  // halves are added as Finish() adds them
    const __m512d eight = _mm512_add_pd(low[row], high[row]);
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    out[row] = _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
}

__attribute__((target("avx2,fma"))) double DotAvx2(const float* x, const float* y, int64_t count) {
  __m256d sums[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int part = 0; part < 4; ++part) {
      sums[part] = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * part)),
                                   _mm256_cvtps_pd(_mm_loadu_ps(y + i + 4 * part)), sums[part]);
    }
  }
  double lanes[kLanes];
  for (int part = 0; part < 4; ++part) _mm256_storeu_pd(lanes + 4 * part, sums[part]);
  return Finish(lanes, x, y, i, count);
}
#endif

}  // namespace

double Dot(const float* x, const float* y, int64_t count) {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512f") != 0;
  static const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  if (avx512) return DotAvx512(x, y, count);
  if (avx2) return DotAvx2(x, y, count);
#endif
  return DotPortable(x, y, count);
}

void DotRows(const double* x, const float* y, int64_t count, double* out) {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512f") != 0;
  if (avx512 && count % kLanes == 0) return DotRowsAvx512(x, y, count, out);
#endif
  std::vector<float> row(static_cast<size_t>(count));
  for (int64_t i = 0; i < kDotRows; ++i) {
    std::transform(x + i * count, x + (i + 1) * count, row.begin(),
                   [](double value) { return static_cast<float>(value); });
    out[i] = Dot(row.data(), y, count);
  }
}

}  // namespace headwater::kernels::reference
