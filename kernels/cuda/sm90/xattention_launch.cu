#include "kernels/cuda/sm90/row_products.cuh"
#include "kernels/cuda/sm90/xattention_launch.h"

namespace headwater::kernels::sm90 {
namespace {

using device::Exp2;

// A tile of products: 256 strides of queries (two warpgroups of 128) by 128 of keys, summed over stride *
// head_dim columns in steps of 64: one token of each stride, half of its columns or all.
constexpr int kThreads = 256, kQueryRows = 256, kKeyRows = 128;
constexpr int kStages = 4, kAhead = kStages - 2;
constexpr uint32_t kQueryBytes = kQueryRows * kPanelRowBytes;
constexpr uint32_t kStageBytes = kQueryBytes + kKeyRows * kPanelRowBytes;
constexpr int kSharedBytes = kStages * static_cast<int>(kStageBytes) + 1024;
constexpr int kTileRows = 8;  // tiles below each other that run together, for L2's sake
constexpr int kScoreThreads = 256, kMostRows = 32;

template <int kStride>
struct Tile {
  static constexpr int kPerBlock = 128 / kStride;  // strides of a block

  const XAttentionParams& p;
  int head, first_query, end_query, first_key;  // strides
  uint32_t stages;

  __device__ __forceinline__ int Steps() const { return kStride * (p.head_dim / 64); }

  // Strides before `end` whose token `at` lies in the prompt, from `first` on.
  __device__ __forceinline__ int Valid(int first, int end, int at) const {
    return min(end, static_cast<int>((p.num_tokens - at + kStride - 1) / kStride)) - first;
  }

  __device__ __forceinline__ void Load(int step) const {
    const int panels = p.head_dim / 64, key = step / panels, query = kStride - 1 - key;
    const int kv_head = head / (p.num_q_heads / p.num_kv_heads), column = step % panels * 64;
    const int64_t q_row = int64_t{p.num_q_heads} * p.head_dim, k_row = int64_t{p.num_kv_heads} * p.head_dim;
    const auto* const q = static_cast<const __nv_bfloat16*>(p.q) + head * p.head_dim + column;
    const auto* const k = static_cast<const __nv_bfloat16*>(p.k) + kv_head * p.head_dim + column;
    const uint32_t stage = stages + step % kStages * kStageBytes;
    LoadPanel<kQueryRows, kThreads>(stage, q + (int64_t{first_query} * kStride + query) * q_row,
                                    kStride * q_row, Valid(first_query, end_query, query));
    LoadPanel<kKeyRows, kThreads>(stage + kQueryBytes, k + (int64_t{first_key} * kStride + key) * k_row,
                                  kStride * k_row, Valid(first_key, INT32_MAX, key));
  }

  // A step's buffer is filled while two later steps' products may run: all have left it by the barrier.
  __device__ __forceinline__ void Products(float (&s)[2][64]) const {
    const int steps = Steps();
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      if (step < steps) Load(step);
      device::CopyAsyncCommit();
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      device::CopyAsyncWait<kAhead - 1>();
      device::FenceAsync();
      __syncthreads();
      const uint32_t stage = stages + step % kStages * kStageBytes;
      const uint32_t rows = stage + (threadIdx.x / 128) * 128 * kPanelRowBytes;
      device::WgmmaFence();
      PanelProducts(s[0], rows, stage + kQueryBytes, step == 0);
      PanelProducts(s[1], rows + 64 * kPanelRowBytes, stage + kQueryBytes, step == 0);
      device::WgmmaCommit();
      if (step + kAhead < steps) Load(step + kAhead);
      device::CopyAsyncCommit();
      device::WgmmaWait<1>();
    }
    device::WgmmaWait<0>();
    Arrived(s[0]);
    Arrived(s[1]);
  }

  // log2 of the sum of exp over each key block, of one of the thread's rows: s[.][4 n + 2 r + c].
  __device__ __forceinline__ void StoreRow(const float (&s)[64], int r, int query, float* out) const {
    const int quad = static_cast<int>(threadIdx.x & 3), last = query - first_key - 2 * quad;
    const int first_block = first_key / kPerBlock;
    float x[32], top = -INFINITY;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        x[2 * n + c] = 8 * n + c <= last ? s[4 * n + 2 * r + c] * p.scale_log2 : -INFINITY;
        top = fmaxf(top, x[2 * n + c]);
      }
    }
    top = QuadMax(top);
    const float base = top == -INFINITY ? 0 : top;
    constexpr int kEach = kPerBlock / 4;  // of the thread's values, a block's
#pragma unroll
    for (int block = 0; block < kStride; ++block) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += Exp2(x[block * kEach + i] - base);
      sum = QuadSum(sum);
      if (block % 4 == quad && query < end_query && first_block + block < p.blocks) {
        out[first_block + block] = base + log2f(sum);
      }
    }
  }
};

