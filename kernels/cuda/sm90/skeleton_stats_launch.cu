// Mean and deviation of every row's interior logits. A tile has head_dim rows; with G and g the sums of k k^T
// and of k over the keys before a tile, the sums over its rows' interiors are q . g and q^T G q and those of
// the tile's own logits. CTAs take chunks of tiles, so that G is kept in registers and passes through memory
// once a chunk.
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vectors.cuh"
#include "kernels/cuda/sm90/skeleton_launch.h"

namespace headwater::kernels::sm90 {
namespace {

using device::LoadMatrix4;
using device::LoadMatrix4Transposed;
using device::MmaBf16;

// Parts of an f32 as bf16: of g all its digits, of G 17 bits, which leave a relative 2^-17 of the mean of
// squares where a single column dominates the logits, and much less elsewhere.
constexpr int kParts = 3, kGramParts = 2;

template <int kDim>
struct StatsTile {
  using Rows = device::MmaRows<kDim>;
  // Warps: 16 rows each of two query heads, and of G, half of its columns.
  static constexpr int kSteps = kDim / 16, kRowWarps = kDim / 16, kThreads = 64 * kRowWarps;
  static constexpr int kColumns = kDim / 2;
  static constexpr uint32_t kBytes = Rows::Bytes(kDim), kWarpBytes = Rows::Bytes(16);
  // Two tiles of keys, two of queries, G's parts, g's parts.
  static constexpr uint32_t kQ = 2 * kBytes, kG = 4 * kBytes, kSum = (4 + kGramParts) * kBytes;
  static constexpr uint32_t kShared = kSum + kParts * kDim * 2;
  static constexpr uint32_t kGramShared = 2 * kBytes;
  static constexpr int kGramFloat4s = (kColumns / 8 + 1) * kThreads;
};

template <int kDim>
__device__ __forceinline__ void LoadKeys(const SkeletonParams& p, uint32_t shared, int64_t tile,
                                         int kv_head) {
  using T = StatsTile<kDim>;
  const auto* const k = static_cast<const __nv_bfloat16*>(p.k);
  T::Rows::template Load<kDim, T::kThreads>(
      shared, static_cast<int>(threadIdx.x), k, [&](int row) -> const __nv_bfloat16* {
        const int64_t key = tile * kDim + row;
        return key < p.rows ? k + ((key + p.sinks) * p.num_kv_heads + kv_head) * kDim : nullptr;
      });
}

// A warp's 16 rows and half of the columns of G, in MmaBf16()'s layout, and in all columns of `sum` its rows
// of g.
template <int kDim>
struct GramRows {
  using T = StatsTile<kDim>;
  float g[T::kColumns / 8][4] = {}, sum[4] = {};

  // Every tile's part is added by itself: long sums stay f32 sums, rounded to nearest.
  __device__ __forceinline__ void Add(uint32_t keys, int warp) {
    const int lane = static_cast<int>(threadIdx.x & 31);
    const int own = warp % T::kRowWarps, columns = warp / T::kRowWarps * (T::kColumns / 8);
    const int low = (lane & 7) + (lane >> 4 & 1) * 8, mid = (lane & 7) + (lane >> 3 & 1) * 8;
    uint32_t af[T::kSteps][4];
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) {
      LoadMatrix4Transposed(af[step], T::Rows::At(keys, 16 * step + low, 2 * own + (lane >> 3 & 1)));
    }
#pragma unroll
    for (int n = 0; n < T::kColumns / 16; ++n) {
      float part[2][4] = {};
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
        uint32_t bf[4];
        LoadMatrix4Transposed(bf, T::Rows::At(keys, 16 * step + mid, columns + 2 * n + (lane >> 4 & 1)));
        MmaBf16(part[0], af[step], bf[0], bf[1]);
        MmaBf16(part[1], af[step], bf[2], bf[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) g[2 * n + i / 4][i % 4] += part[i / 4][i % 4];
    }
    constexpr uint32_t kOnes = 0x3F803F80u;
    float part[4] = {};
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) MmaBf16(part, af[step], kOnes, kOnes);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }

