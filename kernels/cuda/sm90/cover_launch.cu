#include "kernels/cuda/device/radix.cuh"
#include "kernels/cuda/sm90/cover_launch.h"

namespace headwater::kernels::sm90 {
namespace {

using namespace headwater::kernels::device;  // NOLINT: the kernels are written in these

constexpr int kThreads = 256, kSlice = 16384;  // entries a CTA
constexpr int kHalfBits = 12;                  // of a mantissa's 24
static_assert(kSlice <= 1 << (32 - kHalfBits));

// All keys of a bin of the first pass have one exponent: a number is mantissa * 2^(BinExponent - 150).
__device__ __forceinline__ int BinExponent(int bin) { return bin >> 3 > 0 ? bin >> 3 : 1; }
__device__ __forceinline__ uint32_t Mantissa(uint32_t key) {
  return (key & 0x7FFFFFu) | (key >> 23 != 0 ? 0x800000u : 0u);
}

__device__ __forceinline__ bool Active(const CoverParams& p, int row) {
  return p.num_active == nullptr || p.first_active + row < *p.num_active;
}

// The bins of a slice: mantissas are summed in two halves, for want of 64-bit atomics on shared memory.
template <int kPass>
__global__ void __launch_bounds__(kThreads) ShareBinsKernel(const __grid_constant__ CoverParams p) {
  using Digit = RadixDigit<kPass>;
  __shared__ uint32_t entries[Digit::kBins], low[Digit::kBins], high[Digit::kBins];
  const int row = static_cast<int>(blockIdx.y);
  if (!Active(p, row)) return;
  uint32_t above = 0;
  if constexpr (kPass > 0) {
    if (p.states[row].done != 0) return;
    above = p.states[row].key;
  }
  for (int i = static_cast<int>(threadIdx.x); i < Digit::kBins; i += kThreads) {
    entries[i] = low[i] = high[i] = 0;
  }
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSlice;
  const int length = static_cast<int>(p.length - begin < kSlice ? p.length - begin : kSlice);
  const float* const x = p.x + row * p.length + begin;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < length; i += kThreads) {
    const uint32_t key = RadixKey(__ldg(x + i));
    if (Digit::Above(key) != above || key == 0) continue;
    const uint32_t bin = Digit::Of(key), mantissa = Mantissa(key);
    atomicAdd(&entries[bin], 1u);
    atomicAdd(&low[bin], mantissa & ((1u << kHalfBits) - 1));
    atomicAdd(&high[bin], mantissa >> kHalfBits);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < Digit::kBins; i += kThreads) {
    if (entries[i] == 0) continue;
    CoverBin* const bin = p.bins + int64_t{row} * kCoverBins + i;
    const uint64_t sum = (static_cast<uint64_t>(high[i]) << kHalfBits) + low[i];
    atomicAdd(reinterpret_cast<unsigned long long*>(&bin->mantissas), sum);
    atomicAdd(reinterpret_cast<unsigned long long*>(&bin->entries), static_cast<uint64_t>(entries[i]));
  }
}

// A bin's sum in units of 2^-fraction_bits, rounded down, at most 2^62.
__device__ __forceinline__ uint64_t Fixed(uint64_t mantissas, int exponent, int fraction_bits) {
  const int shift = exponent - 150 + fraction_bits;
  if (shift <= 0) return shift <= -64 ? 0 : mantissas >> -shift;
  constexpr uint64_t kMost = uint64_t{1} << 62;
  return shift >= 62 || mantissas >> (62 - shift) != 0 ? (mantissas == 0 ? 0 : kMost) : mantissas << shift;
}

// The same way back, of less than a bin's sum.
__device__ __forceinline__ uint64_t Units(uint64_t fixed, int exponent, int fraction_bits) {
  const int shift = exponent - 150 + fraction_bits;
  if (shift >= 0) return shift >= 64 ? 0 : fixed >> shift;
  return shift <= -64 ? 0 : fixed << -shift;
}

// Walks the bins from the largest numbers down to the one in which the running sum passes the share; later
// passes look at that bin only, in units of its numbers' last place, in which all is exact.
template <int kPass>
__global__ void __launch_bounds__(kRadixThreads) ShareScanKernel(const __grid_constant__ CoverParams p) {
  using Digit = RadixDigit<kPass>;
  constexpr int kEach = Digit::kBins / kRadixThreads;
  __shared__ uint64_t shared[33];
  const int row = static_cast<int>(blockIdx.x);
  CoverState* const state = p.states + row;
  if (!Active(p, row) || (kPass > 0 && state->done != 0)) {
    if (kPass == 2 && p.counts != nullptr && threadIdx.x == 0 && Active(p, row)) {
      p.counts[row] = static_cast<int64_t>(state->count) + 1;
    }
    return;
  }
  const uint32_t above = kPass == 0 ? 0 : state->key;
  const uint64_t limit = kPass == 0 ? p.share : state->rest, counted = kPass == 0 ? 0 : state->count;
  uint64_t weights[kEach], entries[kEach], mantissas[kEach], weight = 0, entry = 0, all = 0, all_entries = 0;
  const SaturatingAdd add;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int bin = Digit::kBins - 1 - (static_cast<int>(threadIdx.x) * kEach + i);
    CoverBin* const from = p.bins + int64_t{row} * kCoverBins + bin;
    mantissas[i] = from->mantissas;
    entries[i] = from->entries;
    *from = CoverBin{0, 0};
    weights[i] = kPass == 0 ? Fixed(mantissas[i], BinExponent(bin), p.fraction_bits) : mantissas[i];
    weight = add(weight, weights[i]);
    entry = add(entry, entries[i]);
  }
  uint64_t before = ScanThreads(weight, add, shared, &all);
  uint64_t entries_before = ScanThreads(entry, add, shared, &all_entries);
  if (all <= limit) {  // only in the first pass: the share holds everything
    if (threadIdx.x == 0) {
      *state = {0, static_cast<uint64_t>(p.length), ~uint64_t{0}, 0, 0, 1};
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint64_t after = add(before, weights[i]);
    if (before <= limit && after > limit) {
      const int bin = Digit::kBins - 1 - (static_cast<int>(threadIdx.x) * kEach + i);
      const uint32_t key = above << Digit::kBits | static_cast<uint32_t>(bin);
      CoverState next{limit - before, counted + entries_before, 0, 0, key, 0};
      if (kPass == 0) next.rest = Units(next.rest, BinExponent(bin), p.fraction_bits);
      if (kPass == 2) {
        next.take = next.rest / Mantissa(key);
        next.ties = entries[i];
        next.count += next.take;
        if (p.counts != nullptr) p.counts[row] = static_cast<int64_t>(next.count) + 1;
      }
      *state = next;
    }
    before = after;
    entries_before += entries[i];
  }
}

template <int kPass>
void LaunchPass(const CoverParams& p, cudaStream_t stream) {
  const auto slices = static_cast<unsigned>((p.length + kSlice - 1) / kSlice);
  const auto rows = static_cast<unsigned>(p.rows);
  ShareBinsKernel<kPass><<<dim3(slices, rows), kThreads, 0, stream>>>(p);
  ShareScanKernel<kPass><<<rows, kRadixThreads, 0, stream>>>(p);
}

}  // namespace

cudaError_t LaunchCover(const CoverParams& params, cudaStream_t stream) {
  const size_t bytes = sizeof(CoverBin) * kCoverBins * static_cast<size_t>(params.rows);
  if (const cudaError_t error = cudaMemsetAsync(params.bins, 0, bytes, stream); error != cudaSuccess) {
    return error;
  }
  LaunchPass<0>(params, stream);
  LaunchPass<1>(params, stream);
  LaunchPass<2>(params, stream);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
