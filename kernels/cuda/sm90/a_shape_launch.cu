#include "kernels/cuda/sm90/a_shape_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kThreads = 128;

// One thread per tile: whole blocks of 64 keys that hold a sink, and that hold a key of a row's window.
__global__ void __launch_bounds__(kThreads) AShapeKernel(const AShapeParams p) {
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  unsigned long long steps = 0;
  if (tile < p.tiles) {
    const int64_t first_row = tile * kRangeRows, end = first_row + kRangeRows;
    const int64_t first_key = first_row - p.window_tokens + 1;
    const int64_t window = first_key < 0 ? 0 : first_key / kRangeRows * kRangeRows;
    const int64_t sinks = (p.sink_tokens + kRangeRows - 1) / kRangeRows * kRangeRows;
    CudaKeyRange* const ranges = p.ranges + 2 * tile;
    const bool whole = sinks >= window;
    int count = 0;
    if (!whole && sinks > 0) ranges[count++] = {0, static_cast<int32_t>(sinks)};
    ranges[count++] = {whole ? 0 : static_cast<int32_t>(window), static_cast<int32_t>(end)};
    p.counts[tile] = count;
    p.offsets[tile] = 2 * tile;
    steps = (whole ? end : sinks + end - window) / kRangeRows * p.num_q_heads;
  }
  for (int lane = 16; lane > 0; lane /= 2) steps += __shfl_xor_sync(~0u, steps, lane);
  if ((threadIdx.x & 31) == 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.visited), steps);
}

}  // namespace

cudaError_t LaunchAShape(const AShapeParams& params, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(params.visited, 0, sizeof(uint64_t), stream);
  if (error != cudaSuccess) return error;
  AShapeKernel<<<static_cast<unsigned>((params.tiles + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      params);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