  __device__ __forceinline__ void Store(float4* to) const {
#pragma unroll
    for (int n = 0; n < T::kColumns / 8; ++n) {
      to[n * T::kThreads + threadIdx.x] = make_float4(g[n][0], g[n][1], g[n][2], g[n][3]);
    }
    to[T::kColumns / 8 * T::kThreads + threadIdx.x] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
  __device__ __forceinline__ void Load(const float4* from) {
    const auto read = [](float(&to)[4], const float4& x) {
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    };
#pragma unroll
    for (int n = 0; n < T::kColumns / 8; ++n) read(g[n], from[n * T::kThreads + threadIdx.x]);
    read(sum, from[T::kColumns / 8 * T::kThreads + threadIdx.x]);
  }

  // G's lower triangle, off the diagonal twice, and g, as bf16 parts that sum up to them.
  __device__ __forceinline__ void Split(char* shared, int warp) const {
    const int lane = static_cast<int>(threadIdx.x & 31);
    const int own = warp % T::kRowWarps, columns = warp / T::kRowWarps * (T::kColumns / 8);
#pragma unroll
    for (int n = 0; n < T::kColumns / 8; ++n) {
      if (columns + n > 2 * own + 1) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * own + lane / 4 + 8 * r, column = 8 * (columns + n) + 2 * (lane % 4);
        float x = g[n][2 * r] * Weight(column, row), y = g[n][2 * r + 1] * Weight(column + 1, row);
#pragma unroll
        for (int part = 0; part < kGramParts; ++part) {
          const uint32_t rounded = device::PackBf16(x, y);
          *reinterpret_cast<uint32_t*>(shared + T::Rows::At(T::kG + part * T::kBytes, row, columns + n) +
                                       4 * (lane % 4)) = rounded;
          x -= device::Bf16Low(rounded);
          y -= device::Bf16High(rounded);
        }
      }
    }
    if (columns > 0 || lane % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = sum[2 * r];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const __nv_bfloat16 rounded = __float2bfloat16(x);
        reinterpret_cast<__nv_bfloat16*>(shared + T::kSum)[part * kDim + 16 * own + lane / 4 + 8 * r] =
            rounded;
        x -= __bfloat162float(rounded);
      }
    }
  }
  __device__ static __forceinline__ float Weight(int column, int row) {
    return column < row ? 2.0f : column == row ? 1.0f : 0.0f;
  }
};

// Sums of logits (unscaled) and of their squares, of a lane's two rows and, to be added, its columns.
struct RowSums {
  float first[2] = {}, second[2] = {};
  __device__ __forceinline__ void AddLanes() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      first[r] = device::SumLanes(first[r], 1, 4);
      second[r] = device::SumLanes(second[r], 1, 4);
    }
  }
};

