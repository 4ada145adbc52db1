// The model's vectors over distances and over keys, from the regression's coefficients.
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/sm90/skeleton_launch.h"
#include "kernels/cuda/sm90/skeleton_turns.cuh"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kHeads = 8;  // of a CTA, at most
constexpr int kTokens = kSkeletonFineTurns;

__device__ __forceinline__ double SumWarp(double x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, bit);
  return x;
}

// ln of the sum over the last row's interior of exp(logit), by a warp.
__device__ __forceinline__ double LastRowSum(const SkeletonParams& p, int head) {
  constexpr double kLn2 = 0.69314718055994530942;
  const int64_t parts = p.last_part_count();
  const float2* const part = p.last_parts + head * parts;
  float most = -INFINITY;
  for (int64_t i = threadIdx.x; i < parts; i += 32) most = fmaxf(most, part[i].x);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, bit));
  double sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += 32) {
    sum += static_cast<double>(part[i].y) * device::Exp2(part[i].x - most);
  }
  return kLn2 * most + log(SumWarp(sum));
}

// What the last row's means are worth, and zeta: a warp a head.
template <int kDim>
__global__ void __launch_bounds__(32) ConstantsKernel(const SkeletonParams p) {
  using Pairs = LanePairs<kDim>;
  const int head = static_cast<int>(blockIdx.x);
  const double *const alpha = p.coefficients + head * 2 * kDim + Pairs::First(), *const kappa = alpha + kDim;
  double per_pi[Pairs::kPairs];
  float2 step[Pairs::kPairs];
  LaneFrequencies<kDim>(p, per_pi, step);
  double2 key[Pairs::kPairs];
  MeanKey<kDim>(p, head / p.group(), p.rows - 1, per_pi, step, key);
  double slash = 0, vertical = 0;
#pragma unroll
  for (int e = 0; e < Pairs::kPairs; ++e) {
    const double2 mean = MeanTurn(p.local, p.rows, per_pi[e], p.inverse_sine[Pairs::First() + e]);
    slash += mean.x * alpha[e] - mean.y * alpha[Pairs::kHalf + e];
    vertical += key[e].x * kappa[e] + key[e].y * kappa[Pairs::kHalf + e];
  }
  slash = SumWarp(slash);
  vertical = SumWarp(vertical);
  const double last = LastRowSum(p, head);
  if (threadIdx.x > 0) return;
  const int64_t at = head * p.num_tokens + p.num_tokens - 1;
  const double mu = p.mu[at], sigma = p.sigma[at];
  p.constants[head * 3] = slash;
  p.constants[head * 3 + 1] = vertical;
  p.constants[head * 3 + 2] = mu + sigma * sigma / 2 + log(static_cast<double>(p.rows)) - last;
}

// Writes a value of each of a CTA's tokens and heads, and the largest of each 64 tokens. kTokens threads.
__device__ __forceinline__ void WriteTerms(const SkeletonParams& p, int64_t first, int first_head, int heads,
                                           const float (&values)[kHeads], float* out, float* most) {
  __shared__ float largest[kTokens / 32][kHeads];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int64_t token = first + thread;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (i >= heads) break;
    float value = -INFINITY;
    if (token < p.num_tokens) out[(first_head + i) * p.num_tokens + token] = value = values[i];
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, bit));
    if (thread % 32 == 0) largest[warp][i] = value;
  }
  __syncthreads();
  const int head = thread / 2, half = thread % 2;
  const int64_t block = first / kSkeletonPairTokens + half;
  if (head >= heads || block >= p.pair_blocks()) return;
  most[(first_head + head) * p.pair_blocks() + block] =
      fmaxf(largest[2 * half][head], largest[2 * half + 1][head]);
}

// s of kTokens distances and kHeads heads, in f64: low frequencies may have large coefficients. Coefficients
// are turned by the first distance, so that one table serves all CTAs.
__global__ void __launch_bounds__(kTokens) SlashKernel(const SkeletonParams p) {
  __shared__ double2 turned[64][kHeads];
  const int first_head = static_cast<int>(blockIdx.y) * kHeads, half = p.head_dim / 2;
  const int heads = min(kHeads, p.num_q_heads - first_head);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  for (int m = static_cast<int>(threadIdx.x); m < half; m += kTokens) {
    const double2 turn = TurnOf(static_cast<double>(first), p.per_pi[m]);
    for (int i = 0; i < kHeads; ++i) {
      double2 a = make_double2(0, 0);
      if (i < heads) {
        const double* const alpha = p.coefficients + static_cast<int64_t>(first_head + i) * 4 * half + m;
        a = make_double2(alpha[0] * turn.x - alpha[half] * turn.y, alpha[0] * turn.y + alpha[half] * turn.x);
      }
      turned[m][i] = a;
    }
  }
  __syncthreads();
  double sums[kHeads] = {};
  for (int m = 0; m < half; ++m) {
    const double2 turn = p.turns[m * kTokens + threadIdx.x];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const double2 a = turned[m][i];
      sums[i] += turn.x * a.x - turn.y * a.y;
    }
  }
  float values[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    values[i] = i < heads ? static_cast<float>(sums[i] - p.constants[(first_head + i) * 3]) : 0.0f;
  }
  WriteTerms(p, first, first_head, heads, values, p.s, p.s_most);
}

