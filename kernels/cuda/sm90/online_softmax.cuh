// Masking and online softmax of a 64 x 128 tile of scores in wgmma's accumulator layout: thread l of a warp
// holds rows l / 4 and l / 4 + 8 of the warp's 16; column j * 8 + 2 * (l % 4) + e of row r is s[4 * j + 2 * r
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
__device__ __forceinline__ void Mask(float (&s)[64], int first_key, const RowLimits& limits) {
  const int column = first_key + 2 * (threadIdx.x & 3);
  const int limit0 = limits.last_key[0] - column, limit1 = limits.last_key[1] - column;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (8 * j + e > limit0) s[4 * j + e] = -INFINITY;
      if (8 * j + e > limit1) s[4 * j + 2 + e] = -INFINITY;
    }
  }
}

// s -> s * scale - shift, after moving the shift where a score asks for it. True: it moved, for some row of
// the warp; `factor` is then what earlier outputs are worth (1 for rows that did not move).
__device__ __forceinline__ bool ShiftScores(float (&s)[64], float scale_log2, RowState* state,
                                            float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) s[i] = fmaf(s[i], scale_log2, -state->shift[i >> 1 & 1]);
  float top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float a = fmaxf(s[2 * r], s[2 * r + 1]), b = fmaxf(s[4 + 2 * r], s[4 + 2 * r + 1]);
#pragma unroll
    for (int j = 2; j < 16; j += 2) {
      a = fmaxf(a, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      b = fmaxf(b, fmaxf(s[4 * j + 4 + 2 * r], s[4 * j + 4 + 2 * r + 1]));
    }
    top[r] = fmaxf(a, b);
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
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      s[4 * j + 2 * r] -= move;
      s[4 * j + 2 * r + 1] -= move;
    }
  }
  return true;
}

// s -> 2^s, and the sums. In two partial sums a row: the chains are short enough to run under the
// exponentials.
__device__ __forceinline__ void Exponentiate(float (&s)[64], RowState* state) {
  float sum[2][2] = {{state->sum[0], 0}, {state->sum[1], 0}};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    s[i] = Exp2(s[i]);
    sum[i >> 1 & 1][i & 1] += s[i];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) state->sum[r] = sum[r][0] + sum[r][1];
}

}  // namespace headwater::kernels::sm90
