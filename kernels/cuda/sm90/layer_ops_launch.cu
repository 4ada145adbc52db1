// The element-wise operations that need no shared tile: 16 bytes a load, one CTA per row or piece of a row.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/device/e4m3.cuh"
#include "kernels/cuda/device/vectors.cuh"
#include "kernels/cuda/sm90/layer_ops_launch.h"

namespace headwater::kernels::sm90 {
namespace {

using namespace headwater::kernels::device;  // NOLINT: the kernels are written in these

constexpr int kMostThreads = 256;

// Threads of a CTA that walks a row of `width` elements, 8 a thread and step.
int RowThreads(int64_t width) {
  const int64_t chunks = (width / 8 + 31) / 32 * 32;
  return static_cast<int>(chunks < kMostThreads ? chunks : kMostThreads);
}

// --- embedding ---

template <typename Out>
__global__ void __launch_bounds__(kMostThreads) EmbedKernel(const CudaEmbedTokensArgs p) {
  const int64_t token = blockIdx.x;
  const int64_t id = p.ids[token];
  const bool known = id >= 0 && id < p.vocab;
  const auto* const row = static_cast<const __nv_bfloat16*>(p.table) + (known ? id : 0) * p.width;
  Out* const out = static_cast<Out*>(p.out) + token * p.width;
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * 8; at < p.width;
       at += static_cast<int64_t>(blockDim.x) * 8) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = NAN;
    if (known) Load8(row, at, x);
    Store8(out, at, x);
  }
}

// --- RMS norm ---