// v of kTokens keys and the query heads of a KV head, at most kGroup, likewise. A thread has a token.
template <int kDim, int kGroup>
__global__ void __launch_bounds__(kTokens) VerticalKernel(const SkeletonParams p) {
  using Rows = device::MmaRows<kDim>;
  constexpr int kHalf = kDim / 2;
  __shared__ __align__(128) char keys[kTokens * kDim * 2];
  __shared__ __align__(16) float2 turned[kHalf][kGroup];
  const int kv_head = static_cast<int>(blockIdx.x % p.num_kv_heads), heads = p.group();
  const int first_head = kv_head * heads, thread = static_cast<int>(threadIdx.x);
  const int64_t first = blockIdx.x / p.num_kv_heads * static_cast<int64_t>(kTokens);
  const auto* const k = static_cast<const __nv_bfloat16*>(p.k);
  Rows::template Load<kTokens, kTokens>(
      device::SharedAddress(keys), thread, k, [&](int i) -> const __nv_bfloat16* {
        return first + i < p.num_tokens ? k + ((first + i) * p.num_kv_heads + kv_head) * kDim : nullptr;
      });
  device::CopyAsyncCommit();
  for (int m = thread; m < kHalf; m += kTokens) {
    const double2 turn = TurnOf(static_cast<double>(first), p.per_pi[m]);
    for (int i = 0; i < kGroup; ++i) {
      float2 b = make_float2(0, 0);
      if (i < heads) {
        const double* const kappa =
            p.coefficients + static_cast<int64_t>(first_head + i) * 2 * kDim + kDim + m;
        b = make_float2(static_cast<float>(kappa[0] * turn.x - kappa[kHalf] * turn.y),
                        static_cast<float>(kappa[0] * turn.y + kappa[kHalf] * turn.x));
      }
      turned[m][i] = b;
    }
  }
  device::CopyAsyncWait<0>();
  __syncthreads();
  float sums[kGroup] = {};
  for (int chunk = 0; chunk < kHalf / 8; ++chunk) {
    float x[8], y[8];
    device::Widen(*reinterpret_cast<const uint4*>(keys + Rows::At(0, thread, chunk)), x);
    device::Widen(*reinterpret_cast<const uint4*>(keys + Rows::At(0, thread, chunk + kHalf / 8)), y);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int m = 8 * chunk + i;
      const float2 z = TurnBack(make_float2(x[i], y[i]), p.turns_f32[m * kTokens + thread]);
#pragma unroll
      for (int head = 0; head < kGroup; ++head) {
        const float2 b = turned[m][head];
        sums[head] += z.x * b.x + z.y * b.y;
      }
    }
  }
  float values[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    values[i] = 0;
    if (i < heads) values[i] = static_cast<float>(sums[i % kGroup] - p.constants[(first_head + i) * 3 + 1]);
  }
  WriteTerms(p, first, first_head, heads, values, p.v, p.v_block);
}

template <int kDim>
void LaunchVertical(const SkeletonParams& p, unsigned tiles, cudaStream_t stream) {
  const unsigned grid = tiles * p.num_kv_heads;
  if (p.group() == 1) {
    VerticalKernel<kDim, 1><<<grid, kTokens, 0, stream>>>(p);
  } else if (p.group() == 2) {
    VerticalKernel<kDim, 2><<<grid, kTokens, 0, stream>>>(p);
  } else if (p.group() <= 4) {
    VerticalKernel<kDim, 4><<<grid, kTokens, 0, stream>>>(p);
  } else {
    VerticalKernel<kDim, 8><<<grid, kTokens, 0, stream>>>(p);
  }
}

}  // namespace

cudaError_t LaunchSkeletonTerms(const SkeletonParams& p, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((p.num_tokens + kTokens - 1) / kTokens);
  const dim3 slash(tiles, (p.num_q_heads + kHeads - 1) / kHeads);
  if (p.head_dim == 128) {
    ConstantsKernel<128><<<p.num_q_heads, 32, 0, stream>>>(p);
    SlashKernel<<<slash, kTokens, 0, stream>>>(p);
    LaunchVertical<128>(p, tiles, stream);
  } else {
    ConstantsKernel<64><<<p.num_q_heads, 32, 0, stream>>>(p);
    SlashKernel<<<slash, kTokens, 0, stream>>>(p);
    LaunchVertical<64>(p, tiles, stream);
  }
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
