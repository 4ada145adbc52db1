#include <cuda_bf16.h>

#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vectors.cuh"
#include "kernels/cuda/sm90/tail_profile_launch.h"

// A warp walks a chunk of keys, 32 a step, which it holds as B fragments; the rows lie in shared memory, from
// where A fragments come 16 rows at a time. The order of the dimensions in a product is free: a thread loads
// eight dimensions of a key at once and the rows are stored to match, dimension 32 g + 8 t + 2 w + e as
// element 2 t + e of chunk 4 g + w.
namespace headwater::kernels::sm90 {
namespace {

using namespace headwater::kernels::device;  // NOLINT: the kernels are written in these

constexpr int kWarps = 4, kThreads = 32 * kWarps, kStepKeys = 32, kTiles = kTailRows / 16;

// 2^x; results under 2^-126 are 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a warp of the two large kernels works on. Heads are fastest: CTAs in flight read the same keys.
struct Place {
  int head, kv_head;
  int64_t chunk, begin, end;  // keys

  __device__ explicit Place(const TailProfileParams& p) {
    head = static_cast<int>(blockIdx.x % p.args.num_q_heads);
    kv_head = head / (p.args.num_q_heads / p.args.num_kv_heads);
    chunk = static_cast<int64_t>(blockIdx.x / p.args.num_q_heads) * kWarps + threadIdx.x / 32;
    begin = chunk * p.chunk_keys;
    end = begin + p.chunk_keys < p.args.num_tokens ? begin + p.chunk_keys : p.args.num_tokens;
  }
};

// Slots without a row get zeros.
template <int kDim>
__device__ void LoadRows(const TailProfileParams& p, int head, uint32_t rows) {
  const CudaTailProfileArgs& a = p.args;
  const auto* const q = static_cast<const __nv_bfloat16*>(a.q);
  for (int i = static_cast<int>(threadIdx.x); i < kTailRows * kDim / 8; i += kThreads) {
    const int slot = i / (kDim / 8), piece = i % (kDim / 8);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (slot >= kTailRows - a.rows) {
      const int64_t token = a.num_tokens - kTailRows + slot;
      x = *reinterpret_cast<const uint4*>(q + (token * a.num_q_heads + head) * kDim + piece * 8);
    }
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t at = MmaRows<kDim>::At(rows, slot, piece / 4 * 4 + w) + piece % 4 * 4;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(words[w]) : "memory");
    }
  }
}

// keys[h][g]: dimensions 32 g + 8 (lane % 4) and on of key first + 8 h + lane / 4.
template <int kDim>
__device__ __forceinline__ void LoadKeys(const TailProfileParams& p, int kv_head, int64_t first,
                                         uint4 (&keys)[4][kDim / 32]) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  const auto* const k = static_cast<const __nv_bfloat16*>(p.args.k) + kv_head * kDim + lane % 4 * 8;
#pragma unroll
  for (int h = 0; h < 4; ++h) {
    const int64_t key = first + 8 * h + lane / 4;
    const __nv_bfloat16* const row = k + key * p.args.num_kv_heads * kDim;
#pragma unroll
    for (int g = 0; g < kDim / 32; ++g) {
      keys[h][g] = key < p.args.num_tokens ? __ldg(reinterpret_cast<const uint4*>(row + 32 * g))
                                           : make_uint4(0, 0, 0, 0);
    }
  }
}

