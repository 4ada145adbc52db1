// FlashPrefill's selection: one CTA per tile, long ones first. The product is block means times query rows,
// so that a block's row of it, all queries of the tile, lies in four neighbouring threads: its energy is
// whole after one product, and the log2 of it, one float a block, is all that is kept.
#include "kernels/cuda/flash.h"
#include "kernels/cuda/sm90/flash_launch.h"
#include "kernels/cuda/sm90/flash_tile.cuh"

namespace headwater::kernels::sm90 {
namespace {

template <int kHeadDim>
__global__ void __launch_bounds__(kFlashThreads, 2)
    FlashKernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap mean_map,
                const __grid_constant__ FlashParams p) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<FlashShared<kHeadDim>*>(storage);
  auto* const energies = reinterpret_cast<float*>(storage + sizeof(FlashShared<kHeadDim>));
  const FlashTileShape t = FlashTileOf(p, static_cast<int>(blockIdx.x) % p.num_lists,
                                       p.tiles - 1 - static_cast<int>(blockIdx.x) / p.num_lists);
  const int64_t segment = static_cast<int64_t>(t.list) * p.tiles + t.tile;
  uint32_t* const words = p.words + segment * p.tile_words;
  if (t.tile >= p.first_dense_tile) {
    for (int word = threadIdx.x; word * 32 < t.visible; word += kFlashThreads) {
      const int left = t.visible - word * 32;
      words[word] = left >= 32 ? ~0u : (1u << left) - 1;
    }
    return;
  }
  if (threadIdx.x == 0) {
    BarrierInit(SharedAddress(&shared.q_full), 1);
    for (int i = 0; i < 2; ++i) {
      for (uint64_t& full : shared.means_full[i]) BarrierInit(SharedAddress(&full), 1);
      for (uint64_t& read : shared.means_free[i]) BarrierInit(SharedAddress(&read), 4);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  if (t.scored > 0) ScoreTile<kHeadDim>(q_map, mean_map, p, t, shared, energies);
  __syncthreads();
  SelectBlocks(p, t, energies, shared.best, shared.counts, words);
  if (p.energies == nullptr) return;
  for (int i = threadIdx.x; i < t.scored; i += kFlashThreads)
    p.energies[segment * p.blocks + i] = energies[i];
}

template <int kHeadDim>
cudaError_t Launch(const CUtensorMap& q, const CUtensorMap& means, const FlashParams& p,
                   cudaStream_t stream) {
  const auto bytes = static_cast<int>(sizeof(FlashShared<kHeadDim>) + static_cast<size_t>(p.blocks) * 4);
  auto* const kernel = FlashKernel<kHeadDim>;
  // The attribute is the function's, not the call's: one size for all, since other threads may launch too.
  constexpr int kMost = sizeof(FlashShared<kHeadDim>) + (kCudaFlashMostTokens / 128) * 4;
  static_assert(kMost <= 227 * 1024);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(int64_t{p.num_lists} * p.tiles), kFlashThreads, bytes, stream>>>(q, means,
                                                                                                  p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchFlashSelect(const CUtensorMap& q, const CUtensorMap& means, const FlashParams& params,
                              int head_dim, cudaStream_t stream) {
  return head_dim == 128 ? Launch<128>(q, means, params, stream) : Launch<64>(q, means, params, stream);
}

}  // namespace headwater::kernels::sm90
