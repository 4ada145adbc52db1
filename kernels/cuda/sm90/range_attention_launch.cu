#include <cuda_bf16.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/sm90/online_softmax.cuh"
#include "kernels/cuda/sm90/range_attention_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kRows = 64, kKeys = 64, kThreads = 128;
static_assert(kRows == kRangeRows);
constexpr float kLn2 = 0.69314718f;

// A tile's steps of 64 keys: those of its ranges, then its columns. The same in every thread.
class KeyWalk {
 public:
  static constexpr int kDone = INT32_MIN;

  __device__ KeyWalk(const CudaKeyRanges& r, int64_t segment, int tile) {
    ranges_left_ = r.range_counts[segment];
    if (ranges_left_ < 0) {
      ranges_left_ = 0;
      next_ = {0, (tile + 1) * kRows};
    } else {
      ranges_ = r.ranges + r.range_offsets[segment];
      if (r.columns != nullptr) {
        columns = r.columns + r.column_offsets[segment];
        num_columns = r.column_counts[segment];
      }
      TakeNext();
    }
    current_ = next_;
    TakeNext();
  }

  // First key of a range's step; ~i: that of columns from the i-th on; kDone.
  __device__ int Next() {
    if (current_.begin < current_.end) {
      const int key = current_.begin;
      current_.begin += kKeys;
      if (current_.begin >= current_.end) {
        current_ = next_;
        TakeNext();
      }
      return key;
    }
    if (column_ >= num_columns) return kDone;
    column_ += kKeys;
    return ~(column_ - kKeys);
  }

  const int32_t* columns = nullptr;
  int num_columns = 0;

 private:
  // Read one range ahead of its use.
  __device__ void TakeNext() {
    next_ = {0, 0};
    if (ranges_left_ > 0) {
      next_ = *ranges_++;
      --ranges_left_;
    }
  }

  const CudaKeyRange* ranges_ = nullptr;
  int ranges_left_ = 0, column_ = 0;
  CudaKeyRange current_ = {0, 0}, next_ = {0, 0};
};

// A thread's part of copying 64 rows of K and of V: one chunk of every kStep-th row.
template <int kDim>
struct KeyLoader {
  using Rows = device::MmaRows<kDim>;
  static constexpr int kStep = kThreads / Rows::kChunks;
  static_assert(kStep % 8 == 0);  // rows of a thread are swizzled alike
  static constexpr uint32_t kBytes = Rows::Bytes(kKeys), kStepBytes = Rows::Bytes(kStep);

  const __nv_bfloat16* k;
  const __nv_bfloat16* v;
  int64_t stride;
  int row, num_tokens;
  uint32_t at;

  __device__ KeyLoader(const CudaRangeAttentionArgs& p, int head) {
    const int thread = static_cast<int>(threadIdx.x), chunk = thread % Rows::kChunks;
    const int kv_head = head / (p.num_q_heads / p.num_kv_heads);
    k = static_cast<const __nv_bfloat16*>(p.k) + kv_head * kDim + chunk * 8;
    v = static_cast<const __nv_bfloat16*>(p.v) + kv_head * kDim + chunk * 8;
    stride = static_cast<int64_t>(p.num_kv_heads) * kDim;
    row = thread / Rows::kChunks;
    num_tokens = static_cast<int>(p.num_tokens);
    at = Rows::At(0, row, chunk);
  }

  __device__ __forceinline__ void Copy(uint32_t stage, int i, int64_t key, bool valid) const {
    CopyAsync16(stage + at + i * kStepBytes, k + key * stride, valid);
    CopyAsync16(stage + kBytes + at + i * kStepBytes, v + key * stride, valid);
  }
  __device__ __forceinline__ void Step(uint32_t stage, int step, const KeyWalk& walk) const {
    if (step >= 0) {
#pragma unroll
      for (int i = 0; i < kKeys / kStep; ++i) {
        const int key = step + row + i * kStep;
        Copy(stage, i, key, key < num_tokens);
      }
    } else {
      int keys[kKeys / kStep];
#pragma unroll
      for (int i = 0; i < kKeys / kStep; ++i) {
        const int column = ~step + row + i * kStep;
        keys[i] = column < walk.num_columns ? walk.columns[column] : -1;
      }
#pragma unroll
      for (int i = 0; i < kKeys / kStep; ++i) Copy(stage, i, keys[i], keys[i] >= 0);
    }
  }
};

// Scores that their rows do not see become -infinity.
__device__ __forceinline__ void MaskStep(float (&s)[kKeys / 2], int step, int num_columns,
                                         const RowLimits& rows, int sink_tokens, int window_tokens) {
  if (step < 0) {
    const int last = num_columns - 1 - ~step;
    if (last < kKeys - 1) Mask(s, 0, RowLimits{{last, last}, last});
    return;
  }
  if (step + kKeys - 1 > rows.first_row) Mask(s, step, rows);
  if (window_tokens < 0 || step + kKeys <= sink_tokens) return;
  if (int64_t{step} > int64_t{rows.first_row} + kRows - 1 - window_tokens) return;
  const int first = step + 2 * static_cast<int>(threadIdx.x & 3);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int before = rows.last_key[r] - window_tokens;  // the last key before the window
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = first + 8 * j + e;
        if (key >= sink_tokens && key <= before) s[4 * j + 2 * r + e] = -INFINITY;
      }
    }
  }
}