// Asks for the next step's keys: 128-byte lines, two a lane at most.
template <int kDim>
__device__ __forceinline__ void PrefetchKeys(const TailProfileParams& p, int kv_head, int64_t first) {
  const int64_t key = first + (threadIdx.x & 31);
  if (key >= p.args.num_tokens) return;
  const auto* const row =
      static_cast<const __nv_bfloat16*>(p.args.k) + (key * p.args.num_kv_heads + kv_head) * kDim;
#pragma unroll
  for (int i = 0; i < kDim; i += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
}

// s[h] = products of slots [16 tile, + 16) with keys [8 h, + 8), in MmaBf16()'s layout.
template <int kDim>
__device__ __forceinline__ void Scores(uint32_t rows, int tile, const uint4 (&keys)[4][kDim / 32],
                                       float (&s)[4][4]) {
  const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
  for (int g = 0; g < kDim / 32; ++g) {
    uint32_t a[4];
    LoadMatrix4(a, MmaRows<kDim>::At(rows, 16 * tile + (lane & 15), 4 * g + (lane >> 4)));
#pragma unroll
    for (int h = 0; h < 4; ++h) MmaBf16(s[h], a, keys[h][g].x, keys[h][g].y);
    LoadMatrix4(a, MmaRows<kDim>::At(rows, 16 * tile + (lane & 15), 4 * g + 2 + (lane >> 4)));
#pragma unroll
    for (int h = 0; h < 4; ++h) MmaBf16(s[h], a, keys[h][g].z, keys[h][g].w);
  }
}

// Minus infinity where the slot's token comes before the key. `lead` is the first key less the token of slot
// 0.
__device__ __forceinline__ void Mask(int64_t lead, int tile, float (&s)[4][4]) {
  if (lead + kStepKeys - 1 <= 16 * tile) return;
  const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
  for (int h = 0; h < 4; ++h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * h + 2 * (lane % 4) + i % 2, slot = 16 * tile + 8 * (i / 2) + lane / 4;
      if (lead + key > slot) s[h][i] = -INFINITY;
    }
  }
}

// Runs body.Tile(tile, s) for every 16 slots that hold a row and body.Step(first key) after each 32 keys.
template <int kDim, class Body>
__device__ __forceinline__ void Walk(const TailProfileParams& p, const Place& place, uint32_t rows,
                                     Body& body) {
  const int first_tile = (kTailRows - p.args.rows) / 16;
  for (int64_t first = place.begin; first < place.end; first += kStepKeys) {
    uint4 keys[4][kDim / 32];
    LoadKeys<kDim>(p, place.kv_head, first, keys);
    if (first + kStepKeys < place.end) PrefetchKeys<kDim>(p, place.kv_head, first + kStepKeys);
    const int64_t lead = first - (p.args.num_tokens - kTailRows);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile < first_tile) continue;
      float s[4][4] = {};
      Scores<kDim>(rows, tile, keys, s);
      Mask(lead, tile, s);
      body.Tile(tile, s);
    }
    body.Step(first);
  }
}

// --- largest score and sum of each row ---

struct RowStatistics {
  float scale;  // log2(e) * softmax_scale
  float top[kTiles][2], sum[kTiles][2];

  __device__ void Start() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      top[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = 0;
    }
  }
  __device__ __forceinline__ void Tile(int tile, const float (&s)[4][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = top[tile][r];
#pragma unroll
      for (int h = 0; h < 4; ++h) most = fmaxf(most, fmaxf(s[h][2 * r], s[h][2 * r + 1]));
      const float base = most == -INFINITY ? 0.0f : most * scale;
      float add = 0;
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        add += Exp2(s[h][2 * r] * scale - base) + Exp2(s[h][2 * r + 1] * scale - base);
      }
      sum[tile][r] = sum[tile][r] * Exp2(top[tile][r] * scale - base) + add;
      top[tile][r] = most;
    }
  }
  __device__ __forceinline__ void Step(int64_t) {}
};

// Of two parts (largest score, sum) of a row.
__device__ __forceinline__ float2 Merged(float2 a, float2 b, float scale) {
  const float most = fmaxf(a.x, b.x), base = most == -INFINITY ? 0.0f : most * scale;
  return make_float2(most, a.y * Exp2(a.x * scale - base) + b.y * Exp2(b.x * scale - base));
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 3) TailRowsKernel(const __grid_constant__ TailProfileParams p) {
  __shared__ alignas(128) unsigned char rows[kTailRows * kDim * 2];
  const Place place(p);
  LoadRows<kDim>(p, place.head, SharedAddress(rows));
  __syncthreads();
  if (place.chunk >= p.chunks) return;
  RowStatistics body;
  body.scale = p.args.softmax_scale * 1.44269504f;
  body.Start();
  Walk<kDim>(p, place, SharedAddress(rows), body);
  const int lane = static_cast<int>(threadIdx.x & 31);
  float2* const out = p.parts + (place.head * p.chunks + place.chunk) * kTailRows;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 part = make_float2(body.top[tile][r], body.sum[tile][r]);
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) {
        const float2 other =
            make_float2(__shfl_xor_sync(~0u, part.x, bit), __shfl_xor_sync(~0u, part.y, bit));
        part = Merged(part, other, body.scale);
      }
      if (lane % 4 == 0) out[16 * tile + 8 * r + lane / 4] = part;
    }
  }
}

