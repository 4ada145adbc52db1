// The regression: rows of its design, and its normal equations. Low frequencies make columns that are nearly
// one: the system's smallest eigenvalue is the ridge, 1e-11 of the largest, so that it is summed in f64, by
// tensor cores, from distances in f64.
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/sm90/skeleton_launch.h"
#include "kernels/cuda/sm90/skeleton_turns.cuh"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kDesignWarps = 8, kSamplesPerWarp = 8;

__device__ __forceinline__ uint64_t SplitMix64(uint64_t state) {
  uint64_t z = state + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// A warp's lanes hold pairs of columns.
template <int kDim>
struct DesignLane {
  using Pairs = LanePairs<kDim>;
  static constexpr int kPairs = Pairs::kPairs, kHalf = Pairs::kHalf;
  double per_pi[kPairs], inverse_sine[kPairs];
  float2 step[kPairs];

  __device__ explicit DesignLane(const SkeletonParams& p) {
    LaneFrequencies<kDim>(p, per_pi, step);
#pragma unroll
    for (int e = 0; e < kPairs; ++e) inverse_sine[e] = p.inverse_sine[Pairs::First() + e];
  }

  // (cos, -sin) of the distance, less its mean over the row's interior.
  __device__ __forceinline__ void Distance(const SkeletonParams& p, int64_t row, int64_t key,
                                           double2 (&out)[kPairs]) const {
    const int64_t distance = row + p.local - key;
#pragma unroll
    for (int e = 0; e < kPairs; ++e) {
      const double2 turn = TurnOf(static_cast<double>(distance), per_pi[e]);
      const double2 mean = MeanTurn(p.local, row + 1, per_pi[e], inverse_sine[e]);
      out[e] = make_double2(turn.x - mean.x, mean.y - turn.y);
    }
  }

  // The key before rotation, less their mean over the row's interior.
  __device__ __forceinline__ void Key(const SkeletonParams& p, int kv_head, int64_t row, int64_t key,
                                      const float2 (&k)[kPairs], float2 (&out)[kPairs]) const {
    double2 mean[kPairs];
    MeanKey<kDim>(p, kv_head, row, per_pi, step, mean);
#pragma unroll
    for (int e = 0; e < kPairs; ++e) {
      const float2 turned = TurnBack(k[e], TurnOfF32(key + p.sinks, per_pi[e]));
      out[e] =
          make_float2(static_cast<float>(turned.x - mean[e].x), static_cast<float>(turned.y - mean[e].y));
    }
  }

  // float or double.
  template <typename T, typename Pair>
  __device__ static __forceinline__ void Store(T* to, const Pair (&z)[kPairs]) {
    if constexpr (kPairs == 2) {
      *reinterpret_cast<Pair*>(to + Pairs::First()) = {z[0].x, z[1].x};
      *reinterpret_cast<Pair*>(to + kHalf + Pairs::First()) = {z[0].y, z[1].y};
    } else {
      to[Pairs::First()] = z[0].x;
      to[kHalf + Pairs::First()] = z[0].y;
    }
  }
};

template <int kDim>
__global__ void __launch_bounds__(32 * kDesignWarps) DesignKernel(const SkeletonParams p, int64_t first) {
  using Pairs = LanePairs<kDim>;
  using Lane = DesignLane<kDim>;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / p.group();
  const Lane lane(p);
  const int64_t begin =
      (static_cast<int64_t>(blockIdx.x) * kDesignWarps + threadIdx.x / 32) * kSamplesPerWarp;
  for (int64_t n = begin; n < begin + kSamplesPerWarp && n < p.batch; ++n) {
    const int64_t out = (head * p.batch + n) * kDim;
    double2 distance[Pairs::kPairs] = {};
    float2 key[Pairs::kPairs] = {};
    float target = 0;
    if (first + n < p.samples) {
      const uint64_t state =
          p.seed + (static_cast<uint64_t>(head) << 40) + 2 * static_cast<uint64_t>(first + n);
      const auto x = static_cast<int64_t>(__umul64hi(SplitMix64(state), static_cast<uint64_t>(p.rows)));
      const auto y = static_cast<int64_t>(__umul64hi(SplitMix64(state + 1), static_cast<uint64_t>(p.rows)));
      const int64_t row = x > y ? x : y, at = x > y ? y : x, token = row + p.sinks + p.local;
      float2 q[Pairs::kPairs], k[Pairs::kPairs];
      Pairs::Widen(
          Pairs::Load(static_cast<const __nv_bfloat16*>(p.q) + (token * p.num_q_heads + head) * kDim), q);
      Pairs::Widen(Pairs::Load(static_cast<const __nv_bfloat16*>(p.k) +
                               ((at + p.sinks) * p.num_kv_heads + kv_head) * kDim),
                   k);
#pragma unroll
      for (int e = 0; e < Pairs::kPairs; ++e) target += q[e].x * k[e].x + q[e].y * k[e].y;
      target = p.scale * device::SumLanes(target, 1, 32) - p.mu[head * p.num_tokens + token];
      lane.Distance(p, row, at, distance);
      lane.Key(p, kv_head, row, at, k, key);
    }
    Lane::Store(p.distances + out, distance);
    Lane::Store(p.keys + out, key);
    if (threadIdx.x % 32 == 0) p.target[head * p.batch + n] = target;
  }
}

// c += a b, 16 x 8 x 8. Lane l: a has rows l / 4 and l / 4 + 8 (odd numbers), columns l % 4 and l % 4 + 4
// (the last two); b has column l / 4, rows l % 4 and l % 4 + 4; c as MmaBf16() has it.
__device__ __forceinline__ void MmaF64(double (&c)[4], const double (&a)[4], double b0, double b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b0), "d"(b1));
}

