// Products of 128 keys with rows of queries by wgmma, from tiles of bf16 rows that ordinary asynchronous
// copies gather: rows may lie anywhere. A panel is 64 columns of a tile's rows, in MmaRows<64>'s layout,
// which is the 128-byte swizzle that wgmma reads; panels are 1024-byte aligned.
//
// Accumulators s[64] of m64n128: thread t of a warpgroup holds row 16 (t / 32) + 8 r + t % 32 / 4 and columns
// 8 n + 2 (t % 4) + c in s[4 n + 2 r + c].
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/wgmma.cuh"

namespace headwater::kernels::sm90 {

using device::MmaRows;

constexpr uint32_t kPanelRowBytes = 128;

// Copies a panel of kRows rows that lie `row` elements apart by kThreads threads; zeros from `valid` on. The
// addresses step by one addition: a copy costs a handful of instructions.
template <int kRows, int kThreads>
__device__ __forceinline__ void LoadPanel(uint32_t panel, const __nv_bfloat16* first, int64_t row,
                                          int valid) {
  constexpr int kEach = kThreads / 8;  // rows a pass; thread: 16 bytes of one
  static_assert(kEach % 8 == 0 && kRows % kEach == 0);
  const int thread = static_cast<int>(threadIdx.x), own = thread / 8, chunk = thread % 8;
  const __nv_bfloat16* from = first + own * row + chunk * 8;
  const uint32_t to = MmaRows<64>::At(panel, own, chunk);
  const int64_t step = kEach * row;
#pragma unroll
  for (int i = 0; i < kRows / kEach; ++i) {
    device::CopyAsync16(to + i * kEach * kPanelRowBytes, from, own + i * kEach < valid);
    from += step;
  }
}

// Adds (`first`: sets) the products of 64 rows at `a` with the 128 at `b` over one panel; by a warpgroup,
// between WgmmaFence() and WgmmaCommit().
__device__ __forceinline__ void PanelProducts(float (&s)[64], uint32_t a, uint32_t b, bool first) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    device::Wgmma<128>::SsKMajor(s, device::DescriptorLow(a + 32 * k, 0),
                                 device::DescriptorLow(b + 32 * k, 0), first && k == 0 ? 0 : 1);
  }
}

// After WgmmaWait(): what reads `s` below stays below.
__device__ __forceinline__ void Arrived(float (&s)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(s[i])::"memory");
}

__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The accumulators' row r of a thread of two warpgroups, which hold 128 rows.
__device__ __forceinline__ int RowOfThread(int r) {
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5);
  return 16 * warp + 8 * r + lane / 4;
}

// Keys of one KV head.
struct KeyRows {
  const __nv_bfloat16* first;
  int64_t row;     // elements from one token to the next
  int64_t tokens;  // zeros past them
};

// 128 rows of queries stay in shared memory while blocks of 128 keys pass: two warpgroups of 64 rows, and two
// CTAs of an SM so that one's exponentials run beside the other's products.
template <int kDim>
struct RowTile {
  static constexpr int kThreads = 256, kPanels = kDim / 64;
  static constexpr uint32_t kPanelBytes = 128 * kPanelRowBytes, kTileBytes = kPanels * kPanelBytes;
  static constexpr int kSharedBytes = 3 * kTileBytes + 1024;

  template <typename RowOf>
  static __device__ __forceinline__ void LoadRows(uint32_t base, const void* any_global, RowOf row_of) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      MmaRows<64>::Load<128, kThreads>(base + panel * kPanelBytes, static_cast<int>(threadIdx.x), any_global,
                                       [&](int row) {
                                         const __nv_bfloat16* const from = row_of(row);
                                         return from == nullptr ? from : from + 64 * panel;
                                       });
    }
  }

  // take(s, block) for blocks [begin, end) in order; row_of(row): query row, null for zeros. take() of all
  // threads lies between two barriers of the CTA.
  template <typename RowOf, typename Take>
  static __device__ __forceinline__ void Run(const KeyRows& keys, int begin, int end, RowOf row_of,
                                             Take take) {
    extern __shared__ unsigned char dynamic[];
    const uint32_t rows = (device::SharedAddress(dynamic) + 1023) & ~1023u;
    const auto load_keys = [&](int block) {
      const int64_t token = int64_t{block} * 128;
      const int valid = static_cast<int>(keys.tokens - token < 128 ? keys.tokens - token : 128);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        LoadPanel<128, kThreads>(rows + (1 + (block & 1)) * kTileBytes + panel * kPanelBytes,
                                 keys.first + token * keys.row + 64 * panel, keys.row, valid);
      }
      device::CopyAsyncCommit();
    };
    if (begin >= end) return;
    LoadRows(rows, keys.first, row_of);
    load_keys(begin);
    const uint32_t own = rows + (threadIdx.x / 128) * 64 * kPanelRowBytes;
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
      device::CopyAsyncWait<0>();
      device::FenceAsync();
      __syncthreads();
      const uint32_t tile = rows + (1 + (block & 1)) * kTileBytes;
      float s[64];
      device::WgmmaFence();
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        PanelProducts(s, own + panel * kPanelBytes, tile + panel * kPanelBytes, panel == 0);
      }
      device::WgmmaCommit();
      if (block + 1 < end) load_keys(block + 1);
      device::WgmmaWait<0>();
      Arrived(s);
      take(s, block);
    }
    __syncthreads();
  }
};

}  // namespace headwater::kernels::sm90
