// The regression's systems: Cholesky in f64, a CTA a head. A thread has a row; the right-hand side is one
// more row, which makes its factor the forward substitution. Columns go in panels of 32.
#include "kernels/cuda/sm90/skeleton_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kPanel = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

template <int kDim>
struct System {
  static constexpr int kColumns = 2 * kDim, kLead = kColumns + kSkeletonMoreRows;
  static constexpr int kThreads = kColumns + 32;
  struct Shared {
    double before[kColumns - kPanel][kPanel];  // the panel's rows of earlier columns
    double diagonal[kPanel][kPanel];           // [column][row]
    double inverse[kPanel];
    double x[kColumns], y[kPanel];
    double squares;
  };
};

// A panel's diagonal block, by the warp whose rows these are.
__device__ __forceinline__ void FactorDiagonal(double (&a)[kPanel], double (&diagonal)[kPanel][kPanel],
                                               double (&inverse)[kPanel]) {
  const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
  for (int j = 0; j < kPanel; ++j) {
    const double root = sqrt(__shfl_sync(kAll, a[j], j)), reciprocal = 1.0 / root;
    a[j] = lane == j ? root : a[j] * reciprocal;
    diagonal[j][lane] = a[j];
    if (lane == j) inverse[j] = reciprocal;
#pragma unroll
    for (int c = j + 1; c < kPanel; ++c) a[c] -= a[j] * __shfl_sync(kAll, a[j], c);
  }
}

// Rows from first on become those of the factor.
template <int kDim>
__device__ __forceinline__ void FactorPanel(double* system, int first, double ridge,
                                            typename System<kDim>::Shared& s) {
  using S = System<kDim>;
  const int row = static_cast<int>(threadIdx.x);
  for (int i = row; i < first * kPanel; i += S::kThreads) {
    s.before[i / kPanel][i % kPanel] = system[i / kPanel * S::kLead + first + i % kPanel];
  }
  __syncthreads();
  // Whole warps, so that one of them can factor; rows past the right-hand side have no memory.
  const bool active = row / 32 * 32 >= first, real = active && row <= S::kColumns;
  double a[kPanel];
  if (active) {
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
      a[c] = real ? system[(first + c) * S::kLead + row] : 0.0;
      if (row == first + c) a[c] += ridge;
    }
#pragma unroll 8
    for (int m = 0; m < first; ++m) {
      const double l = real ? system[m * S::kLead + row] : 0.0;
#pragma unroll
      for (int c = 0; c < kPanel; ++c) a[c] -= l * s.before[m][c];
    }
    if (row / 32 * 32 == first) FactorDiagonal(a, s.diagonal, s.inverse);
  }
  __syncthreads();
  if (!real) return;
  if (row / 32 * 32 != first) {
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
#pragma unroll
      for (int m = 0; m < c; ++m) a[c] -= a[m] * s.diagonal[m][c];
      a[c] *= s.inverse[c];
    }
  }
#pragma unroll
  for (int c = 0; c < kPanel; ++c) system[(first + c) * S::kLead + row] = a[c];
}

// x of a panel, those after it known.
template <int kDim>
__device__ __forceinline__ void SubstituteBack(const double* system, int first,
                                               typename System<kDim>::Shared& s) {
  using S = System<kDim>;
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x / 32);
  for (int c = warp; c < kPanel; c += S::kThreads / 32) {
    const double* const column = system + (first + c) * S::kLead;
    double sum = 0;
    for (int m = first + kPanel + lane; m < S::kColumns; m += 32) sum += column[m] * s.x[m];
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAll, sum, bit);
    if (lane == 0) s.y[c] = column[S::kColumns] - sum;
    s.diagonal[c][lane] = column[first + lane];
  }
  __syncthreads();
  if (warp == 0) {
    double y = s.y[lane];
    double own = 0;
#pragma unroll 1
    for (int j = kPanel - 1; j >= 0; --j) {
      if (lane == j) own = y / s.diagonal[j][j];
      const double x = __shfl_sync(kAll, own, j);
      if (lane < j) y -= s.diagonal[lane][j] * x;
    }
    s.x[first + lane] = own;
  }
  __syncthreads();
}

template <int kDim>
__global__ void __launch_bounds__(System<kDim>::kThreads, 1) SolveKernel(const SkeletonParams p) {
  using S = System<kDim>;
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<typename S::Shared*>(shared);
  double* const system = p.system + static_cast<int64_t>(blockIdx.x) * p.splits * S::kColumns * S::kLead;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) {
    double sum = 0;
    for (int i = thread; i < S::kColumns; i += 32) sum += system[i * S::kLead + i];
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAll, sum, bit);
    if (thread == 0) s.squares = sum;
  }
  __syncthreads();
  double* const out = p.coefficients + static_cast<int64_t>(blockIdx.x) * S::kColumns;
  // No pair differs from its row's mean (where there is one row, but for rounding), or something is not a
  // number.
  if (!(s.squares > 0) || p.rows == 1) {
    if (thread < S::kColumns) out[thread] = 0;
    return;
  }
  const double ridge = p.ridge * p.ridge * s.squares * 0.25;
  for (int first = 0; first < S::kColumns; first += kPanel) {
    FactorPanel<kDim>(system, first, ridge, s);
    __syncthreads();
  }
  for (int first = S::kColumns - kPanel; first >= 0; first -= kPanel) {
    SubstituteBack<kDim>(system, first, s);
  }
  if (thread < S::kColumns) out[thread] = s.x[thread];
}

template <int kDim>
cudaError_t Launch(const SkeletonParams& p, cudaStream_t stream) {
  using S = System<kDim>;
  constexpr int kBytes = static_cast<int>(sizeof(typename S::Shared));
  const cudaError_t error =
      cudaFuncSetAttribute(SolveKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  SolveKernel<kDim><<<p.num_q_heads, S::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchSkeletonSolve(const SkeletonParams& p, cudaStream_t stream) {
  return p.head_dim == 128 ? Launch<128>(p, stream) : Launch<64>(p, stream);
}

}  // namespace headwater::kernels::sm90