// The CTA's sum; every thread gets the same bits. One use of `shared` per launch.
__device__ __forceinline__ float SumThreads(float x, float* shared) {
  x = SumLanes(x, 1, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total = __fadd_rn(total, shared[warp]);
  return total;
}

// One row a CTA, which stays in registers between its sum and its use: kChunks times 8 elements a thread.
template <typename X, typename Weight, bool kQuantized, int kChunks>
__global__ void __launch_bounds__(kMostThreads) RmsNormKernel(const CudaRmsNormArgs p) {
  __shared__ float shared[kMostThreads / 32];
  X* const row = static_cast<X*>(p.x) + blockIdx.x * p.width;
  const auto* const delta =
      p.delta == nullptr ? nullptr : static_cast<const __nv_bfloat16*>(p.delta) + blockIdx.x * p.width;
  float x[kChunks][8];
  float square = 0;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t at = (chunk * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 8;
    if (at >= p.width) continue;
    Load8(row, at, x[chunk]);
    if (delta != nullptr) {
      float more[8];
      Load8(delta, at, more);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[chunk][i] += more[i];
      Store8(row, at, x[chunk]);
      RoundAs(row, x[chunk]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) square = __fmaf_rn(x[chunk][i], x[chunk][i], square);
  }
  const float mean = SumThreads(square, shared) / static_cast<float>(p.width);
  const float scale = 1.0f / sqrtf(mean + p.epsilon);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t at = (chunk * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 8;
    if (at >= p.width) continue;
    float weight[8];
    Load8(static_cast<const Weight*>(p.weight), at, weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[chunk][i] *= scale * weight[i];
    if constexpr (!kQuantized)
      Store8(static_cast<__nv_bfloat16*>(p.out) + blockIdx.x * p.width, at, x[chunk]);
  }
  if constexpr (kQuantized) {
    __shared__ float maxima[kMostThreads / 32];
    StoreQuantized(x, p.width, static_cast<uint8_t*>(p.out) + blockIdx.x * p.width, p.scale + blockIdx.x,
                   maxima);
  }
}

template <typename X, typename Weight, bool kQuantized>
void LaunchNorm(const CudaRmsNormArgs& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(p.num_tokens);
  const int threads = RowThreads(p.width);
  const int64_t chunks = (p.width / 8 + threads - 1) / threads;
  if (chunks <= 1) {
    RmsNormKernel<X, Weight, kQuantized, 1><<<grid, threads, 0, stream>>>(p);
  } else if (chunks <= 2) {
    RmsNormKernel<X, Weight, kQuantized, 2><<<grid, threads, 0, stream>>>(p);
  } else if (chunks <= 4) {
    RmsNormKernel<X, Weight, kQuantized, 4><<<grid, threads, 0, stream>>>(p);
  } else {
    RmsNormKernel<X, Weight, kQuantized, 8><<<grid, threads, 0, stream>>>(p);
  }
}
static_assert(kMaxNormWidth <= 8 * 8 * kMostThreads);

template <typename X, typename Weight>
void LaunchNormOf(const CudaRmsNormArgs& p, cudaStream_t stream) {
  p.scale != nullptr ? LaunchNorm<X, Weight, true>(p, stream) : LaunchNorm<X, Weight, false>(p, stream);
}

// --- rotary table ---

// cos and sin of position * inverse. The product is kept whole: what its rounding left out, at most half a
// unit of the angle, is rotated in afterwards.
__device__ __forceinline__ void CosSin(double position, double inverse, double factor, float* cos,
                                       float* sin) {
  const double angle = __dmul_rn(position, inverse), rest = __fma_rn(position, inverse, -angle);
  double c, s, rest_cos = 1 - 0.5 * rest * rest, rest_sin = rest - rest * rest * rest / 6;
  sincos(angle, &s, &c);
  // The two terms of the series are exact to double below this.
  if (!(fabs(rest) < 1e-4)) sincos(rest, &rest_sin, &rest_cos);
  *cos = static_cast<float>((c * rest_cos - s * rest_sin) * factor);
  *sin = static_cast<float>((s * rest_cos + c * rest_sin) * factor);
}

__global__ void __launch_bounds__(kMostThreads) RopeTableKernel(const __grid_constant__ CudaRopeTableArgs p) {
  const int half = p.head_dim / 2;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kMostThreads + threadIdx.x;
  const int64_t row = element / half;
  if (row >= p.num_tokens) return;
  const int pair = static_cast<int>(element % half);
  int64_t position = p.begin + row;
  if (p.positions_i32 != nullptr) position = p.positions_i32[row];
  if (p.positions_i64 != nullptr) position = p.positions_i64[row];
  const double inverse = p.inverse_device != nullptr ? p.inverse_device[pair] : p.inverse[pair];
  CosSin(static_cast<double>(position), inverse, p.attention_factor, p.cos + element, p.sin + element);
}

// --- gated activation ---

constexpr int kSiluChunks = 4;  // of a thread

__global__ void __launch_bounds__(kMostThreads) SiluMulKernel(const CudaSiluMulArgs p, int pieces) {
  const int64_t row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const auto* const gate = static_cast<const __nv_bfloat16*>(p.gate_up) + row * 2 * p.width;
  auto* const out = static_cast<__nv_bfloat16*>(p.out) + row * p.width;
  uint4 gates[kSiluChunks], ups[kSiluChunks];
  const int64_t first = (piece * kSiluChunks * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 8;
  const int64_t step = static_cast<int64_t>(blockDim.x) * 8;
#pragma unroll
  for (int i = 0; i < kSiluChunks; ++i) {
    if (first + i * step >= p.width) break;
    gates[i] = __ldcs(reinterpret_cast<const uint4*>(gate + first + i * step));
    ups[i] = __ldcs(reinterpret_cast<const uint4*>(gate + p.width + first + i * step));
  }
#pragma unroll
  for (int i = 0; i < kSiluChunks; ++i) {
    if (first + i * step >= p.width) break;
    float g[8], u[8];
    Widen(gates[i], g);
    Widen(ups[i], u);
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = g[j] / (1.0f + expf(-g[j])) * u[j];
    Store8(out, first + i * step, g);
  }
}

// --- finiteness ---

constexpr int kFiniteChunks = 8;  // of a thread

template <typename X>
__global__ void __launch_bounds__(kMostThreads) FirstNonFiniteKernel(const CudaFirstNonFiniteRowArgs p) {
  const int64_t count = p.num_tokens * p.width;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kFiniteChunks) * kMostThreads + threadIdx.x) * 8;
  int64_t bad = -1;
#pragma unroll
  for (int i = kFiniteChunks - 1; i >= 0; --i) {
    const int64_t at = first + static_cast<int64_t>(i) * kMostThreads * 8;
    if (at >= count) continue;
    float x[8];
    Load8(static_cast<const X*>(p.x), at, x);
#pragma unroll
    for (int j = 0; j < 8; ++j) bad = isfinite(x[j]) ? bad : at;
  }
  // -1 is the largest unsigned number, so the minimum is right from the start. Later lanes hold later rows of
  // the same step only: all ask, but not where an earlier row is known.
  auto* const row = reinterpret_cast<unsigned long long*>(p.row);
  if (bad < 0) return;
  const auto mine = static_cast<unsigned long long>(bad / p.width);
  if (mine < *reinterpret_cast<volatile unsigned long long*>(row)) atomicMin(row, mine);
}

// --- small copies to the host ---

__global__ void __launch_bounds__(kMostThreads)
    StoreToHostKernel(const uint32_t* from, uint32_t* to, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    to[i] = from[i];
}

// --- packing of K and V ---

constexpr float kMostF16 = 65504;

// Finite values stay finite; says whether any was out of range or not finite to begin with.
__device__ __forceinline__ bool ClampToF16(float (&x)[8]) {
  bool bad = false;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bad |= !(fabsf(x[i]) <= kMostF16);
    if (isfinite(x[i])) x[i] = fminf(fmaxf(x[i], -kMostF16), kMostF16);
  }
  return bad;
}

__device__ __forceinline__ uint32_t PackF16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 8 elements, `bits` on the wire; true: one of them is a problem.
template <DType kWire>
__device__ __forceinline__ bool StoreWire(char* to, const uint4& bits) {
  float x[8];
  Widen(bits, x);
  bool bad = false;
  if constexpr (kWire == DType::kF16) {
    bad = ClampToF16(x);
    *reinterpret_cast<uint4*>(to) =
        make_uint4(PackF16(x[0], x[1]), PackF16(x[2], x[3]), PackF16(x[4], x[5]), PackF16(x[6], x[7]));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) bad |= !isfinite(x[i]);
    if constexpr (kWire == DType::kF32) {
      Store8(reinterpret_cast<float*>(to), 0, x);
    } else {
      *reinterpret_cast<uint4*>(to) = bits;
    }
  }
  return bad;
}