template <int kDim>
__device__ __forceinline__ void LoadQueries(const CudaRangeAttentionArgs& p, int head, int first_row,
                                            uint32_t shared) {
  const auto* const q = static_cast<const __nv_bfloat16*>(p.q);
  device::MmaRows<kDim>::template Load<kRows, kThreads>(
      shared, static_cast<int>(threadIdx.x), q, [&](int row) -> const __nv_bfloat16* {
        const int64_t token = int64_t{first_row} + row;
        return token < p.num_tokens ? q + (token * p.num_q_heads + head) * kDim : nullptr;
      });
}

template <int kDim>
__device__ __forceinline__ void Store(const CudaRangeAttentionArgs& p, int head, const RowLimits& rows,
                                      const RowState& state, const float (&o)[kDim / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r] + __shfl_xor_sync(~0u, state.sum[r], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (rows.last_key[r] >= p.num_tokens) continue;
    const int64_t at = int64_t{rows.last_key[r]} * p.num_q_heads + head;
    const float inverse = sum == 0 ? 0.0f : 1 / sum;
    auto* const out = static_cast<__nv_bfloat16*>(p.out) + at * kDim + 2 * (threadIdx.x & 3);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(out + 8 * n) =
          device::PackBf16(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
    }
    if (p.lse_ln != nullptr && (threadIdx.x & 3) == 0) {
      p.lse_ln[at] = sum == 0 ? -INFINITY : (state.shift[r] + log2f(sum)) * kLn2;
    }
  }
}

// One CTA per tile of a query head: heads fastest, whose keys are then shared in L2; long tiles first. A warp
// has 16 rows; two stages of 64 keys and values are in flight.
template <int kDim>
__global__ void __launch_bounds__(kThreads, kDim == 128 ? 3 : 4)
    RangeAttentionKernel(const CudaRangeAttentionArgs p, int tiles, float scale_log2) {
  using Rows = device::MmaRows<kDim>;
  constexpr uint32_t kTileBytes = KeyLoader<kDim>::kBytes, kStageBytes = 2 * kTileBytes;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t shared = SharedAddress(memory);
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x / 32);
  const int head = static_cast<int>(blockIdx.x) % p.num_q_heads;
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x) / p.num_q_heads;
  const int first_row = tile * kRows, row = first_row + warp * 16 + lane / 4;
  const RowLimits rows = {{row, row + 8}, first_row};

  // The other stage holds the queries until they are in registers.
  LoadQueries<kDim>(p, head, first_row, shared + kStageBytes);
  CopyAsyncCommit();
  KeyWalk walk(p.ranges, p.ranges.num_lists == 1 ? tile : int64_t{head} * tiles + tile, tile);
  const KeyLoader<kDim> loader(p, head);
  int step = walk.Next();
  if (step != KeyWalk::kDone) loader.Step(shared, step, walk);
  CopyAsyncCommit();
  CopyAsyncWait<1>();
  __syncthreads();
  uint32_t q[kDim / 16][4];
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    LoadMatrix4(q[i], Rows::At(shared + kStageBytes, warp * 16 + (lane & 15), 2 * i + (lane >> 4)));
  }

  RowState state;
  state.Reset();
  float o[kDim / 8][4] = {};
  for (uint32_t stage = shared; step != KeyWalk::kDone; stage = 2 * shared + kStageBytes - stage) {
    CopyAsyncWait<0>();
    __syncthreads();
    const int next = walk.Next();
    if (next != KeyWalk::kDone) loader.Step(2 * shared + kStageBytes - stage, next, walk);
    CopyAsyncCommit();

    float s[kKeys / 2], factor[2];
    Rows::template Scores<kKeys>(s, q, stage, 0);
    MaskStep(s, step, walk.num_columns, rows, p.ranges.sink_tokens, p.ranges.window_tokens);
    if (MoveShift(s, scale_log2, &state, factor)) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[n][e] *= factor[e / 2];
      }
    }
    uint32_t weights[kKeys / 4];
    Weigh(s, scale_log2, &state, weights);
    Rows::template WeighedSum<kKeys>(o, weights, stage + kTileBytes, 0);
    step = next;
  }
  Store<kDim>(p, head, rows, state, o);
}

template <int kDim>
cudaError_t Launch(const CudaRangeAttentionArgs& args, cudaStream_t stream) {
  constexpr int kSharedBytes = 4 * device::MmaRows<kDim>::Bytes(kKeys);
  const cudaError_t error = cudaFuncSetAttribute(RangeAttentionKernel<kDim>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = CudaRangeTiles(args.num_tokens);
  const auto scale_log2 = static_cast<float>(args.softmax_scale * kLog2E);
  RangeAttentionKernel<kDim>
      <<<static_cast<unsigned>(tiles * args.num_q_heads), kThreads, kSharedBytes, stream>>>(
          args, static_cast<int>(tiles), scale_log2);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchRangeAttention(const CudaRangeAttentionArgs& args, cudaStream_t stream) {
  return args.head_dim == 128 ? Launch<128>(args, stream) : Launch<64>(args, stream);
}

}  // namespace headwater::kernels::sm90
