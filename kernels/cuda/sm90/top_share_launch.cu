#include "kernels/cuda/sm90/top_share_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr uint32_t kMostBits = 0x7F7FFFFF;  // the largest finite float

__device__ __forceinline__ uint32_t BitsOf(float score) {
  return score > 0 ? min(__float_as_uint(score), kMostBits) : 0;
}

// Exponent as floats have it, that of the smallest ones included.
__device__ __forceinline__ int ExponentOf(uint32_t bits) { return max(static_cast<int>(bits >> 23), 1); }

// The score in units of 2^(top - 173), where `top` is the exponent of the row's largest: under 2^47.
__device__ __forceinline__ int64_t Fixed(uint32_t bits, int top) {
  const int64_t digits = (bits & 0x7FFFFF) | (bits >> 23 != 0 ? 0x800000 : 0);
  const int shift = 23 - (top - ExponentOf(bits));
  if (shift >= 0) return digits << shift;
  return shift > -24 ? digits >> -shift : 0;
}

// A row of scores in shared memory, of which [begin, end) compete.
struct Row {
  const uint32_t* bits;
  int begin, end, top;
  int64_t (*warps)[kWarps];  // two, in turn
  int turn = 0;

  // Over all threads of the CTA; the same for each.
  __device__ __forceinline__ int64_t Sum(int64_t x) {
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) x += __shfl_xor_sync(~0u, x, bit);
    if (threadIdx.x % 32 == 0) warps[turn][threadIdx.x / 32] = x;
    __syncthreads();
    int64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += warps[turn][i];
    turn ^= 1;
    return sum;
  }
  // Mass of the competitors of at least `least`.
  __device__ __forceinline__ int64_t MassFrom(uint32_t least) {
    int64_t mass = 0;
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      if (bits[i] >= least) mass += Fixed(bits[i], top);
    }
    return Sum(mass);
  }
};

// What is kept: scores over `threshold`, and the first `ties` of those that equal it.
struct Chosen {
  uint32_t threshold;
  int64_t ties;
};

// The largest competitors while what was kept before, `mass` at first, is under `wanted`.
__device__ __forceinline__ Chosen Choose(Row& row, int64_t mass, int64_t wanted) {
  if (mass >= wanted) return {kMostBits, 0};
  if (mass + row.MassFrom(0) < wanted) return {0, row.end};
  uint32_t threshold = 0;  // the largest from which on the mass is enough
#pragma unroll 1
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t next = threshold | 1u << bit;
    if (mass + row.MassFrom(next) >= wanted) threshold = next;
  }
  const int64_t missing = wanted - mass - row.MassFrom(threshold + 1), each = Fixed(threshold, row.top);
  return {threshold, (missing + each - 1) / each};
}

__device__ __forceinline__ int64_t Wanted(const TopShareParams& p, Row& row, int64_t forced) {
  const double share = p.shares[blockIdx.y];
  if (p.with_first_and_own) {
    const int64_t total = forced + row.MassFrom(0);
    return min(total, static_cast<int64_t>(ceil(share * static_cast<double>(total))));
  }
  const double wanted = ceil(ldexp(share, 173 - row.top));
  return wanted < 0x1p62 ? static_cast<int64_t>(wanted) : INT64_MAX;
}

__device__ __forceinline__ void Write(Row& row, const Chosen& chosen, bool with_first_and_own, int own,
                                      int words, uint32_t* out) {
  __shared__ int tied[kWarps];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int each = (words + kWarps - 1) / kWarps, first = warp * each, last = min(words, first + each);
  const auto bits_at = [&](int column) {
    return column >= row.begin && column < row.end ? row.bits[column] : 0;
  };
  const auto ties_at = [&](int column) {
    return __ballot_sync(~0u,
                         column >= row.begin && column < row.end && row.bits[column] == chosen.threshold);
  };
  int64_t before = 0;
  int own_ties = 0;
  for (int word = first; word < last; ++word) own_ties += __popc(ties_at(32 * word + lane));
  if (lane == 0) tied[warp] = own_ties;
  __syncthreads();
  for (int i = 0; i < warp; ++i) before += tied[i];
  for (int word = first; word < last; ++word) {
    const int column = 32 * word + lane;
    const uint32_t ties = ties_at(column);
    const bool tie = (ties >> lane & 1) != 0 && before + __popc(ties & ((1u << lane) - 1)) < chosen.ties;
    const bool forced = with_first_and_own && (column == 0 || column == own);
    const uint32_t mask = __ballot_sync(~0u, tie || forced || bits_at(column) > chosen.threshold);
    before += __popc(ties);
    if (lane == 0) out[word] = mask;
  }
}

// One CTA per row and list.
__global__ void __launch_bounds__(kThreads) TopShareKernel(const __grid_constant__ TopShareParams p) {
  extern __shared__ uint32_t bits[];
  __shared__ int64_t warps[2][kWarps];
  __shared__ uint32_t most;
  if (p.flags != nullptr && p.flags[blockIdx.y] == 0) return;
  const int own = p.first_row + static_cast<int>(blockIdx.x), words = (p.blocks + 31) / 32;
  const float* const scores =
      p.scores + blockIdx.y * p.list_stride + static_cast<int64_t>(blockIdx.x) * p.blocks;
  if (threadIdx.x == 0) most = 0;
  __syncthreads();
  uint32_t largest = 0;
  for (int i = static_cast<int>(threadIdx.x); i <= own; i += kThreads) {
    bits[i] = BitsOf(scores[i]);
    largest = max(largest, bits[i]);
  }
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) atomicMax(&most, largest);
  __syncthreads();

  Row row{bits, p.with_first_and_own ? 1 : 0, p.with_first_and_own ? own : own + 1, ExponentOf(most), warps};
  int64_t forced = 0;
  if (p.with_first_and_own) {
    forced = Fixed(bits[0], row.top) + (own > 0 ? Fixed(bits[own], row.top) : 0);
  }
  const Chosen chosen = Choose(row, forced, Wanted(p, row, forced));
  Write(row, chosen, p.with_first_and_own, own, words,
        p.words + (static_cast<int64_t>(blockIdx.y) * p.blocks + own) * words);
}

}  // namespace

cudaError_t LaunchTopShare(const TopShareParams& params, int32_t rows, int32_t lists, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(params.first_row + rows) * sizeof(uint32_t);
  const cudaError_t error = cudaFuncSetAttribute(TopShareKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 kMostShareBlocks * static_cast<int>(sizeof(uint32_t)));
  if (error != cudaSuccess) return error;
  TopShareKernel<<<dim3(static_cast<unsigned>(rows), static_cast<unsigned>(lists)), kThreads, bytes,
                   stream>>>(params);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
