// Statistics of one block of 128 tokens of one head, as a CTA takes them on its way through the rows. The
// standalone kernel and the one that writes K and V share this, instruction for instruction: sums are spelled
// as intrinsics, which the compiler may not contract or reorder, so both give the same bits.
//
// kLanes threads share a row; thread `lane` of them holds columns [8 * lane, 8 * lane + 8) and the same half
// a head further on, which is what a rotation needs. kRows tokens pass at a time, kSteps times.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/device/vectors.cuh"

namespace headwater::kernels::sm90 {

using namespace headwater::kernels::device;  // NOLINT: the kernel is written in these

template <int kHeadDim_>
struct BlockTile {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kLanes = kHeadDim / 16;
  static constexpr int kRows = kThreads / kLanes;
  static constexpr int kSteps = kStatsBlockTokens / kRows;

  struct Shared {
    float sum[kWarps][kHeadDim];
    float least[kWarps][kHeadDim];
    float most[kWarps][kHeadDim];
    float square_sum[kWarps];
    float square_most[kWarps];
  };

  static __device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ __forceinline__ int Row(int step) {
    return step * kRows + static_cast<int>(threadIdx.x) / kLanes;
  }
};

// A thread's part of a row: 8 columns of the first half, 8 of the second.
struct RowPart {
  uint4 low, high;
};

// Where the statistics of one block and head go; null: not wanted.
struct BlockStatsOutputs {
  float *mean, *least, *most, *mean_square, *max_norm;

  __device__ __forceinline__ bool Any() const {
    return mean != nullptr || least != nullptr || mean_square != nullptr || max_norm != nullptr;
  }
};

__device__ __forceinline__ BlockStatsOutputs OutputsOf(const CudaBlockStats& stats, bool is_v, int64_t block,
                                                       int head, int num_heads, int head_dim) {
  const int64_t row = block * num_heads + head;
  const auto at = [](float* base, int64_t element) { return base == nullptr ? nullptr : base + element; };
  return {at(is_v ? stats.v_mean : stats.k_mean, row * head_dim),
          at(is_v ? nullptr : stats.k_min, row * head_dim), at(is_v ? nullptr : stats.k_max, row * head_dim),
          at(is_v ? stats.v_mean_square : stats.k_mean_square, row),
          at(is_v ? stats.v_max_norm : stats.k_max_norm, row)};
}

template <class Tile>
struct BlockAccumulator {
  float sum[16], least[16], most[16];
  float square_sum = 0, square_most = 0;

  __device__ __forceinline__ BlockAccumulator() {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      sum[i] = 0;
      least[i] = INFINITY;
      most[i] = -INFINITY;
    }
  }

  // All threads of a warp together; `exists` is the same for the threads of a row.
  __device__ __forceinline__ void Add(const RowPart& part, bool exists, bool bounds) {
    float x[2][8];
    Widen(part.low, x[0]);
    Widen(part.high, x[1]);
    float square = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float value = exists ? x[i / 8][i % 8] : 0.0f;
      sum[i] = __fadd_rn(sum[i], value);
      square = __fmaf_rn(value, value, square);
      if (bounds && exists) {
        least[i] = MinOrNan(least[i], value);
        most[i] = MaxOrNan(most[i], value);
      }
    }
    square = SumLanes(square, 1, Tile::kLanes);
    square_sum = __fadd_rn(square_sum, square);
    square_most = MaxOrNan(square_most, square);
  }

  // Merges the CTA's threads, row by row of a warp and then warp by warp, and writes.
  __device__ __forceinline__ void Finish(typename Tile::Shared& shared, int tokens,
                                         const BlockStatsOutputs& out) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = Tile::Lane();
    const bool writes = threadIdx.x % 32 < Tile::kLanes, bounds = out.least != nullptr;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int column = i / 8 * (Tile::kHeadDim / 2) + lane * 8 + i % 8;
      const float total = SumLanes(sum[i], Tile::kLanes, 32);
      if (writes) shared.sum[warp][column] = total;
      if (!bounds) continue;
#pragma unroll
      for (int bit = Tile::kLanes; bit < 32; bit *= 2) {
        least[i] = MinOrNan(least[i], __shfl_xor_sync(0xFFFFFFFFu, least[i], bit));
        most[i] = MaxOrNan(most[i], __shfl_xor_sync(0xFFFFFFFFu, most[i], bit));
      }
      if (writes) {
        shared.least[warp][column] = least[i];
        shared.most[warp][column] = most[i];
      }
    }
    square_sum = SumLanes(square_sum, Tile::kLanes, 32);
#pragma unroll
    for (int bit = Tile::kLanes; bit < 32; bit *= 2) {
      square_most = MaxOrNan(square_most, __shfl_xor_sync(0xFFFFFFFFu, square_most, bit));
    }
    if (threadIdx.x % 32 == 0) {
      shared.square_sum[warp] = square_sum;
      shared.square_most[warp] = square_most;
    }
    __syncthreads();
    Write(shared, static_cast<float>(tokens), out);
  }

 private:
  static __device__ __forceinline__ void Write(const typename Tile::Shared& shared, float tokens,
                                               const BlockStatsOutputs& out) {
    // Half of the threads have the means, the other half the bounds.
    static_assert(Tile::kThreads >= 2 * Tile::kHeadDim);
    const int column = static_cast<int>(threadIdx.x) % Tile::kHeadDim;
    const int part = static_cast<int>(threadIdx.x) / Tile::kHeadDim;
    if (part == 0 && out.mean != nullptr) {
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < Tile::kWarps; ++warp) total = __fadd_rn(total, shared.sum[warp][column]);
      out.mean[column] = __fdiv_rn(total, tokens);
    }
    if (part == 1 && out.least != nullptr) {
      float low = INFINITY, high = -INFINITY;
#pragma unroll
      for (int warp = 0; warp < Tile::kWarps; ++warp) {
        low = MinOrNan(low, shared.least[warp][column]);
        high = MaxOrNan(high, shared.most[warp][column]);
      }
      out.least[column] = low;
      out.most[column] = high;
    }
    if (threadIdx.x != 0) return;
    float squares = 0, largest = 0;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) {
      squares = __fadd_rn(squares, shared.square_sum[warp]);
      largest = MaxOrNan(largest, shared.square_most[warp]);
    }
    if (out.mean_square != nullptr) *out.mean_square = __fdiv_rn(squares, tokens);
    if (out.max_norm != nullptr) *out.max_norm = __fsqrt_rn(largest);
  }
};

}  // namespace headwater::kernels::sm90