// Eight slots a CTA, 32 threads a slot.
__global__ void __launch_bounds__(256) TailLseKernel(const __grid_constant__ TailProfileParams p) {
  const int head = static_cast<int>(blockIdx.y), slot = static_cast<int>(blockIdx.x) * 8 + threadIdx.x % 8;
  const int lane = static_cast<int>(threadIdx.x) / 8;
  const float scale = p.args.softmax_scale * 1.44269504f;
  const float2* const parts = p.parts + head * p.chunks * kTailRows + slot;
  __shared__ float2 shared[32][8];
  float2 part = make_float2(-INFINITY, 0);
  for (int64_t chunk = lane; chunk < p.chunks; chunk += 32) {
    part = Merged(part, parts[chunk * kTailRows], scale);
  }
  shared[lane][threadIdx.x % 8] = part;
  __syncthreads();
  if (lane != 0) return;
  for (int i = 1; i < 32; ++i) part = Merged(part, shared[i][threadIdx.x], scale);
  float lse = part.x * scale + log2f(part.y) - log2f(p.args.factor);
  if (slot < kTailRows - p.args.rows) lse = INFINITY;
  p.lse[head * kTailRows + slot] = lse;
}

// --- sums of probabilities ---

// Diagonals: entry (slot, key) adds to c = key + 127 - slot. With key = first + 8 h + te and slot = 16 tile +
// 8 r + g, te = 2 (lane % 4) + e and g = lane / 4, that is first + 8 m + te + 7 - g for m = h - 2 tile - r +
// 15: a thread sums by m and e. After a step the four lowest m are complete but for the sum over lanes, and m
// counts from the next step's first key, 4 less.
constexpr int kDiagonals = 19;
// [7 - g][8 m + te, modulo 64]; the pitch spreads a warp's accesses over the banks.
constexpr int kRing = 64, kRingPitch = kRing + 8;

struct Sums {
  float scale;
  const float* lse;  // [kTailRows], shared
  float* ring;       // [8 * kRingPitch] of the warp, shared
  float* vertical;   // of the head
  float* slash;
  int64_t num_tokens;
  float column[4][2] = {}, diagonal[kDiagonals][2] = {};
  int turn = 0;  // of the ring's halves

  __device__ void Start() {
    for (int i = static_cast<int>(threadIdx.x & 31); i < 8 * kRingPitch; i += 32) ring[i] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void Tile(int tile, const float (&s)[4][4]) {
    const int g = static_cast<int>(threadIdx.x & 31) / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float row_lse = lse[16 * tile + 8 * r + g];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float probability = Exp2(s[h][2 * r + e] * scale - row_lse);
          column[h][e] += probability;
          diagonal[h - 2 * tile - r + 15][e] += probability;
        }
      }
    }
  }

  // The sum of diagonal first + lane, which later keys do not reach.
  __device__ __forceinline__ float NextDiagonals() {
    const int lane = static_cast<int>(threadIdx.x & 31), t = lane % 4, g = lane / 4;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      *reinterpret_cast<float2*>(ring + (7 - g) * kRingPitch + turn * 32 + 8 * m + 2 * t) =
          make_float2(diagonal[m][0], diagonal[m][1]);
    }
    __syncwarp();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += ring[i * kRingPitch + ((turn * 32 + lane - i) & (kRing - 1))];
    __syncwarp();
    turn ^= 1;
#pragma unroll
    for (int m = 0; m < kDiagonals; ++m) {
#pragma unroll
      for (int e = 0; e < 2; ++e) diagonal[m][e] = m + 4 < kDiagonals ? diagonal[m + 4][e] : 0.0f;
    }
    return sum;
  }

  // The sum over rows of key first + 8 (g / 2) + 2 (lane % 4) + g % 2: lanes of equal lane % 4 halve what
  // each of them carries on.
  __device__ __forceinline__ float NextColumn() {
    const int g = static_cast<int>(threadIdx.x & 31) / 4;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = column[i / 2][i % 2];
      column[i / 2][i % 2] = 0;
    }