// A warp has 32 rows and 64 columns of the lower triangle, the CTAs of a share all of it between them.
template <int kDim>
struct GramTile {
  static constexpr int kColumns = 2 * kDim, kParts = kDim == 128 ? 5 : 2;
  static constexpr int kWarps = kDim == 128 ? 4 : 3;
  static constexpr int kThreads = 32 * kWarps;
  // So that a step's reads find no bank twice.
  static constexpr int kWideStride = kDim + 4, kStride = kDim + 8;
  struct Buffer {
    double distances[kSkeletonDesignTile][kWideStride];
    float keys[kSkeletonDesignTile][kStride];
    float target[kSkeletonDesignTile];
  };

  int row, column;
  __device__ explicit GramTile(int number) : row(0), column(0) {
    while (number > row / 2) {
      number -= row / 2 + 1;
      ++row;
    }
    column = number * 64;
    row *= 32;
  }
};

// Samples [first, first + kSkeletonDesignTile) of all heads' batches.
template <int kDim>
__device__ __forceinline__ void LoadDesign(const SkeletonParams& p, typename GramTile<kDim>::Buffer& to,
                                           int64_t first) {
  using T = GramTile<kDim>;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kSkeletonDesignTile * kDim / 2; i += T::kThreads) {
    const int row = i / (kDim / 2), column = i % (kDim / 2) * 2;
    device::CopyAsync16(device::SharedAddress(&to.distances[row][column]),
                        p.distances + (first + row) * kDim + column, true);
  }
  for (int i = thread; i < kSkeletonDesignTile * kDim / 4; i += T::kThreads) {
    const int row = i / (kDim / 4), column = i % (kDim / 4) * 4;
    device::CopyAsync16(device::SharedAddress(&to.keys[row][column]), p.keys + (first + row) * kDim + column,
                        true);
  }
  if (thread < kSkeletonDesignTile / 4) {
    device::CopyAsync16(device::SharedAddress(&to.target[4 * thread]), p.target + first + 4 * thread, true);
  }
  device::CopyAsyncCommit();
}

// `rows` and `columns`: the first sample of the warp's rows and columns, in steps of kRowStride and
// kColumnStride.
template <int kRowStride, int kColumnStride, typename Row, typename Column>
__device__ __forceinline__ void MultiplyTile(double (&c)[2][8][4], const Row* rows, const Column* columns) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  rows += lane % 4 * kRowStride + lane / 4;
  columns += lane % 4 * kColumnStride + lane / 4;
#pragma unroll 1
  for (int k = 0; k < kSkeletonDesignTile; k += 8) {
    double a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i][0] = rows[16 * i], a[i][1] = rows[16 * i + 8];
      a[i][2] = rows[4 * kRowStride + 16 * i], a[i][3] = rows[4 * kRowStride + 16 * i + 8];
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const double b0 = columns[8 * n], b1 = columns[4 * kColumnStride + 8 * n];
      MmaF64(c[0][n], a[0], b0, b1);
      MmaF64(c[1][n], a[1], b0, b1);
    }
    rows += 8 * kRowStride;
    columns += 8 * kColumnStride;
  }
}

