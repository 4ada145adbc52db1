// Rows to e4m3: one CTA a row, which stays in registers between its maximum and its use.
#include "kernels/cuda/device/e4m3.cuh"
#include "kernels/cuda/sm90/quantize_launch.h"

namespace headwater::kernels::sm90 {
namespace {

using namespace headwater::kernels::device;  // NOLINT: the kernels are written in these

constexpr int kMostThreads = 512;
constexpr int kFewThreads = 256;  // more CTAs an SM, so that some load while others reduce

struct Bf16Row {
  const __nv_bfloat16* x;

  using Raw = uint4;
  __device__ __forceinline__ Raw Load(int64_t row, int64_t width, int64_t at) const {
    return __ldcs(reinterpret_cast<const uint4*>(x + row * width + at));
  }
  __device__ static __forceinline__ void Compute(const Raw& raw, float (&x)[8]) { Widen(raw, x); }
};

struct SiluRow {
  const __nv_bfloat16* gate_up;

  struct Raw {
    uint4 gate, up;
  };
  __device__ __forceinline__ Raw Load(int64_t row, int64_t width, int64_t at) const {
    const __nv_bfloat16* const gate = gate_up + row * 2 * width + at;
    return {__ldcs(reinterpret_cast<const uint4*>(gate)),
            __ldcs(reinterpret_cast<const uint4*>(gate + width))};
  }
  // The fast exponential and quotient (2^-17 relative where the result counts) are far below a step of e4m3.
  __device__ static __forceinline__ void Compute(const Raw& raw, float (&x)[8]) {
    float up[8];
    Widen(raw.gate, x);
    Widen(raw.up, up);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fdividef(x[i], 1.0f + __expf(-x[i])) * up[i];
  }
};

template <typename Source, int kChunks>
__global__ void __launch_bounds__(kMostThreads)
    QuantizeKernel(const Source source, uint8_t* out, float* scale, int64_t width) {
  __shared__ float shared[kMostThreads / 32];
  const int64_t row = blockIdx.x;
  typename Source::Raw raw[kChunks];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t at = (chunk * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 8;
    if (at < width) raw[chunk] = source.Load(row, width, at);
  }
  float x[kChunks][8];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t at = (chunk * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 8;
    if (at < width) Source::Compute(raw[chunk], x[chunk]);
  }
  StoreQuantized(x, width, out + row * width, scale + row, shared);
}

template <typename Source>
cudaError_t Launch(const Source& source, void* out, float* scale, int64_t num_rows, int64_t width,
                   cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(num_rows);
  auto* const bytes = static_cast<uint8_t*>(out);
  const int64_t eights = width / 8;
  const auto threads = [&](int64_t chunks) {
    return static_cast<unsigned>(((eights + chunks - 1) / chunks + 31) / 32 * 32);
  };
  if (eights <= kFewThreads) {
    QuantizeKernel<Source, 1><<<grid, threads(1), 0, stream>>>(source, bytes, scale, width);
  } else if (eights <= 2 * kFewThreads) {
    QuantizeKernel<Source, 2><<<grid, threads(2), 0, stream>>>(source, bytes, scale, width);
  } else if (eights <= 4 * kFewThreads) {
    QuantizeKernel<Source, 4><<<grid, threads(4), 0, stream>>>(source, bytes, scale, width);
  } else {
    QuantizeKernel<Source, 8><<<grid, threads(8), 0, stream>>>(source, bytes, scale, width);
  }
  return cudaGetLastError();
}
static_assert(kMaxQuantizedWidth <= 8 * 8 * kMostThreads);

}  // namespace

cudaError_t LaunchQuantizeRows(const CudaQuantizeRowsArgs& p, cudaStream_t stream) {
  return Launch(Bf16Row{static_cast<const __nv_bfloat16*>(p.x)}, p.out, p.scale, p.num_rows, p.width, stream);
}

cudaError_t LaunchQuantizedSiluMul(const CudaSiluMulArgs& p, cudaStream_t stream) {
  return Launch(SiluRow{static_cast<const __nv_bfloat16*>(p.gate_up)}, p.out, p.scale, p.num_tokens, p.width,
                stream);
}

}  // namespace headwater::kernels::sm90
