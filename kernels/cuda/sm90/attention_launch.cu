#include "kernels/cuda/sm90/attention_kernel.cuh"
#include "kernels/cuda/sm90/attention_launch.h"

namespace headwater::kernels::sm90 {
namespace {

// From here on wide steps save more (fewer barriers and turns a key) than they lose on the diagonal.
constexpr int64_t kLongKeys = 65536;

template <class Traits>
cudaError_t Launch(const AttentionMaps& maps, const AttentionParams& params, int num_sms,
                   cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(typename Traits::Shared));
  auto* const kernel = AttentionKernel<Traits>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<num_sms, Traits::kThreads, kBytes, stream>>>(maps.q, maps.k, maps.v, maps.out, maps.k_means,
                                                        maps.v_means, maps.k_mean_steps, maps.v_mean_steps,
                                                        params);
  return cudaGetLastError();
}

// A thread sums its run of sequences, then one scan over the threads.
__global__ void __launch_bounds__(1024) TilePrefixKernel(const TilePrefixParams p) {
  if (threadIdx.x == 0 && p.long_tile_count != nullptr) {
    *p.long_tile_count = 0;
    *p.total_blocks = 0;
  }
  if (p.cu_q == nullptr) {
    if (threadIdx.x == 0) {
      p.single_q[0] = p.single_k[0] = p.tile_begin[0] = *p.next_tile = 0;
      p.single_q[1] = p.total_q;
      p.single_k[1] = p.total_k;
      p.tile_begin[1] = (p.total_q + p.tile_positions - 1) / p.tile_positions;
    }
    return;
  }
  __shared__ int32_t sums[1024];
  const int thread = static_cast<int>(threadIdx.x), run = (p.num_sequences + 1023) / 1024;
  const int begin = min(p.num_sequences, thread * run), end = min(p.num_sequences, begin + run);
  const auto tiles = [&](int i) {
    return (p.cu_q[i + 1] - p.cu_q[i] + p.tile_positions - 1) / p.tile_positions;
  };
  int32_t sum = 0;
  for (int i = begin; i < end; ++i) sum += tiles(i);
  sums[thread] = sum;
  __syncthreads();
  for (int step = 1; step < 1024; step *= 2) {
    const int32_t before = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  int32_t at = sums[thread] - sum;
  for (int i = begin; i < end; ++i) {
    p.tile_begin[i] = at;
    at += tiles(i);
  }
  if (thread == 1023) p.tile_begin[p.num_sequences] = sums[1023];
  if (thread == 0) *p.next_tile = 0;
}

// Steps of a tile.
__device__ __forceinline__ int64_t BlocksOf(const AttentionParams& p, int64_t number, int tiles) {
  const TilePlace place = PlaceOf(p, number, tiles);
  const int count = p.list_counts[SegmentOf(place, tiles)];
  return count != kDenseSegment ? count : DescribeTile<kBlockKeys>(p, place, tiles, 1).num_blocks;
}

__global__ void __launch_bounds__(256) TotalBlocksKernel(const AttentionParams p) {
  const int tiles = TileCount(p);
  const int64_t count = static_cast<int64_t>(tiles) * p.num_heads;
  int64_t sum = 0;
  for (int64_t i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256)
    sum += BlocksOf(p, i, tiles);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if ((threadIdx.x & 31) == 0 && sum > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(const_cast<int64_t*>(p.total_blocks)), sum);
  }
}

__global__ void __launch_bounds__(256) LongTilesKernel(const AttentionParams p) {
  const int tiles = TileCount(p);
  const int64_t count = static_cast<int64_t>(tiles) * p.num_heads, total = *p.total_blocks;
  for (int64_t i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) {
    if (IsLong(BlocksOf(p, i, tiles), total, count)) {
      const_cast<int32_t*>(p.long_tiles)[atomicAdd(const_cast<int32_t*>(p.long_tile_count), 1)] =
          static_cast<int32_t>(i);
    }
  }
}

// A warp a segment.
__global__ void __launch_bounds__(256)
    CheckListsKernel(const AttentionParams p, int64_t num_blocks, unsigned long long* first_bad) {
  AttentionParams causal = p;
  causal.list_counts = nullptr;  // to describe tiles without a look at their lists
  const int tiles = TileCount(p), lane = static_cast<int>(threadIdx.x & 31);
  const int64_t segments = static_cast<int64_t>(tiles) * p.num_heads, warps = int64_t{gridDim.x} * 8;
  for (int64_t segment = int64_t{blockIdx.x} * 8 + threadIdx.x / 32; segment < segments; segment += warps) {
    const TilePlace place{static_cast<int>(segment / tiles), static_cast<int>(segment % tiles)};
    const int visible = DescribeTile<kBlockKeys>(causal, place, tiles, 1).num_blocks;
    const int count = p.list_counts[segment];
    const int64_t offset = count > 0 ? p.list_offsets[segment] : 0;
    bool bad = count < kDenseSegment || count > visible || offset < 0 || offset > num_blocks - max(0, count);
    for (int i = lane; i < count && !bad; i += 32) {
      const int block = p.list_blocks[offset + i], before = i > 0 ? p.list_blocks[offset + i - 1] : -1;
      bad = block <= before || block >= visible;
    }
    if (__any_sync(~0u, bad) && lane == 0) atomicMin(first_bad, static_cast<unsigned long long>(segment));
  }
}

}  // namespace

cudaError_t LaunchCheckLists(const AttentionParams& params, int64_t num_blocks, int64_t* first_bad,
                             int num_sms, cudaStream_t stream) {
  CheckListsKernel<<<static_cast<unsigned>(num_sms * 8), 256, 0, stream>>>(
      params, num_blocks, reinterpret_cast<unsigned long long*>(first_bad));
  return cudaGetLastError();
}

cudaError_t LaunchLongTiles(const AttentionParams& params, int64_t max_tiles, cudaStream_t stream) {
  const int64_t blocks = (max_tiles * params.num_heads + 255) / 256;
  const unsigned grid = static_cast<unsigned>(blocks < 512 ? blocks : 512);
  TotalBlocksKernel<<<grid, 256, 0, stream>>>(params);
  LongTilesKernel<<<grid, 256, 0, stream>>>(params);
  return cudaGetLastError();
}

AttentionTile TileFor(int head_dim, bool has_lists, int64_t kv_len) {
  if (has_lists) return {128, kBlockKeys};
  if (head_dim == 64) return {192, 128};
  return {128, kv_len >= kLongKeys ? 160 : 128};
}

cudaError_t LaunchAttention(const AttentionMaps& maps, const AttentionParams& params, int head_dim,
                            AttentionTile tile, bool corrected, int num_sms, cudaStream_t stream) {
  if (corrected && head_dim == 128) {
    return Launch<AttentionTraits<128, 2, 128, true>>(maps, params, num_sms, stream);
  }
  if (corrected) return Launch<AttentionTraits<64, 2, 128, true>>(maps, params, num_sms, stream);
  if (tile.keys == 160) return Launch<AttentionTraits<128, 2, 160>>(maps, params, num_sms, stream);
  if (head_dim == 128) return Launch<AttentionTraits<128, 2, 128>>(maps, params, num_sms, stream);
  if (tile.rows == 192) return Launch<AttentionTraits<64, 3, 128>>(maps, params, num_sms, stream);
  return Launch<AttentionTraits<64, 2, 128>>(maps, params, num_sms, stream);
}

cudaError_t LaunchTilePrefix(const TilePrefixParams& params, cudaStream_t stream) {
  TilePrefixKernel<<<1, params.cu_q == nullptr ? 32 : 1024, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
