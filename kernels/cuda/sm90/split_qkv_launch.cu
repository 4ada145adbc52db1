// Takes apart a fused QKV projection: norm, rotation and block statistics on the way. One read of qkv.
//
// Grid: per block of 128 tokens, ceil(query heads / 4) CTAs for Q and one per head of K and of V, blocks
// slowest: CTAs in flight read neighbouring rows. The 4 query heads of a CTA share what it reads of cos and
// sin, which would otherwise be as many bytes from L2 as qkv is.
#include "kernels/cuda/sm90/block_stats_tile.cuh"
#include "kernels/cuda/sm90/layer_ops_launch.h"

namespace headwater::kernels::sm90 {
namespace {

// A thread's columns of a norm's weight, and how to use them.
struct HeadNorm {
  float weight[2][8];
  float epsilon;
  bool present;

  template <class Tile>
  __device__ __forceinline__ void Load(const void* norm, bool is_f32, float eps) {
    present = norm != nullptr;
    epsilon = eps;
    if (!present) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = half * (Tile::kHeadDim / 2) + Tile::Lane() * 8;
      if (is_f32) {
        Load8(static_cast<const float*>(norm), column, weight[half]);
      } else {
        Load8(static_cast<const __nv_bfloat16*>(norm), column, weight[half]);
      }
    }
  }
};

// A thread's cos and sin of a token.
struct Rotation {
  float cos[8], sin[8];

  template <class Tile>
  __device__ __forceinline__ void Load(const CudaSplitQkvArgs& p, int64_t token) {
    const int64_t at = token * (Tile::kHeadDim / 2) + Tile::Lane() * 8;
    Load8(p.cos, at, cos);
    Load8(p.sin, at, sin);
  }
};

template <class Tile>
__device__ __forceinline__ RowPart LoadRow(const __nv_bfloat16* head) {
  const __nv_bfloat16* const row = head + Tile::Lane() * 8;
  return {__ldcs(reinterpret_cast<const uint4*>(row)),
          __ldcs(reinterpret_cast<const uint4*>(row + Tile::kHeadDim / 2))};
}

template <class Tile>
__device__ __forceinline__ void StoreRow(__nv_bfloat16* head, const RowPart& part) {
  __nv_bfloat16* const row = head + Tile::Lane() * 8;
  *reinterpret_cast<uint4*>(row) = part.low;
  *reinterpret_cast<uint4*>(row + Tile::kHeadDim / 2) = part.high;
}

// All threads of a warp together.
template <class Tile>
__device__ __forceinline__ RowPart NormaliseAndRotate(const RowPart& part, const HeadNorm& norm,
                                                      const Rotation& rotation) {
  float a[8], b[8];
  Widen(part.low, a);
  Widen(part.high, b);
  if (norm.present) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) square = __fmaf_rn(a[i], a[i], __fmaf_rn(b[i], b[i], square));
    square = SumLanes(square, 1, Tile::kLanes);
    const float scale = 1.0f / sqrtf(square / Tile::kHeadDim + norm.epsilon);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      a[i] *= scale * norm.weight[0][i];
      b[i] *= scale * norm.weight[1][i];
    }
  }
  float low[8], high[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    low[i] = a[i] * rotation.cos[i] - b[i] * rotation.sin[i];
    high[i] = b[i] * rotation.cos[i] + a[i] * rotation.sin[i];
  }
  return {Narrow(low), Narrow(high)};
}

template <class Tile>
__device__ __forceinline__ void SplitQueries(const CudaSplitQkvArgs& p, int64_t begin, int tokens,
                                             int first_head) {
  const int64_t row = (p.num_q_heads + 2 * static_cast<int64_t>(p.num_kv_heads)) * Tile::kHeadDim;
  HeadNorm norm;
  norm.Load<Tile>(p.q_norm, p.norm_dtype == DType::kF32, p.epsilon);
#pragma unroll 1
  for (int step = 0; step < Tile::kSteps; ++step) {
    const bool exists = Tile::Row(step) < tokens;
    const int64_t token = begin + Tile::Row(step);
    const __nv_bfloat16* const from =
        static_cast<const __nv_bfloat16*>(p.qkv) + token * row + first_head * Tile::kHeadDim;
    __nv_bfloat16* const to =
        static_cast<__nv_bfloat16*>(p.q) + (token * p.num_q_heads + first_head) * Tile::kHeadDim;
    RowPart parts[kSplitQueryHeads] = {};
    Rotation rotation = {};
    if (exists) {
#pragma unroll
      for (int i = 0; i < kSplitQueryHeads; ++i) {
        if (first_head + i < p.num_q_heads) parts[i] = LoadRow<Tile>(from + i * Tile::kHeadDim);
      }
      rotation.Load<Tile>(p, token);
    }
#pragma unroll
    for (int i = 0; i < kSplitQueryHeads; ++i) {
      if (first_head + i >= p.num_q_heads) break;
      const RowPart out = NormaliseAndRotate<Tile>(parts[i], norm, rotation);
      if (exists) StoreRow<Tile>(to + i * Tile::kHeadDim, out);
    }
  }
}

