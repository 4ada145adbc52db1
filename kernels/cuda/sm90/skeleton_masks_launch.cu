// From the model's vectors to masks: running sums over keys and distances, what each row is short of, blocks'
// maxima, thresholds and the test of pairs of blocks.
#include "kernels/cuda/sm90/skeleton_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kThreads = 256, kWarps = kThreads / 32, kPerThread = kSkeletonScanRows / kThreads;

__device__ __forceinline__ double2 Plus(double2 a, double2 b) { return make_double2(a.x + b.x, a.y + b.y); }

__device__ __forceinline__ double2 SumWarp(double2 x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    x = Plus(x, make_double2(__shfl_xor_sync(kAll, x.x, bit), __shfl_xor_sync(kAll, x.y, bit)));
  }
  return x;
}

// Over a CTA, in a fixed order; every thread gets it. Begins with a barrier, so that calls may follow each
// other.
__device__ __forceinline__ double2 SumCta(double2 x) {
  __shared__ double2 sums[kWarps];
  x = SumWarp(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double2 sum = sums[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum = Plus(sum, sums[i]);
  return sum;
}

// Of all threads before this one.
__device__ __forceinline__ double2 SumBefore(double2 x) {
  __shared__ double2 sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  double2 through = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double2 other =
        make_double2(__shfl_up_sync(kAll, through.x, step), __shfl_up_sync(kAll, through.y, step));
    if (lane >= step) through = Plus(through, other);
  }
  __syncthreads();
  if (lane == 31) sums[warp] = through;
  __syncthreads();
  double2 before = make_double2(__shfl_up_sync(kAll, through.x, 1), __shfl_up_sync(kAll, through.y, 1));
  if (lane == 0) before = make_double2(0, 0);
  for (int i = 0; i < warp; ++i) before = Plus(before, sums[i]);
  return before;
}

// (s, v) of the distance and the key that row p's interior has more than that of row p - 1.
__device__ __forceinline__ double2 Newest(const SkeletonParams& p, int head, int64_t row) {
  if (row >= p.rows) return make_double2(0, 0);
  const int64_t at = head * p.num_tokens + row;
  return make_double2(p.s[at + p.local], p.v[at + p.sinks]);
}

// Sums of s and v over the scan blocks before this CTA's.
__device__ __forceinline__ double2 BlocksBefore(const SkeletonParams& p, int head) {
  const double2* const sums = p.scan_sums + head * p.scan_blocks();
  double2 before = make_double2(0, 0);
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(blockIdx.x); i += kThreads)
    before = Plus(before, sums[i]);
  return SumCta(before);
}

__global__ void __launch_bounds__(kThreads) ScanSumsKernel(const SkeletonParams p) {
  const int head = static_cast<int>(blockIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSkeletonScanRows;
  double2 sum = make_double2(0, 0);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sum = Plus(sum, Newest(p, head, first + i * kThreads + threadIdx.x));
  sum = SumCta(sum);
  if (threadIdx.x == 0) p.scan_sums[head * p.scan_blocks() + blockIdx.x] = sum;
}

// delta and h.
__global__ void __launch_bounds__(kThreads) RowsKernel(const SkeletonParams p) {
  const int head = static_cast<int>(blockIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSkeletonScanRows + threadIdx.x * kPerThread;
  const double zeta = p.constants[head * 3 + 2];
  double2 newest[kPerThread], own = make_double2(0, 0);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    newest[i] = Newest(p, head, first + i);
    own = Plus(own, newest[i]);
  }
  double2 sum = Plus(BlocksBefore(p, head), SumBefore(own));
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t row = first + i;
    sum = Plus(sum, newest[i]);
    if (row >= p.rows) break;
    const int64_t at = head * p.num_tokens + row + p.sinks + p.local;
    const auto count = static_cast<double>(row + 1);
    const auto delta = static_cast<float>((sum.x + sum.y) / count);
    // nu, as the logarithm of a sum of two exponentials.
    const float sigma = p.sigma[at], local = logf(p.lambda[at]);
    const float inner = logf(static_cast<float>(count)) + (0.5f * sigma * sigma - static_cast<float>(zeta));
    const float most = fmaxf(local, inner), least = local + inner - most;
    const float nu = fabsf(most) == INFINITY ? most : most + log1pf(expf(least - most));
    p.delta[at] = delta;
    p.h[at] = -delta - nu;
  }
}

// s_block and h_block; a warp a block.
__global__ void __launch_bounds__(kThreads) BlocksKernel(const SkeletonParams p) {
  const int head = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (block >= p.pair_blocks()) return;
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < kSkeletonPairTokens / 32; ++i) {
    const int64_t token = block * kSkeletonPairTokens + 32 * i + lane;
    if (token >= p.sinks + p.local && token < p.num_tokens)
      most = fmaxf(most, p.h[head * p.num_tokens + token]);
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, bit));
  if (lane > 0) return;
  const int64_t at = head * p.pair_blocks() + block;
  p.h_block[at] = most;
  p.s_block[at] = block == 0 ? p.s_most[at] : 0.5f * (p.s_most[at - 1] + p.s_most[at]);
}