// Grid: runs times pieces, K and V. The CTAs of a run walk it together.
template <DType kWire>
__global__ void __launch_bounds__(kMostThreads) PackKvKernel(const CudaPackKvArgs p, int pieces) {
  constexpr int kUnroll = 4;
  constexpr int64_t kBytes = kWire == DType::kF32 ? 32 : 16;  // of 8 elements
  const bool is_v = blockIdx.y == 1;
  char* const destination = static_cast<char*>(is_v ? p.v_destination : p.k_destination);
  if (destination == nullptr) return;
  const CudaTokenRun run = p.runs[blockIdx.x / pieces];
  const int64_t row = static_cast<int64_t>(p.num_kv_heads) * p.head_dim / 8;  // chunks of a token
  const int64_t room = (p.destination_bytes - run.destination_offset) / (row * kBytes);
  if (run.source_token < 0 || run.count < 0 || run.source_token > p.num_tokens ||
      run.count > p.num_tokens - run.source_token || run.destination_offset < 0 ||
      run.destination_offset % 16 != 0 || run.destination_offset > p.destination_bytes || run.count > room) {
    if (threadIdx.x == 0 && p.problems != nullptr) atomicOr(p.problems, CudaPackKvArgs::kBadRun);
    return;
  }
  const uint4* const from = static_cast<const uint4*>(is_v ? p.v : p.k) + run.source_token * row;
  char* const to = destination + run.destination_offset;
  const int64_t chunks = run.count * row, step = static_cast<int64_t>(pieces) * kMostThreads;
  bool bad = false;
  for (int64_t first = static_cast<int64_t>(blockIdx.x % pieces) * kMostThreads + threadIdx.x; first < chunks;
       first += kUnroll * step) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * step < chunks) bits[i] = __ldcs(from + first + i * step);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t chunk = first + i * step;
      if (chunk < chunks) bad |= StoreWire<kWire>(to + chunk * kBytes, bits[i]);
    }
  }
  if (bad && p.problems != nullptr) atomicOr(p.problems, CudaPackKvArgs::kNotRepresentable);
}

}  // namespace

