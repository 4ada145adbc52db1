#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "kernels/cpu/attention_kernel.h"

namespace headwater::kernels::cpu {
namespace {

constexpr int32_t kStrip = 32;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not on the stack: GCC 12 tells the optimiser that the instruction reads 8 bytes, and so drops the other
// stores.
constexpr TileConfig kConfig;

void Configure() { _tile_loadconfig(&kConfig); }

void Release() { _tile_release(); }

// c [16 * tile_rows][kStrip] (+)= a times b. a: left tiles, those of a row of tiles adjacent, rows of tiles
// a_stride elements apart; b: the right tiles of each panel adjacent, panels b_stride apart. depth: tiles
// along the summed dimension.
//
// Tiles 0 to 3 hold two rows of results times two panels, 4 and 5 the left operands, 6 and 7 the right ones:
// one load for each multiplication.
void MultiplyTiles(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int32_t depth,
                   int32_t tile_rows, float* c, bool accumulate) {
  constexpr int kRowBytes = kStrip * 4;
  constexpr int64_t kNextRow = 16 * kStrip;
  // GCC 12's _tile_loadd() does not say that it reads memory: stores must not sink below it.
  __asm__ volatile("" ::: "memory");
  int32_t row = 0;
  for (; row + 2 <= tile_rows; row += 2) {
    if (accumulate) {
      _tile_loadd(0, c, kRowBytes);
      _tile_loadd(1, c + 16, kRowBytes);
      _tile_loadd(2, c + kNextRow, kRowBytes);
      _tile_loadd(3, c + kNextRow + 16, kRowBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < depth; ++i) {
      _tile_loadd(4, a + i * 512, 64);
      _tile_loadd(6, b + i * 512, 64);
      _tile_loadd(7, b + b_stride + i * 512, 64);
      _tile_loadd(5, a + a_stride + i * 512, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, kRowBytes);
    _tile_stored(1, c + 16, kRowBytes);
    _tile_stored(2, c + kNextRow, kRowBytes);
    _tile_stored(3, c + kNextRow + 16, kRowBytes);
    a += 2 * a_stride;
    c += 2 * kNextRow;
  }
  if (row == tile_rows) return;
  if (accumulate) {
    _tile_loadd(0, c, kRowBytes);
    _tile_loadd(1, c + 16, kRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t i = 0; i < depth; ++i) {
    _tile_loadd(4, a + i * 512, 64);
    _tile_loadd(6, b + i * 512, 64);
    _tile_loadd(7, b + b_stride + i * 512, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, c, kRowBytes);
  _tile_stored(1, c + 16, kRowBytes);
}

}  // namespace
}  // namespace headwater::kernels::cpu

#define HW_ATTENTION kAmxAttention
#include "kernels/cpu/attention_bf16.inc"
