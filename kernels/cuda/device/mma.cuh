// Warp-level matrix products, and tiles of bf16 rows in shared memory for them: for kernels whose products
// are small or oddly shaped. The large ones are built on device/wgmma.cuh.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/device/ptx.cuh"

namespace headwater::kernels::device {

// c += a b, 16 x 8 x 16. Lane l holds of c: rows l / 4 (c[0], c[1]) and l / 4 + 8 (c[2], c[3]), columns 2 (l
// % 4) and the next.
__device__ __forceinline__ void MmaBf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// 16 bytes from global to shared memory, zeros where not `valid` (the address is not read then).
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's latest groups are under way; __syncthreads() shows them to others.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Rows of kDim bf16 in shared memory, 128-byte aligned; chunks of 16 bytes are permuted within each eight, so
// that ldmatrix finds no bank twice.
template <int kDim>
struct MmaRows {
  static_assert(kDim % 64 == 0);
  static constexpr int kChunks = kDim / 8;
  static constexpr uint32_t Bytes(int rows) { return static_cast<uint32_t>(rows) * kDim * 2; }
  __device__ static __forceinline__ uint32_t At(uint32_t base, int row, int chunk) {
    return base + static_cast<uint32_t>(row * kChunks + ((chunk & ~7) | ((chunk ^ row) & 7))) * 16;
  }

  // Rows [0, kRows) by all kThreads threads; row_of(row): const __nv_bfloat16*, null for a row of zeros.
  // Commit and wait are the caller's.
  template <int kRows, int kThreads, typename RowOf>
  __device__ static __forceinline__ void Load(uint32_t base, int thread, const void* any_global,
                                              RowOf row_of) {
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const __nv_bfloat16* const from = row_of(row);
      CopyAsync16(At(base, row, chunk), from == nullptr ? any_global : from + chunk * 8, from != nullptr);
    }
  }

  // s[n] = products of rows [first_row, first_row + 16) of `a` with rows [first_key + 8 n, + 8) of `b`, in
  // MmaBf16()'s layout; by one warp. kKeys is a multiple of 16. Adds to s.
  template <int kKeys>
  __device__ static __forceinline__ void Products(float (&s)[kKeys / 8][4], uint32_t a, int first_row,
                                                  uint32_t b, int first_key) {
    const int lane = static_cast<int>(threadIdx.x & 31);
    const int a_row = first_row + (lane & 15), a_chunk = lane >> 4;
    const int b_row = first_key + (lane & 7) + (lane >> 4 & 1) * 8, b_chunk = lane >> 3 & 1;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t af[4];
      LoadMatrix4(af, At(a, a_row, 2 * k + a_chunk));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t bf[4];
        LoadMatrix4(bf, At(b, b_row + 16 * n, 2 * k + b_chunk));
        MmaBf16(s[2 * n], af, bf[0], bf[1]);
        MmaBf16(s[2 * n + 1], af, bf[2], bf[3]);
      }
    }
  }

  // The same for 16 rows whose fragments are in registers, in one array and from 0: s[4 n + e] is element e
  // of the keys [first_key + 8 n, + 8).
  template <int kKeys>
  __device__ static __forceinline__ void Scores(float (&s)[kKeys / 2], const uint32_t (&a)[kDim / 16][4],
                                                uint32_t b, int first_key) {
    const int lane = static_cast<int>(threadIdx.x & 31);
    const int b_row = first_key + (lane & 7) + (lane >> 4 & 1) * 8, b_chunk = lane >> 3 & 1;
#pragma unroll
    for (float& x : s) x = 0;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t bf[4];
        LoadMatrix4(bf, At(b, b_row + 16 * n, 2 * k + b_chunk));
        MmaBf16(reinterpret_cast<float(&)[4]>(s[8 * n]), a[k], bf[0], bf[1]);
        MmaBf16(reinterpret_cast<float(&)[4]>(s[8 * n + 4]), a[k], bf[2], bf[3]);
      }
    }
  }

  // o += w b for 16 rows of weights and kKeys rows of `b` from first_key on, by one warp. Lane l's weights:
  // w[2 n + r] is the pair of keys 8 n + 2 (l % 4) and the next, of row l / 4 + 8 r. o[n]: columns [8 n, + 8)
  // in MmaBf16()'s layout.
  template <int kKeys>
  __device__ static __forceinline__ void WeighedSum(float (&o)[kDim / 8][4], const uint32_t (&w)[kKeys / 4],
                                                    uint32_t b, int first_key) {
    const int lane = static_cast<int>(threadIdx.x & 31);
    const int b_row = first_key + (lane & 15), b_chunk = lane >> 4;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32_t af[4] = {w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]};
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t bf[4];
        LoadMatrix4Transposed(bf, At(b, b_row + 16 * k, 2 * n + b_chunk));
        MmaBf16(o[2 * n], af, bf[0], bf[1]);
        MmaBf16(o[2 * n + 1], af, bf[2], bf[3]);
      }
    }
  }
};

}  // namespace headwater::kernels::device