cudaError_t LaunchEmbedTokens(const CudaEmbedTokensArgs& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(p.num_tokens);
  if (p.out_dtype == DType::kF32) {
    EmbedKernel<float><<<grid, RowThreads(p.width), 0, stream>>>(p);
  } else {
    EmbedKernel<__nv_bfloat16><<<grid, RowThreads(p.width), 0, stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t LaunchRmsNorm(const CudaRmsNormArgs& p, cudaStream_t stream) {
  const bool wide_weight = p.weight_dtype == DType::kF32;
  if (p.x_dtype == DType::kF32) {
    wide_weight ? LaunchNormOf<float, float>(p, stream) : LaunchNormOf<float, __nv_bfloat16>(p, stream);
  } else {
    wide_weight ? LaunchNormOf<__nv_bfloat16, float>(p, stream)
                : LaunchNormOf<__nv_bfloat16, __nv_bfloat16>(p, stream);
  }
  return cudaGetLastError();
}

cudaError_t LaunchRopeTable(const CudaRopeTableArgs& p, cudaStream_t stream) {
  const int64_t elements = p.num_tokens * (p.head_dim / 2);
  const auto grid = static_cast<unsigned>((elements + kMostThreads - 1) / kMostThreads);
  RopeTableKernel<<<grid, kMostThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchSiluMul(const CudaSiluMulArgs& p, cudaStream_t stream) {
  const int threads = RowThreads(p.width);
  const int64_t piece = int64_t{8} * kSiluChunks * threads, pieces = (p.width + piece - 1) / piece;
  SiluMulKernel<<<static_cast<unsigned>(p.num_tokens * pieces), threads, 0, stream>>>(
      p, static_cast<int>(pieces));
  return cudaGetLastError();
}

cudaError_t LaunchFirstNonFiniteRow(const CudaFirstNonFiniteRowArgs& p, cudaStream_t stream) {
  constexpr int64_t kPiece = int64_t{8} * kFiniteChunks * kMostThreads;
  const auto grid = static_cast<unsigned>((p.num_tokens * p.width + kPiece - 1) / kPiece);
  if (p.dtype == DType::kF32) {
    FirstNonFiniteKernel<float><<<grid, kMostThreads, 0, stream>>>(p);
  } else {
    FirstNonFiniteKernel<__nv_bfloat16><<<grid, kMostThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t LaunchStoreToHost(const uint32_t* from, uint32_t* to, int64_t count, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 32;
  const auto grid = static_cast<unsigned>(std::min((count + kMostThreads - 1) / kMostThreads, kMostBlocks));
  StoreToHostKernel<<<grid, kMostThreads, 0, stream>>>(from, to, count);
  return cudaGetLastError();
}

cudaError_t LaunchPackKv(const CudaPackKvArgs& p, int num_sms, cudaStream_t stream) {
  // Four CTAs an SM for each of K and V, and at least one for each run.
  const int64_t wanted = (int64_t{num_sms} * 4 + p.num_runs - 1) / p.num_runs;
  const dim3 grid(static_cast<unsigned>(wanted * p.num_runs), p.v_destination != nullptr ? 2 : 1);
  const int pieces = static_cast<int>(wanted);
  switch (p.wire_dtype) {
    case DType::kF32:
      PackKvKernel<DType::kF32><<<grid, kMostThreads, 0, stream>>>(p, pieces);
      break;
    case DType::kF16:
      PackKvKernel<DType::kF16><<<grid, kMostThreads, 0, stream>>>(p, pieces);
      break;
    default:
      PackKvKernel<DType::kBF16><<<grid, kMostThreads, 0, stream>>>(p, pieces);
  }
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
