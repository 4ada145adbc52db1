#include "kernels/reference/dot.h"

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

}  // namespace headwater::kernels::reference