#pragma unroll
    for (int half = 4; half >= 1; half /= 2) {
      const bool high = (g & half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float keep = high ? x[half + i] : x[i], give = high ? x[i] : x[half + i];
        x[i] = keep + __shfl_xor_sync(~0u, give, 4 * half);
      }
    }
    return x[0];
  }

  __device__ __forceinline__ void Step(int64_t first) {
    const int lane = static_cast<int>(threadIdx.x & 31), g = lane / 4;
    const int64_t key = first + 8 * (g / 2) + 2 * (lane % 4) + g % 2;
    const float sum = NextColumn();
    if (key < num_tokens) vertical[key] = sum;
    const float along = NextDiagonals();
    if (first + lane < num_tokens) slash[first + lane] = along;
  }
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 3) TailSumsKernel(const __grid_constant__ TailProfileParams p) {
  __shared__ alignas(128) unsigned char rows[kTailRows * kDim * 2];
  __shared__ alignas(16) float rings[kWarps][8 * kRingPitch];
  __shared__ float lse[kTailRows];
  const Place place(p);
  LoadRows<kDim>(p, place.head, SharedAddress(rows));
  lse[threadIdx.x] = p.lse[place.head * kTailRows + threadIdx.x];
  static_assert(kThreads == kTailRows);
  __syncthreads();
  if (place.chunk >= p.chunks) return;
  Sums body;
  body.scale = p.args.softmax_scale * 1.44269504f;
  body.lse = lse;
  body.ring = rings[threadIdx.x / 32];
  body.vertical = p.args.vertical + place.head * p.args.num_tokens;
  body.slash = p.args.slash + place.head * p.args.num_tokens;
  body.num_tokens = p.args.num_tokens;
  body.Start();
  Walk<kDim>(p, place, SharedAddress(rows), body);
  if (place.chunk + 1 == p.chunks) return;  // no diagonal lies beyond
  float* const tails = p.tails + (place.head * p.chunks + place.chunk) * kTailRows;
  for (int i = 0; i < kTailRows / kStepKeys; ++i) {
    tails[i * kStepKeys + (threadIdx.x & 31)] = body.NextDiagonals();
  }
}

// A warp per 128 entries: adds what the chunk before left, and sums.
__global__ void __launch_bounds__(256) TailFinishKernel(const __grid_constant__ TailProfileParams p) {
  const int64_t tokens = p.args.num_tokens, groups = (tokens + 127) / 128;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (group >= groups) return;
  const int head = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x & 31);
  const int64_t chunk = group * 128 / p.chunk_keys;
  const bool first_of_chunk = group * 128 == chunk * p.chunk_keys && chunk > 0;
  const float* const tails = p.tails + (head * p.chunks + chunk - 1) * kTailRows;
  const float* const vertical = p.args.vertical + head * tokens;
  float* const slash = p.args.slash + head * tokens;
  float columns = 0, diagonals = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = group * 128 + 32 * i + lane;
    if (at >= tokens) continue;
    float x = slash[at];
    if (first_of_chunk) slash[at] = x = x + tails[32 * i + lane];
    diagonals += x;
    if (p.args.vertical_sums != nullptr) columns += vertical[at];
  }
  columns = SumLanes(columns, 1, 32);
  diagonals = SumLanes(diagonals, 1, 32);
  if (lane != 0) return;
  if (p.args.vertical_sums != nullptr) p.args.vertical_sums[head * groups + group] = columns;
  if (p.args.slash_sums != nullptr) p.args.slash_sums[head * groups + group] = diagonals;
}

template <int kDim>
cudaError_t Launch(const TailProfileParams& p, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(p.args.num_q_heads);
  const int64_t groups = (p.args.num_tokens + 127) / 128;
  const int64_t ctas = (p.chunks + kWarps - 1) / kWarps * heads;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  TailRowsKernel<kDim><<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(p);
  TailLseKernel<<<dim3(kTailRows / 8, heads), 256, 0, stream>>>(p);
  TailSumsKernel<kDim><<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(p);
  TailFinishKernel<<<dim3(static_cast<unsigned>((groups + 7) / 8), heads), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchTailProfile(const TailProfileParams& params, cudaStream_t stream) {
  return params.args.head_dim == 128 ? Launch<128>(params, stream) : Launch<64>(params, stream);
}

}  // namespace headwater::kernels::sm90
