// Turning by frequencies, for SparseSkeleton: positions to 2^31 keep their angles' digits.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/device/vectors.cuh"
#include "kernels/cuda/sm90/skeleton_params.h"

namespace headwater::kernels::sm90 {

// (cos, sin) of position * theta.
__device__ __forceinline__ double2 TurnOf(double position, double per_pi) {
  double2 turn;
  sincospi(position * per_pi, &turn.y, &turn.x);
  return turn;
}
__device__ __forceinline__ float2 TurnOfF32(int64_t position, double per_pi) {
  const double turns = static_cast<double>(position) * per_pi * 0.5;
  float2 turn;
  sincospif(2.0f * static_cast<float>(turns - rint(turns)), &turn.y, &turn.x);
  return turn;
}

// Mean of (cos, sin) of D theta over `count` distances D from `first` on.
__device__ __forceinline__ double2 MeanTurn(int64_t first, int64_t count, double per_pi,
                                            double inverse_sine) {
  const double share = per_pi == 0 ? 1.0
                                   : sinpi(0.5 * static_cast<double>(count) * per_pi) * inverse_sine /
                                         static_cast<double>(count);
  const double2 middle = TurnOf(static_cast<double>(first) + 0.5 * static_cast<double>(count - 1), per_pi);
  return make_double2(share * middle.x, share * middle.y);
}

// (x, y) turned back.
__device__ __forceinline__ float2 TurnBack(float2 z, float2 turn) {
  return make_float2(z.x * turn.x + z.y * turn.y, z.y * turn.x - z.x * turn.y);
}

// A row's pairs (m, m + kDim / 2) that a lane of a warp holds: kDim / 64 neighbours.
template <int kDim>
struct LanePairs {
  static constexpr int kPairs = kDim / 64, kHalf = kDim / 2;
  struct Raw {
    uint32_t low, high;  // of the first elements, of the second ones
  };
  __device__ static __forceinline__ int First() { return static_cast<int>(threadIdx.x & 31) * kPairs; }

  __device__ static __forceinline__ Raw Load(const __nv_bfloat16* row) {
    if constexpr (kPairs == 2) {
      return {*reinterpret_cast<const uint32_t*>(row + First()),
              *reinterpret_cast<const uint32_t*>(row + kHalf + First())};
    } else {
      return {*reinterpret_cast<const uint16_t*>(row + First()),
              *reinterpret_cast<const uint16_t*>(row + kHalf + First())};
    }
  }
  __device__ static __forceinline__ void Widen(const Raw& raw, float2 (&z)[kPairs]) {
    z[0] = make_float2(device::Bf16Low(raw.low), device::Bf16Low(raw.high));
    if constexpr (kPairs == 2) z[1] = make_float2(device::Bf16High(raw.low), device::Bf16High(raw.high));
  }
};

// Sum of a group's keys before rotation, those from key `end` on left out.
template <int kDim>
__device__ __forceinline__ void GroupSum(const SkeletonParams& p, int kv_head, int64_t first, int64_t end,
                                         const double (&per_pi)[kDim / 64], const float2 (&step)[kDim / 64],
                                         float2 (&sum)[kDim / 64]) {
  using Pairs = LanePairs<kDim>;
  const int64_t stride = static_cast<int64_t>(p.num_kv_heads) * kDim;
  const auto* const keys =
      static_cast<const __nv_bfloat16*>(p.k) + (first + p.sinks) * stride + kv_head * kDim;
  typename Pairs::Raw raw[kSkeletonGroupKeys];
#pragma unroll
  for (int i = 0; i < kSkeletonGroupKeys; ++i) {
    raw[i] = {0, 0};
    if (first + i < end) raw[i] = Pairs::Load(keys + i * stride);
  }
  // Horner's rule, the last key first.
#pragma unroll
  for (int e = 0; e < Pairs::kPairs; ++e) sum[e] = make_float2(0, 0);
#pragma unroll
  for (int i = kSkeletonGroupKeys - 1; i >= 0; --i) {
    float2 z[Pairs::kPairs];
    Pairs::Widen(raw[i], z);
#pragma unroll
    for (int e = 0; e < Pairs::kPairs; ++e) {
      const float2 turned = TurnBack(sum[e], step[e]);
      sum[e] = make_float2(turned.x + z[e].x, turned.y + z[e].y);
    }
  }
#pragma unroll
  for (int e = 0; e < Pairs::kPairs; ++e) {
    sum[e] = TurnBack(sum[e], TurnOfF32(first + p.sinks, per_pi[e]));
  }
}

// Mean of keys 0 to `last` before rotation.
template <int kDim>
__device__ __forceinline__ void MeanKey(const SkeletonParams& p, int kv_head, int64_t last,
                                        const double (&per_pi)[kDim / 64], const float2 (&step)[kDim / 64],
                                        double2 (&mean)[kDim / 64]) {
  using Pairs = LanePairs<kDim>;
  const int64_t group = last / kSkeletonGroupKeys;
  float2 rest[Pairs::kPairs];
  GroupSum<kDim>(p, kv_head, group * kSkeletonGroupKeys, last + 1, per_pi, step, rest);
  const double* const chunk =
      p.chunk_sums + (kv_head * p.chunks() + last / kSkeletonChunkKeys) * kDim + Pairs::First();
  const float* const before = p.group_sums + (kv_head * p.groups() + group) * kDim + Pairs::First();
  const double inverse = 1.0 / static_cast<double>(last + 1);
#pragma unroll
  for (int e = 0; e < Pairs::kPairs; ++e) {
    mean[e].x = (chunk[e] + before[e] + rest[e].x) * inverse;
    mean[e].y = (chunk[Pairs::kHalf + e] + before[Pairs::kHalf + e] + rest[e].y) * inverse;
  }
}

// A lane's frequencies, and what one position turns by.
template <int kDim>
__device__ __forceinline__ void LaneFrequencies(const SkeletonParams& p, double (&per_pi)[kDim / 64],
                                                float2 (&step)[kDim / 64]) {
#pragma unroll
  for (int e = 0; e < kDim / 64; ++e) {
    per_pi[e] = p.per_pi[LanePairs<kDim>::First() + e];
    step[e] = TurnOfF32(1, per_pi[e]);
  }
}

}  // namespace headwater::kernels::sm90
