// Sums over each row's sinks and local keys, and over the interior of the last row.
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vectors.cuh"
#include "kernels/cuda/sm90/skeleton_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kTile = 128;  // rows, and keys

template <int kDim>
struct KeyTileBytes {
  static constexpr uint32_t kBytes = device::MmaRows<kDim>::Bytes(kTile);
};

// Tiles of keys that a tile of rows looks at: of the sinks first, then of the band, from the rows' own on.
struct KeyTiles {
  int sinks, count;
  __device__ explicit KeyTiles(const SkeletonParams& p)
      : sinks((p.sinks + kTile - 1) / kTile), count(sinks + (kTile - 1 + p.local) / kTile + 1) {}
};

template <int kDim>
__device__ __forceinline__ void LoadKeyTile(const SkeletonParams& p, const KeyTiles& tiles, uint32_t shared,
                                            int64_t row_tile, int number, int kv_head) {
  const auto* const k = static_cast<const __nv_bfloat16*>(p.k);
  const bool is_sink = number < tiles.sinks;
  const int64_t first = is_sink ? number * kTile : p.sinks + (row_tile + number - tiles.sinks) * kTile;
  const int64_t end = is_sink ? p.sinks : p.num_tokens;
  device::MmaRows<kDim>::template Load<kTile, 256>(
      shared, static_cast<int>(threadIdx.x), k, [&](int i) -> const __nv_bfloat16* {
        return first + i < end ? k + ((first + i) * p.num_kv_heads + kv_head) * kDim : nullptr;
      });
}

// Rows [first, first + kTile) of `heads` query heads, of the others zeros.
template <int kDim, int kHeads>
__device__ __forceinline__ void LoadQueryTiles(const SkeletonParams& p, uint32_t shared, int64_t first,
                                               int first_head, int heads) {
  const auto* const q = static_cast<const __nv_bfloat16*>(p.q);
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    device::MmaRows<kDim>::template Load<kTile, 256>(
        shared + head * KeyTileBytes<kDim>::kBytes, static_cast<int>(threadIdx.x), q,
        [&](int i) -> const __nv_bfloat16* {
          const int64_t token = first + i + p.sinks + p.local;
          return head < heads && token < p.num_tokens ? q + (token * p.num_q_heads + first_head + head) * kDim
                                                      : nullptr;
        });
  }
}

// A CTA has a tile of rows of kHeads query heads of a group, a warp 16 rows of each. Keys of the band of row
// p: p + 1 to p + local.
template <int kDim, int kHeads>
__global__ void __launch_bounds__(256, 2) LambdaKernel(const SkeletonParams p) {
  using Rows = device::MmaRows<kDim>;
  constexpr uint32_t kBytes = KeyTileBytes<kDim>::kBytes;
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = device::SharedAddress(shared);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x & 31);
  const int parts = (p.group() + kHeads - 1) / kHeads;  // of a group
  const int unit = static_cast<int>(blockIdx.x % (p.num_kv_heads * parts)), kv_head = unit / parts;
  const int first_head = kv_head * p.group() + unit % parts * kHeads;
  const int heads = min(kHeads, (kv_head + 1) * p.group() - first_head);
  const int64_t tile = blockIdx.x / (p.num_kv_heads * parts), first = tile * kTile;
  const KeyTiles tiles(p);
  // Queries wait in the buffers after the first, until they are in registers.
  LoadQueryTiles<kDim, kHeads>(p, base + kBytes, first, first_head, heads);
  LoadKeyTile<kDim>(p, tiles, base, tile, 0, kv_head);
  device::CopyAsyncCommit();
  float mean[kHeads][2], sum[kHeads][2] = {};
#pragma unroll
  for (int i = 0; i < 2 * kHeads; ++i) {
    const int64_t token = first + 16 * warp + lane / 4 + 8 * (i % 2) + p.sinks + p.local;
    mean[i / 2][i % 2] = i / 2 < heads && token < p.num_tokens
                             ? p.mu[(first_head + i / 2) * p.num_tokens + token] * kLog2E
                             : 0.0f;
  }
  device::CopyAsyncWait<0>();
  __syncthreads();
  uint32_t af[kHeads][kDim / 16][4];
#pragma unroll
  for (int i = 0; i < kHeads * kDim / 16; ++i) {
    const int head = i / (kDim / 16), k = i % (kDim / 16);
    device::LoadMatrix4(af[head][k],
                        Rows::At(base + (1 + head) * kBytes, 16 * warp + (lane & 15), 2 * k + (lane >> 4)));
  }
  const float scale = p.scale * kLog2E;
  const int b_row = (lane & 7) + (lane >> 4 & 1) * 8, b_chunk = lane >> 3 & 1;
  for (int number = 0; number < tiles.count; ++number) {
    const uint32_t keys = base + (number & 1) * kBytes;
    device::CopyAsyncWait<0>();
    __syncthreads();
    if (number + 1 < tiles.count) {
      LoadKeyTile<kDim>(p, tiles, base + (~number & 1) * kBytes, tile, number + 1, kv_head);
    }
    device::CopyAsyncCommit();
    // Row r of the warp sees columns [low + r * slope, high + r * slope) of the tile.
    const bool is_sink = number < tiles.sinks;
    const int own = 16 * warp - (number - tiles.sinks) * kTile;
    const int low = is_sink ? 0 : own + 1, slope = is_sink ? 0 : 1;
    const int high = is_sink ? p.sinks - number * kTile : own + 1 + p.local;
#pragma unroll 1
    for (int n = 0; n < kTile / 16; ++n) {
      if (16 * n + 15 < low || 16 * n >= high + 15 * slope) continue;
      float x[kHeads][2][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        uint32_t bf[4];
        device::LoadMatrix4(bf, Rows::At(keys, 16 * n + b_row, 2 * k + b_chunk));
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          device::MmaBf16(x[head][0], af[head][k], bf[0], bf[1]);
          device::MmaBf16(x[head][1], af[head][k], bf[2], bf[3]);
        }
      }
      const auto add = [&](int i, bool seen) {
        const int r = i % 4 / 2;
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          const float e = device::Exp2(fmaf(x[head][i / 4][i % 4], scale, -mean[head][r]));
          if (seen) sum[head][r] += e;
        }
      };
      if (16 * n >= low + 15 * slope && 16 * n + 15 < high) {
#pragma unroll
        for (int i = 0; i < 8; ++i) add(i, true);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int shift = slope * (lane / 4 + 8 * (i % 4 / 2));
        const int column = 16 * n + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        add(i, column >= low + shift && column < high + shift);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kHeads; ++i) {
    const float total = device::SumLanes(sum[i / 2][i % 2], 1, 4);
    const int64_t token = first + 16 * warp + lane / 4 + 8 * (i % 2) + p.sinks + p.local;
    if (lane % 4 == 0 && i / 2 < heads && token < p.num_tokens) {
      p.lambda[(first_head + i / 2) * p.num_tokens + token] = total;
    }
  }
}