template <class Tile>
__device__ __forceinline__ void SplitKeysOrValues(const CudaSplitQkvArgs& p, int64_t begin, int tokens,
                                                  bool is_v, int head, typename Tile::Shared& shared) {
  const int64_t row = (p.num_q_heads + 2 * static_cast<int64_t>(p.num_kv_heads)) * Tile::kHeadDim;
  const int from_head = p.num_q_heads + (is_v ? p.num_kv_heads : 0) + head;
  const __nv_bfloat16* const from = static_cast<const __nv_bfloat16*>(p.qkv) + from_head * Tile::kHeadDim;
  __nv_bfloat16* const to = static_cast<__nv_bfloat16*>(is_v ? p.v : p.k) + head * Tile::kHeadDim;
  const int64_t block = (p.first_token + begin) / kStatsBlockTokens;
  const BlockStatsOutputs out = OutputsOf(p.stats, is_v, block, head, p.num_kv_heads, Tile::kHeadDim);
  const bool counts = out.Any();
  HeadNorm norm;
  norm.Load<Tile>(is_v ? nullptr : p.k_norm, p.norm_dtype == DType::kF32, p.epsilon);

  RowPart parts[Tile::kSteps] = {};
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    if (Tile::Row(step) < tokens) parts[step] = LoadRow<Tile>(from + (begin + Tile::Row(step)) * row);
  }
  BlockAccumulator<Tile> accumulator;
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const bool exists = Tile::Row(step) < tokens;
    const int64_t token = begin + Tile::Row(step);
    if (!is_v) {
      Rotation rotation = {};
      if (exists) rotation.Load<Tile>(p, token);
      parts[step] = NormaliseAndRotate<Tile>(parts[step], norm, rotation);
    }
    if (exists) StoreRow<Tile>(to + token * p.num_kv_heads * Tile::kHeadDim, parts[step]);
    if (counts) accumulator.Add(parts[step], exists, out.least != nullptr);
  }
  if (counts) accumulator.Finish(shared, tokens, out);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    SplitQkvKernel(const __grid_constant__ CudaSplitQkvArgs p) {
  __shared__ typename Tile::Shared shared;
  const int query_units = (p.num_q_heads + kSplitQueryHeads - 1) / kSplitQueryHeads;
  const int units = query_units + 2 * p.num_kv_heads;
  const int unit = static_cast<int>(blockIdx.x % units);
  const int64_t begin = static_cast<int64_t>(blockIdx.x / units) * kStatsBlockTokens;
  const int tokens =
      static_cast<int>(p.num_tokens - begin < kStatsBlockTokens ? p.num_tokens - begin : kStatsBlockTokens);
  if (unit < query_units) {
    SplitQueries<Tile>(p, begin, tokens, unit * kSplitQueryHeads);
    return;
  }
  const bool is_v = unit - query_units >= p.num_kv_heads;
  const int head = unit - query_units - (is_v ? p.num_kv_heads : 0);
  SplitKeysOrValues<Tile>(p, begin, tokens, is_v, head, shared);
}

}  // namespace

cudaError_t LaunchSplitQkv(const CudaSplitQkvArgs& p, int64_t ctas, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(ctas);
  if (p.head_dim == 128) {
    SplitQkvKernel<BlockTile<128>><<<grid, BlockTile<128>::kThreads, 0, stream>>>(p);
  } else {
    SplitQkvKernel<BlockTile<64>><<<grid, BlockTile<64>::kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
