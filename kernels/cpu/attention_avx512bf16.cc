#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "kernels/cpu/attention_kernel.h"

namespace headwater::kernels::cpu {
namespace {

constexpr int32_t kStrip = 32;

// c [16 * tile_rows][kStrip] (+)= a times b. a: left tiles, those of a row of tiles adjacent, rows of tiles
// a_stride elements apart; b: the right tiles of each panel adjacent, panels b_stride apart. depth: tiles
// along the summed dimension.
void MultiplyTiles(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int32_t depth,
                   int32_t tile_rows, float* c, bool accumulate) {
  constexpr int32_t kRows = 8;
  for (int32_t row = 0; row < tile_rows * 16; row += kRows) {
    const uint16_t* left = a + row / 16 * a_stride + row % 16 * 32;
    float* to = c + row * kStrip;
    __m512 sum[kRows][2];
    for (int32_t r = 0; r < kRows; ++r) {
      for (int32_t x = 0; x < 2; ++x) {
        sum[r][x] = accumulate ? _mm512_load_ps(to + r * kStrip + x * 16) : _mm512_setzero_ps();
      }
    }
    for (int32_t i = 0; i < depth * 16; ++i) {
      const uint16_t* right = b + i * 32;
      const auto right0 = reinterpret_cast<__m512bh>(_mm512_load_si512(right));
      const auto right1 = reinterpret_cast<__m512bh>(_mm512_load_si512(right + b_stride));
      const uint16_t* pairs = left + i / 16 * 512 + i % 16 * 2;
#pragma GCC unroll 8
      for (int32_t r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, pairs + r * 32, sizeof(pair));
        const auto wide = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], wide, right0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], wide, right1);
      }
    }
    for (int32_t r = 0; r < kRows; ++r) {
      for (int32_t x = 0; x < 2; ++x) _mm512_store_ps(to + r * kStrip + x * 16, sum[r][x]);
    }
  }
}

void Configure() {}
void Release() {}

}  // namespace
}  // namespace headwater::kernels::cpu

#define HW_ATTENTION kAvx512Bf16Attention
#include "kernels/cpu/attention_bf16.inc"