// (largest, sum relative to it) of two sets, in powers of two.
__device__ __forceinline__ float2 Join(float2 a, float2 b) {
  const float most = fmaxf(a.x, b.x);
  if (most == -INFINITY) return a;
  return make_float2(most, a.y * device::Exp2(a.x - most) + b.y * device::Exp2(b.x - most));
}

// A CTA has kSkeletonLastKeys keys of a KV head, a warp 16 of them at a time; queries are columns. A lane's
// 16 bytes of a row serve two products: which column of a row enters at which place is the same for both
// sides.
template <int kDim>
__global__ void __launch_bounds__(256) LastRowKernel(const SkeletonParams p) {
  constexpr int kLoads = kDim / 32;
  __shared__ float2 parts[8][8];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x & 31);
  const int kv_head = static_cast<int>(blockIdx.x % p.num_kv_heads), group = p.group();
  const int64_t part = blockIdx.x / p.num_kv_heads;
  const int column = lane % 4 * 8;
  uint4 q[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    q[i] = make_uint4(0, 0, 0, 0);
    if (lane / 4 < group) {
      q[i] = *reinterpret_cast<const uint4*>(
          static_cast<const __nv_bfloat16*>(p.q) +
          ((p.num_tokens - 1) * p.num_q_heads + kv_head * group + lane / 4) * kDim + 32 * i + column);
    }
  }
  float2 most[2] = {{-INFINITY, 0}, {-INFINITY, 0}};
  const float scale = p.scale * kLog2E;
  for (int step = warp; step < kSkeletonLastKeys / 16; step += 8) {
    const int64_t first = part * kSkeletonLastKeys + 16 * step;
    if (first >= p.rows) break;
    uint4 k[2][kLoads];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t key = first + lane / 4 + 8 * r;
      const auto* const row = static_cast<const __nv_bfloat16*>(p.k) +
                              ((key + p.sinks) * p.num_kv_heads + kv_head) * kDim + column;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        k[r][i] = key < p.rows ? *reinterpret_cast<const uint4*>(row + 32 * i) : make_uint4(0, 0, 0, 0);
      }
    }
    float x[4] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      device::MmaBf16(x, {k[0][i].x, k[1][i].x, k[0][i].y, k[1][i].y}, q[i].x, q[i].y);
      device::MmaBf16(x, {k[0][i].z, k[1][i].z, k[0][i].w, k[1][i].w}, q[i].z, q[i].w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + lane / 4 + 8 * (i / 2) < p.rows)
        most[i % 2] = Join(most[i % 2], make_float2(x[i] * scale, 1));
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) {
      const float2 other = make_float2(__shfl_xor_sync(0xFFFFFFFFu, most[e].x, bit),
                                       __shfl_xor_sync(0xFFFFFFFFu, most[e].y, bit));
      most[e] = Join(most[e], other);
    }
    if (lane / 4 == 0) parts[warp][2 * lane + e] = most[e];
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= group) return;
  float2 total = parts[0][threadIdx.x];
  for (int i = 1; i < 8; ++i) total = Join(total, parts[i][threadIdx.x]);
  p.last_parts[(kv_head * group + threadIdx.x) * p.last_part_count() + part] = total;
}

template <int kDim, int kHeads>
cudaError_t LaunchLambda(const SkeletonParams& p, cudaStream_t stream) {
  constexpr uint32_t kShared = (1 + kHeads) * KeyTileBytes<kDim>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(LambdaKernel<kDim, kHeads>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const int64_t units = static_cast<int64_t>(p.num_kv_heads) * ((p.group() + kHeads - 1) / kHeads);
  LambdaKernel<kDim, kHeads>
      <<<static_cast<unsigned>((p.rows + kTile - 1) / kTile * units), 256, kShared, stream>>>(p);
  return cudaGetLastError();
}

template <int kDim>
cudaError_t Launch(const SkeletonParams& p, cudaStream_t stream) {
  const cudaError_t error =
      p.group() > 1 ? LaunchLambda<kDim, 2>(p, stream) : LaunchLambda<kDim, 1>(p, stream);
  if (error != cudaSuccess) return error;
  LastRowKernel<kDim><<<static_cast<unsigned>(p.last_part_count() * p.num_kv_heads), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchSkeletonLocal(const SkeletonParams& p, cudaStream_t stream) {
  return p.head_dim == 128 ? Launch<128>(p, stream) : Launch<64>(p, stream);
}

}  // namespace headwater::kernels::sm90
