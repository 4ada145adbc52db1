// Tables of turns, and running sums of keys before rotation.
#include "kernels/cuda/sm90/skeleton_launch.h"
#include "kernels/cuda/sm90/skeleton_turns.cuh"

namespace headwater::kernels::sm90 {
namespace {

__global__ void __launch_bounds__(kSkeletonFineTurns)
    TablesKernel(const SkeletonParams p, const __grid_constant__ SkeletonFrequencies frequencies) {
  constexpr double kInversePi = 0.31830988618379067154;
  const int m = static_cast<int>(blockIdx.x), position = static_cast<int>(threadIdx.x);
  const double theta = frequencies.theta[m];
  double2 turn;
  sincos(position * theta, &turn.y, &turn.x);
  p.turns[m * kSkeletonFineTurns + position] = turn;
  p.turns_f32[m * kSkeletonFineTurns + position] =
      make_float2(static_cast<float>(turn.x), static_cast<float>(turn.y));
  if (position > 0) return;
  p.per_pi[m] = theta * kInversePi;
  p.inverse_sine[m] = theta == 0 ? 0.0 : 1.0 / sin(0.5 * theta);
}

// A CTA sums a chunk of a KV head's keys: a warp a group at a time, then all groups before each.
template <int kDim>
__global__ void __launch_bounds__(256) GroupSumsKernel(const SkeletonParams p) {
  using Pairs = LanePairs<kDim>;
  constexpr int kGroups = kSkeletonChunkKeys / kSkeletonGroupKeys;
  __shared__ float sums[kGroups][kDim];
  const int warp = static_cast<int>(threadIdx.x / 32),
            kv_head = static_cast<int>(blockIdx.x % p.num_kv_heads);
  const int64_t chunk = blockIdx.x / p.num_kv_heads;
  double per_pi[Pairs::kPairs];
  float2 step[Pairs::kPairs];
  LaneFrequencies<kDim>(p, per_pi, step);
  for (int group = warp; group < kGroups; group += 8) {
    float2 sum[Pairs::kPairs];
    GroupSum<kDim>(p, kv_head, chunk * kSkeletonChunkKeys + group * kSkeletonGroupKeys, p.rows, per_pi, step,
                   sum);
#pragma unroll
    for (int e = 0; e < Pairs::kPairs; ++e) {
      sums[group][Pairs::First() + e] = sum[e].x;
      sums[group][Pairs::kHalf + Pairs::First() + e] = sum[e].y;
    }
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= kDim) return;
  float* const out = p.group_sums + (kv_head * p.groups() + chunk * kGroups) * kDim + column;
  float before = 0;
  for (int group = 0; group < kGroups; ++group) {
    out[group * kDim] = before;
    before += sums[group][column];
  }
  p.chunk_sums[(kv_head * p.chunks() + chunk) * kDim + column] = before;
}

// Sums of chunks to those of all chunks before, in place. A CTA has 32 columns of a KV head; a warp takes a
// run of chunks.
__global__ void __launch_bounds__(1024) ChunkPrefixKernel(const SkeletonParams p) {
  __shared__ double totals[32][32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t chunks = p.chunks(), run = (chunks + 31) / 32;
  const int64_t begin = warp * run, end = begin + run < chunks ? begin + run : chunks;
  double* const column = p.chunk_sums + blockIdx.y * chunks * p.head_dim + blockIdx.x * 32 + lane;
  double total = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) total += column[chunk * p.head_dim];
  totals[warp][lane] = total;
  __syncthreads();
  double before = 0;
  for (int i = 0; i < warp; ++i) before += totals[i][lane];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const double sum = column[chunk * p.head_dim];
    column[chunk * p.head_dim] = before;
    before += sum;
  }
}

}  // namespace

cudaError_t LaunchSkeletonTables(const SkeletonParams& p, const SkeletonFrequencies& frequencies,
                                 cudaStream_t stream) {
  TablesKernel<<<p.head_dim / 2, kSkeletonFineTurns, 0, stream>>>(p, frequencies);
  return cudaGetLastError();
}

cudaError_t LaunchSkeletonKeySums(const SkeletonParams& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(p.chunks() * p.num_kv_heads);
  if (p.head_dim == 128) {
    GroupSumsKernel<128><<<grid, 256, 0, stream>>>(p);
  } else {
    GroupSumsKernel<64><<<grid, 256, 0, stream>>>(p);
  }
  ChunkPrefixKernel<<<dim3(p.head_dim / 32, p.num_kv_heads), 1024, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