// Adds a share of the batch to a share of a head's system.
template <int kDim>
__global__ void __launch_bounds__(GramTile<kDim>::kThreads, 2)
    GramKernel(const SkeletonParams p, bool is_first) {
  using T = GramTile<kDim>;
  extern __shared__ __align__(128) char shared[];
  auto* const buffers = reinterpret_cast<typename GramTile<kDim>::Buffer*>(shared);
  const int head = static_cast<int>(blockIdx.z), split = static_cast<int>(blockIdx.y);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x & 31);
  const GramTile<kDim> tile(static_cast<int>(blockIdx.x) * T::kWarps + warp);
  const int64_t samples = p.batch / p.splits, first = head * p.batch + split * samples;
  const int lead = p.system_rows();
  double* const system = p.system + (static_cast<int64_t>(head) * p.splits + split) * T::kColumns * lead;

  double c[2][8][4] = {}, side = 0;
  const int column = static_cast<int>(blockIdx.x * T::kThreads + threadIdx.x);
  const bool has_side = column < T::kColumns;  // of the right-hand side
  const int steps = static_cast<int>(samples / kSkeletonDesignTile);
  LoadDesign<kDim>(p, buffers[0], first);
  for (int i = 0; i < steps; ++i) {
    device::CopyAsyncWait<0>();
    __syncthreads();
    if (i + 1 < steps) {
      LoadDesign<kDim>(p, buffers[(i + 1) & 1], first + int64_t{i + 1} * kSkeletonDesignTile);
    }
    const auto& from = buffers[i & 1];
    if (tile.row < kDim) {
      MultiplyTile<T::kWideStride, T::kWideStride>(c, &from.distances[0][tile.row],
                                                   &from.distances[0][tile.column]);
    } else if (tile.column < kDim) {
      MultiplyTile<T::kStride, T::kWideStride>(c, &from.keys[0][tile.row - kDim],
                                               &from.distances[0][tile.column]);
    } else {
      MultiplyTile<T::kStride, T::kStride>(c, &from.keys[0][tile.row - kDim],
                                           &from.keys[0][tile.column - kDim]);
    }
    if (!has_side) continue;
    for (int n = 0; n < kSkeletonDesignTile; ++n) {
      side += (column < kDim ? from.distances[n][column] : from.keys[n][column - kDim]) *
              static_cast<double>(from.target[n]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        double* const to = system + (tile.column + 8 * n + 2 * (lane % 4) + e % 2) * lead + tile.row +
                           16 * i + lane / 4 + 8 * (e / 2);
        *to = is_first ? c[i][n][e] : *to + c[i][n][e];
      }
    }
  }
  if (has_side) {
    double* const to = system + column * lead + T::kColumns;
    *to = is_first ? side : *to + side;
  }
}

// Shares of systems into the first one's place.
__global__ void __launch_bounds__(256) SumSystemsKernel(const SkeletonParams p) {
  const int lead = p.system_rows(), columns = 2 * p.head_dim;
  const int at = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  const int column = at / lead, row = at % lead;
  if (column >= columns || row > columns || column / 64 * 64 > row / 32 * 32 + 31) return;
  double* const system = p.system + static_cast<int64_t>(blockIdx.y) * p.splits * columns * lead + at;
  double sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += system[static_cast<int64_t>(split) * columns * lead];
  *system = sum;
}

template <int kDim>
cudaError_t Launch(const SkeletonParams& p, bool is_first, cudaStream_t stream) {
  using T = GramTile<kDim>;
  constexpr int kShared = 2 * static_cast<int>(sizeof(typename T::Buffer));
  const cudaError_t error =
      cudaFuncSetAttribute(GramKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  GramKernel<kDim><<<dim3(T::kParts, p.splits, p.num_q_heads), T::kThreads, kShared, stream>>>(p, is_first);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchSkeletonDesign(const SkeletonParams& p, int64_t first, cudaStream_t stream) {
  constexpr int kSamples = kDesignWarps * kSamplesPerWarp;
  const dim3 grid(static_cast<unsigned>((p.batch + kSamples - 1) / kSamples), p.num_q_heads);
  if (p.head_dim == 128) {
    DesignKernel<128><<<grid, 32 * kDesignWarps, 0, stream>>>(p, first);
  } else {
    DesignKernel<64><<<grid, 32 * kDesignWarps, 0, stream>>>(p, first);
  }
  return cudaGetLastError();
}

cudaError_t LaunchSkeletonGram(const SkeletonParams& p, bool is_first, cudaStream_t stream) {
  return p.head_dim == 128 ? Launch<128>(p, is_first, stream) : Launch<64>(p, is_first, stream);
}

cudaError_t LaunchSkeletonSumSystems(const SkeletonParams& p, cudaStream_t stream) {
  const int entries = 2 * p.head_dim * p.system_rows();
  SumSystemsKernel<<<dim3((entries + 255) / 256, p.num_q_heads), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