__global__ void ThresholdKernel(float* tau, int heads, float value) {
  const int head = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (head < heads) tau[head] = value;
}

// Sums of s + v + h over the interior, and of its square. With S(e) the sum of s over the first e + 1
// interior distances, that of s v is over keys u of v(u) S(rows - 1 - u); those of s h and v h are delta's.
__global__ void __launch_bounds__(kThreads) SpreadKernel(const SkeletonParams p) {
  const int head = static_cast<int>(blockIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSkeletonScanRows + threadIdx.x * kPerThread;
  double2 newest[kPerThread], own = make_double2(0, 0);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    newest[i] = Newest(p, head, first + i);
    own = Plus(own, newest[i]);
  }
  double before = BlocksBefore(p, head).x + SumBefore(own).x;
  double2 sum = make_double2(0, 0);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t row = first + i;
    before += newest[i].x;
    if (row >= p.rows) break;
    const int64_t at = head * p.num_tokens + row + p.sinks + p.local;
    const double h = p.h[at], delta = p.delta[at], s = newest[i].x, v = newest[i].y;
    const auto as_row = static_cast<double>(row + 1), as_key = static_cast<double>(p.rows - row);
    const double other = Newest(p, head, p.rows - 1 - row).y;
    sum.x += (s + v) * as_key + h * as_row;
    sum.y += (s * s + v * v) * as_key + h * as_row * (h + 2 * delta) + 2 * other * before;
  }
  sum = SumCta(sum);
  if (threadIdx.x == 0) p.spread_sums[head * p.scan_blocks() + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) BudgetKernel(const SkeletonParams p, double quantile) {
  const int64_t blocks = p.scan_blocks();
  const double2* const sums = p.spread_sums + blockIdx.x * blocks;
  double2 sum = make_double2(0, 0);
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum = Plus(sum, sums[i]);
  sum = SumCta(sum);
  if (threadIdx.x > 0) return;
  const double count = 0.5 * static_cast<double>(p.rows) * (static_cast<double>(p.rows) + 1);
  const double mean = sum.x / count, variance = sum.y / count - mean * mean;
  p.tau[blockIdx.x] = static_cast<float>(mean + quantile * (variance < 0 ? 0.0 : sqrt(variance)));
}

// A CTA a tile of a head, a lane a block.
__global__ void __launch_bounds__(128) MasksKernel(const SkeletonParams p) {
  constexpr int kPair = kSkeletonPairTokens;
  const int head = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t tile = blockIdx.x, blocks = p.pair_blocks(), words = ((p.num_tokens + 127) / 128 + 31) / 32;
  const float *const s = p.s_block + head * blocks, *const v = p.v_block + head * blocks;
  const float tau = p.tau[head];
  float h[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) h[r] = 2 * tile + r < blocks ? p.h_block[head * blocks + 2 * tile + r] : 0.0f;
  uint32_t* const out = p.words + (head * static_cast<int64_t>(gridDim.x) + tile) * words;
  for (int64_t word = threadIdx.x / 32; word < words; word += 4) {
    const int64_t block = word * 32 + lane;
    bool keep = false;
    if (word * 32 > tile) {
      if (lane == 0) out[word] = 0;
      continue;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t row = 2 * tile + r, column = 2 * block + c;
        if (column > row || row >= blocks) continue;
        const bool forced = column * kPair < p.sinks || (row - column) * kPair - (kPair - 1) < p.local;
        keep |= forced || s[row - column] + v[column] + h[r] >= tau;
      }
    }
    const uint32_t bits = __ballot_sync(kAll, keep);
    if (lane == 0) out[word] = bits;
  }
}

}  // namespace

cudaError_t LaunchSkeletonRows(const SkeletonParams& p, cudaStream_t stream) {
  const dim3 scan(static_cast<unsigned>(p.scan_blocks()), p.num_q_heads);
  ScanSumsKernel<<<scan, kThreads, 0, stream>>>(p);
  RowsKernel<<<scan, kThreads, 0, stream>>>(p);
  const auto blocks = static_cast<unsigned>((p.pair_blocks() + kWarps - 1) / kWarps);
  BlocksKernel<<<dim3(blocks, p.num_q_heads), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchSkeletonThreshold(const SkeletonParams& p, float tau, cudaStream_t stream) {
  ThresholdKernel<<<(p.num_q_heads + 127) / 128, 128, 0, stream>>>(p.tau, p.num_q_heads, tau);
  return cudaGetLastError();
}

cudaError_t LaunchSkeletonSpread(const SkeletonParams& p, double quantile, cudaStream_t stream) {
  SpreadKernel<<<dim3(static_cast<unsigned>(p.scan_blocks()), p.num_q_heads), kThreads, 0, stream>>>(p);
  BudgetKernel<<<p.num_q_heads, kThreads, 0, stream>>>(p, quantile);
  return cudaGetLastError();
}

cudaError_t LaunchSkeletonMasks(const SkeletonParams& p, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((p.num_tokens + 127) / 128);
  MasksKernel<<<dim3(tiles, p.num_q_heads), 128, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