// From the keys before the tile. n, k: 16 columns each.
template <int kDim>
__device__ __forceinline__ void AddBefore(const uint32_t (&af)[kDim / 16][4], const char* shared,
                                          uint32_t base, RowSums& sums) {
  using T = StatsTile<kDim>;
  const int lane = static_cast<int>(threadIdx.x & 31);
  const int b_row = (lane & 7) + (lane >> 4 & 1) * 8, b_chunk = lane >> 3 & 1;
#pragma unroll
  for (int n = 0; n < T::kSteps; ++n) {
    float y[2][4] = {};
#pragma unroll
    for (int k = 0; k <= n; ++k) {
#pragma unroll
      for (int part = 0; part < kGramParts; ++part) {
        uint32_t bf[4];
        LoadMatrix4(bf, T::Rows::At(base + T::kG + part * T::kBytes, 16 * n + b_row, 2 * k + b_chunk));
        MmaBf16(y[0], af[k], bf[0], bf[1]);
        MmaBf16(y[1], af[k], bf[2], bf[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t q = af[n][2 * i + r];
        const float low = y[i][2 * r];
        const float high = y[i][2 * r + 1];
        sums.second[r] += device::Bf16Low(q) * low + device::Bf16High(q) * high;
      }
    }
  }
  // Columns 0 to 2 are g's parts.
  float c[4] = {};
  const bool has = lane / 4 < kParts;
  const auto* const g =
      reinterpret_cast<const __nv_bfloat16*>(shared + T::kSum) + lane / 4 * kDim + 2 * (lane % 4);
#pragma unroll
  for (int k = 0; k < T::kSteps; ++k) {
    const uint32_t b0 = has ? *reinterpret_cast<const uint32_t*>(g + 16 * k) : 0;
    const uint32_t b1 = has ? *reinterpret_cast<const uint32_t*>(g + 16 * k + 8) : 0;
    MmaBf16(c, af[k], b0, b1);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) sums.first[r] += c[2 * r] + c[2 * r + 1];
}

// From the tile's own keys, as far as the warp's rows see.
template <int kDim>
__device__ __forceinline__ void AddWithin(const uint32_t (&af)[kDim / 16][4], uint32_t keys, int warp,
                                          RowSums& sums) {
  using T = StatsTile<kDim>;
  const int lane = static_cast<int>(threadIdx.x & 31);
  const int b_row = (lane & 7) + (lane >> 4 & 1) * 8, b_chunk = lane >> 3 & 1;
#pragma unroll 1
  for (int n = 0; n <= warp; ++n) {
    float x[2][4] = {};
#pragma unroll
    for (int k = 0; k < T::kSteps; ++k) {
      uint32_t bf[4];
      LoadMatrix4(bf, T::Rows::At(keys, 16 * n + b_row, 2 * k + b_chunk));
      MmaBf16(x[0], af[k], bf[0], bf[1]);
      MmaBf16(x[1], af[k], bf[2], bf[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = i % 4 / 2, row = lane / 4 + 8 * r, column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      const float value = n < warp || column <= row ? x[i / 4][i % 4] : 0.0f;
      sums.first[r] += value;
      sums.second[r] += value * value;
    }
  }
}

// G and g of a chunk of tiles of a KV head.
template <int kDim>
__global__ void __launch_bounds__(StatsTile<kDim>::kThreads) ChunkGramKernel(const SkeletonParams p) {
  using T = StatsTile<kDim>;
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = device::SharedAddress(shared);
  const int warp = static_cast<int>(threadIdx.x / 32),
            kv_head = static_cast<int>(blockIdx.x % p.num_kv_heads);
  const int64_t first = static_cast<int64_t>(blockIdx.x / p.num_kv_heads) * p.gram_chunk_tiles;
  GramRows<kDim> gram;
  LoadKeys<kDim>(p, base, first, kv_head);
  device::CopyAsyncCommit();
  for (int i = 0; i < p.gram_chunk_tiles; ++i) {
    device::CopyAsyncWait<0>();
    __syncthreads();
    // Tiles past the last key are zeros.
    if (i + 1 < p.gram_chunk_tiles)
      LoadKeys<kDim>(p, base + ((i + 1) & 1) * T::kBytes, first + i + 1, kv_head);
    device::CopyAsyncCommit();
    gram.Add(base + (i & 1) * T::kBytes, warp);
  }
  gram.Store(p.grams + static_cast<int64_t>(blockIdx.x) * T::kGramFloat4s);
}

// Chunks' sums to those of all chunks before, in place.
__global__ void __launch_bounds__(128) GramPrefixKernel(const SkeletonParams p, int64_t floats) {
  constexpr int kAhead = 16;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (at >= floats) return;
  float* const x = reinterpret_cast<float*>(p.grams) + at;
  double before = 0;
  for (int64_t chunk = 0; chunk < p.gram_chunks; chunk += kAhead) {
    float ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = chunk + i < p.gram_chunks ? x[(chunk + i) * floats] : 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (chunk + i < p.gram_chunks) x[(chunk + i) * floats] = static_cast<float>(before);
      before += ahead[i];
    }
  }
}

// A warp's 16 rows of a query head's tile; `shared` is theirs.
template <int kDim>
__device__ __forceinline__ void LoadQueries(const SkeletonParams& p, uint32_t shared, int64_t tile, int head,
                                            int warp) {
  using T = StatsTile<kDim>;
  const auto* const q = static_cast<const __nv_bfloat16*>(p.q);
  T::Rows::template Load<16, 32>(
      shared, static_cast<int>(threadIdx.x & 31), q, [&](int i) -> const __nv_bfloat16* {
        const int64_t row = tile * kDim + 16 * warp + i;
        return row < p.rows ? q + ((row + p.sinks + p.local) * p.num_q_heads + head) * kDim : nullptr;
      });
}

template <int kDim>
__device__ __forceinline__ void WriteStatistics(const SkeletonParams& p, int64_t tile, int head, int warp,
                                                const RowSums& sums) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  if (lane % 4 > 1) return;
  const int r = lane % 4;
  const int64_t row = tile * kDim + 16 * warp + lane / 4 + 8 * r;
  if (row >= p.rows) return;
  const float count = static_cast<float>(row + 1);
  const float mean = p.scale * (r == 0 ? sums.first[0] : sums.first[1]) / count;
  const float square = p.scale * p.scale * (r == 0 ? sums.second[0] : sums.second[1]) / count;
  const int64_t at = head * p.num_tokens + row + p.sinks + p.local;
  p.mu[at] = mean;
  const float variance = square - mean * mean;
  p.sigma[at] = variance < 0 ? 0.0f : sqrtf(variance);  // NaN stays
}

// A chunk of tiles of a KV head and all query heads that read it. Warps go through the heads by themselves,
// one half of them through every other one.
template <int kDim>
__global__ void __launch_bounds__(StatsTile<kDim>::kThreads) StatisticsKernel(const SkeletonParams p) {
  using T = StatsTile<kDim>;
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = device::SharedAddress(shared);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x & 31);
  const int own = warp % T::kRowWarps, first_member = warp / T::kRowWarps;
  const int kv_head = static_cast<int>(blockIdx.x % p.num_kv_heads), group = p.group();
  const int64_t first = static_cast<int64_t>(blockIdx.x / p.num_kv_heads) * p.gram_chunk_tiles;
  const int64_t all = (p.rows + kDim - 1) / kDim;
  const int tiles = static_cast<int>(all - first < p.gram_chunk_tiles ? all - first : p.gram_chunk_tiles);
  const uint32_t queries = base + T::kQ + warp * T::kWarpBytes;
  GramRows<kDim> gram;
  gram.Load(p.grams + static_cast<int64_t>(blockIdx.x) * T::kGramFloat4s);
  LoadKeys<kDim>(p, base, first, kv_head);
  if (first_member < group) LoadQueries<kDim>(p, queries, first, kv_head * group + first_member, own);
  device::CopyAsyncCommit();
  for (int i = 0; i < tiles; ++i) {
    const uint32_t keys = base + (i & 1) * T::kBytes;
    gram.Split(shared, warp);
    device::CopyAsyncWait<0>();
    __syncthreads();
    if (i + 1 < tiles) LoadKeys<kDim>(p, base + ((i + 1) & 1) * T::kBytes, first + i + 1, kv_head);
    device::CopyAsyncCommit();
#pragma unroll 1
    for (int member = first_member; member < group; member += 2) {
      uint32_t af[T::kSteps][4];
#pragma unroll
      for (int k = 0; k < T::kSteps; ++k) {
        LoadMatrix4(af[k], T::Rows::At(queries, lane & 15, 2 * k + (lane >> 4)));
      }
      __syncwarp();
      const bool same_tile = member + 2 < group;
      if (same_tile || i + 1 < tiles) {
        LoadQueries<kDim>(p, queries, first + i + (same_tile ? 0 : 1),
                          kv_head * group + (same_tile ? member + 2 : first_member), own);
      }
      device::CopyAsyncCommit();
      RowSums sums;
      AddBefore<kDim>(af, shared, base, sums);
      AddWithin<kDim>(af, keys, own, sums);
      sums.AddLanes();
      WriteStatistics<kDim>(p, first + i, kv_head * group + member, own, sums);
      device::CopyAsyncWait<0>();
      __syncwarp();
    }
    gram.Add(keys, warp);
    __syncthreads();
  }
}

template <int kDim>
cudaError_t Launch(const SkeletonParams& p, cudaStream_t stream) {
  using T = StatsTile<kDim>;
  const auto grid = static_cast<unsigned>(static_cast<int64_t>(p.gram_chunks) * p.num_kv_heads);
  const int64_t floats = static_cast<int64_t>(p.num_kv_heads) * T::kGramFloat4s * 4;
  cudaError_t error = cudaFuncSetAttribute(ChunkGramKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           T::kGramShared);
  if (error != cudaSuccess) return error;
  error =
      cudaFuncSetAttribute(StatisticsKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kShared);
  if (error != cudaSuccess) return error;
  ChunkGramKernel<kDim><<<grid, T::kThreads, T::kGramShared, stream>>>(p);
  GramPrefixKernel<<<static_cast<unsigned>((floats + 127) / 128), 128, 0, stream>>>(p, floats);
  StatisticsKernel<kDim><<<grid, T::kThreads, T::kShared, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchSkeletonStatistics(const SkeletonParams& p, cudaStream_t stream) {
  return p.head_dim == 128 ? Launch<128>(p, stream) : Launch<64>(p, stream);
}

}  // namespace headwater::kernels::sm90
