// Masking and online softmax of a 64 x 128 (160) tile of scores in wgmma's accumulator layout: thread l of a
// warp holds rows l / 4 and l / 4 + 8 of the warp's 16; column j * 8 + 2 * (l % 4) + e of row r is s[4 * j +
// 2 * r
// + e].
#pragma once

#include <cmath>

#include "kernels/cuda/device/ptx.cuh"

namespace headwater::kernels::sm90 {

using namespace headwater::kernels::device;  // NOLINT: the kernel is written in these

// Running softmax of the two rows that a thread shares with three others: row lane / 4 of its warp's 16, and
// 8 below. Weights are 2^(score * scale - shift). The shift follows the largest score lazily: it moves only
// when a score passes it by more than 2^kSlack, so that sums and outputs are rarely rescaled (P <= 2^kSlack
// loses nothing in bf16; the result does not depend on it beyond rounding).
inline constexpr float kSlack = 8;

struct RowState {
  float shift[2];
  float sum[2];    // of this thread's columns only
  float limit[2];  // largest score * scale - shift that needs no move: kSlack; -infinity before the first key

  __device__ __forceinline__ void Reset() {
    shift[0] = shift[1] = sum[0] = sum[1] = 0;
    limit[0] = limit[1] = -INFINITY;
  }
};

// The rows of a tile as one thread sees them.
struct RowLimits {
  int last_key[2];  // per row
  int first_row;    // least last_key of the warpgroup: blocks that end at or below it need no mask
};

// Scores past each row's last key become -infinity. Column j * 8 + 2 * (lane % 4) + e of row r is s[4 * j + 2
// * r + e].
template <int kScores>
__device__ __forceinline__ void Mask(float (&s)[kScores], int first_key, const RowLimits& limits) {
  const int column = first_key + 2 * (threadIdx.x & 3);
  const int limit0 = limits.last_key[0] - column, limit1 = limits.last_key[1] - column;
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (8 * j + e > limit0) s[4 * j + e] = -INFINITY;
      if (8 * j + e > limit1) s[4 * j + 2 + e] = -INFINITY;
    }
  }
}

// Moves the shift where a score asks for it. True: it moved, for some row of the warp; `factor` is then what
// earlier sums and outputs are worth (1 for rows that did not move).
template <int kScores>
__device__ __forceinline__ bool MoveShift(const float (&s)[kScores], float scale_log2, RowState* state,
                                          float (&factor)[2]) {
  float top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float a = fmaxf(s[2 * r], s[2 * r + 1]), b = fmaxf(s[4 + 2 * r], s[4 + 2 * r + 1]);
#pragma unroll
    for (int j = 2; j < kScores / 4; j += 2) {
      a = fmaxf(a, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      b = fmaxf(b, fmaxf(s[4 * j + 4 + 2 * r], s[4 * j + 4 + 2 * r + 1]));
    }
    top[r] = fmaf(fmaxf(a, b), scale_log2, -state->shift[r]);
  }
  if (!__any_sync(~0u, top[0] > state->limit[0] || top[1] > state->limit[1])) return false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
    const bool moves = top[r] > state->limit[r];
    const float move = moves ? top[r] : 0.0f;
    // Before the first key there is nothing to be worth anything.
    factor[r] = state->limit[r] == -INFINITY ? 0.0f : Exp2(-move);
    state->shift[r] += move;
    state->sum[r] *= factor[r];
    if (moves) state->limit[r] = kSlack;
  }
  return true;
}

// weights = 2^(s * scale - shift) in bf16, and their sums (of the values before rounding). In two partial
// sums a row: the chains are short enough to run under the exponentials.
template <int kScores>
__device__ __forceinline__ void Weigh(const float (&s)[kScores], float scale_log2, RowState* state,
                                      uint32_t (&weights)[kScores / 2]) {
  float sum[2][2] = {{state->sum[0], 0}, {state->sum[1], 0}};
#pragma unroll
  for (int i = 0; i < kScores; i += 2) {
    const int r = i >> 1 & 1;
    const float low = Exp2(fmaf(s[i], scale_log2, -state->shift[r])),
                high = Exp2(fmaf(s[i + 1], scale_log2, -state->shift[r]));
    sum[r][0] += low;
    sum[r][1] += high;
    weights[i / 2] = PackBf16(low, high);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) state->sum[r] = sum[r][0] + sum[r][1];
}

}  // namespace headwater::kernels::sm90