// x: a row of tiles of kTileRows; y: tile of keys; z: head and group of rows.
template <int kStride>
__global__ void __launch_bounds__(kThreads, 1)
    StrideKernel(const __grid_constant__ XAttentionParams p, int groups) {
  extern __shared__ unsigned char dynamic[];
  using OneTile = Tile<kStride>;
  const int strides = static_cast<int>((p.num_tokens + kStride - 1) / kStride);
  const int strip = p.first_row * OneTile::kPerBlock;
  const int head = static_cast<int>(blockIdx.z) / groups, group = static_cast<int>(blockIdx.z) % groups;
  const int row = (group * kTileRows + static_cast<int>(blockIdx.x)) * kQueryRows;
  const OneTile tile{p,
                     p.first_head + head,
                     strip + row,
                     min(strides, strip + p.rows * OneTile::kPerBlock),
                     static_cast<int>(blockIdx.y) * kKeyRows,
                     (device::SharedAddress(dynamic) + 1023) & ~1023u};
  if (tile.first_query >= tile.end_query ||
      tile.first_key >= min(tile.first_query + kQueryRows, tile.end_query)) {
    return;
  }
  float s[2][64];
  tile.Products(s);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = thread / 128 * 128 + 64 * half + thread % 128 / 32 * 16 + 8 * r + thread % 32 / 4;
      const int64_t rows = static_cast<int64_t>(p.rows) * OneTile::kPerBlock;
      tile.StoreRow(s[half], r, tile.first_query + at, p.partial + (head * rows + row + at) * p.blocks);
    }
  }
}

// A CTA per query block and head: softmax over the blocks of each stride of queries, summed over them.
__global__ void __launch_bounds__(kScoreThreads)
    ScoreKernel(const __grid_constant__ XAttentionParams p, int per_block, int strides) {
  __shared__ float lse[kMostRows];
  const int block = p.first_row + static_cast<int>(blockIdx.x),
            rows = min(per_block, strides - block * per_block);
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
  const float* const partial =
      p.partial + (static_cast<int64_t>(blockIdx.y) * p.rows + blockIdx.x) * per_block * p.blocks;
  for (int row = thread >> 5; row < rows; row += kScoreThreads / 32) {
    const float* const x = partial + static_cast<int64_t>(row) * p.blocks;
    float top = -INFINITY, sum = 0;
    for (int i = lane; i <= block; i += 32) top = fmaxf(top, x[i]);
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
    for (int i = lane; i <= block; i += 32) sum += Exp2(x[i] - top);
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (lane == 0) lse[row] = top + log2f(sum);
  }
  __syncthreads();
  float* const out = p.scores + blockIdx.y * p.scores_head + static_cast<int64_t>(blockIdx.x) * p.blocks;
  for (int i = thread; i < p.blocks; i += kScoreThreads) {
    float score = 0;
    if (i <= block) {
      for (int row = 0; row < rows; ++row)
        score += Exp2(partial[static_cast<int64_t>(row) * p.blocks + i] - lse[row]);
    }
    out[i] = score;
  }
}

template <int kStride>
cudaError_t Launch(const XAttentionParams& p, cudaStream_t stream) {
  constexpr int kPerBlock = Tile<kStride>::kPerBlock;
  static_assert(kPerBlock >= 8 && kPerBlock <= kMostRows);
  const cudaError_t error =
      cudaFuncSetAttribute(StrideKernel<kStride>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int tiles = (p.rows * kPerBlock + kQueryRows - 1) / kQueryRows,
            groups = (tiles + kTileRows - 1) / kTileRows;
  const int key_tiles = ((p.first_row + p.rows) * kPerBlock + kKeyRows - 1) / kKeyRows;
  const dim3 grid(kTileRows, static_cast<unsigned>(key_tiles), static_cast<unsigned>(groups * p.heads));
  StrideKernel<kStride><<<grid, kThreads, kSharedBytes, stream>>>(p, groups);
  const auto strides = static_cast<int>((p.num_tokens + kStride - 1) / kStride);
  ScoreKernel<<<dim3(static_cast<unsigned>(p.rows), static_cast<unsigned>(p.heads)), kScoreThreads, 0,
                stream>>>(p, kPerBlock, strides);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchXAttention(const XAttentionParams& params, int32_t stride, cudaStream_t stream) {
  switch (stride) {
    case 4:
      return Launch<4>(params, stream);
    case 8:
      return Launch<8>(params, stream);
    case 16:
      return Launch<16>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace headwater::kernels::sm90
