#include <type_traits>

#include "kernels/cuda/sm90/block_masks_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kWarps = 8;  // of a CTA that counts or writes; one tile each
constexpr int kScanThreads = 1024;
constexpr int kScanItems = 8;  // segments of one thread at a time

// Segments (list, tile), and what tiles see.
struct MaskParams {
  CudaListsOfMasksArgs args;
  int64_t tiles, tile_words, segments;

  __device__ __forceinline__ int64_t Visible(int64_t tile) const {
    const int64_t end = (tile + 1) * args.masks.tile_positions;
    return ((end < args.masks.num_tokens ? end : args.masks.num_tokens) + 127) / 128;
  }
  // Of a segment's mask, the visible ones.
  __device__ __forceinline__ uint32_t Word(int64_t segment, int64_t word, int64_t visible) const {
    const int64_t left = visible - word * 32;
    if (left <= 0) return 0;
    const uint32_t bits = args.masks.words[segment * tile_words + word];
    return left >= 32 ? bits : bits & ((1u << left) - 1);
  }
};
static_assert(std::is_trivially_copyable_v<MaskParams>);

__device__ __forceinline__ int64_t SegmentOfWarp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
}

// Inclusive sum over the lanes of a warp.
__device__ __forceinline__ uint64_t SumToLane(uint64_t value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, value, step);
    if (static_cast<int>(threadIdx.x & 31) >= step) value += other;
  }
  return value;
}

__global__ void __launch_bounds__(kWarps * 32) CountKernel(const MaskParams p) {
  const int64_t segment = SegmentOfWarp();
  if (segment >= p.segments) return;
  const int lane = static_cast<int>(threadIdx.x & 31);
  const int64_t list = segment / p.tiles, visible = p.Visible(segment - list * p.tiles);
  int64_t count = visible;
  if (p.args.dense_lists == nullptr || p.args.dense_lists[list] == 0) {
    uint32_t bits = 0;
    for (int64_t word = lane; word * 32 < visible; word += 32) bits += __popc(p.Word(segment, word, visible));
    count = __reduce_add_sync(~0u, bits);
  }
  if (lane == 0) p.args.counts[segment] = count == visible ? -1 : static_cast<int32_t>(count);
}

// One CTA: counts of all segments become offsets.
__global__ void __launch_bounds__(kScanThreads) OffsetKernel(const MaskParams p) {
  __shared__ uint64_t sums[kScanThreads / 32 + 1], visits[kScanThreads / 32];
  __shared__ uint32_t overflows;
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5);
  if (threadIdx.x == 0) overflows = 0;
  uint64_t begin = 0, visited = 0;  // entries before this round; what this thread's tiles visit
  for (int64_t base = 0; base < p.segments; base += kScanThreads * kScanItems) {
    const int64_t first = base + static_cast<int64_t>(threadIdx.x) * kScanItems;
    int32_t count[kScanItems];
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) count[i] = first + i < p.segments ? p.args.counts[first + i] : 0;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) sum += static_cast<uint64_t>(max(count[i], 0));
    const uint64_t to_lane = SumToLane(sum);
    __syncthreads();  // the last round's sums have been read
    if (lane == 31) sums[warp] = to_lane;
    __syncthreads();
    if (warp == 0) {
      const uint64_t of_warp = sums[lane], to_warp = SumToLane(of_warp);
      sums[lane] = to_warp - of_warp;
      if (lane == 31) sums[32] = to_warp;
    }
    __syncthreads();
    uint64_t at = begin + sums[warp] + to_lane - sum;
    begin += sums[32];
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      const int64_t segment = first + i;
      if (segment >= p.segments) break;
      const auto entries = static_cast<uint64_t>(max(count[i], 0));
      bool dense = count[i] < 0;
      if (!dense && at + entries > static_cast<uint64_t>(p.args.capacity)) {
        dense = true;
        p.args.counts[segment] = -1;
        atomicAdd(&overflows, 1u);
      }
      p.args.offsets[segment] = dense ? 0 : static_cast<int64_t>(at);
      visited += dense ? static_cast<uint64_t>(p.Visible(segment % p.tiles)) : entries;
      at += entries;
    }
  }
  visited = SumToLane(visited);
  if (lane == 31) visits[warp] = visited;
  __syncthreads();
  if (warp != 0) return;
  visited = SumToLane(visits[lane]);
  if (lane == 31) {
    *p.args.visited = visited;
    *p.args.overflows = overflows;
  }
}

__global__ void __launch_bounds__(kWarps * 32) WriteKernel(const MaskParams p) {
  const int64_t segment = SegmentOfWarp();
  if (segment >= p.segments || p.args.counts[segment] <= 0) return;
  const int64_t visible = p.Visible(segment % p.tiles);
  int32_t* out = p.args.blocks + p.args.offsets[segment];
  for (int64_t base = 0; base * 32 < visible; base += 32) {
    const int64_t word = base + (threadIdx.x & 31);
    uint32_t bits = p.Word(segment, word, visible);
    const auto own = static_cast<uint32_t>(__popc(bits));
    const auto to_lane = static_cast<uint32_t>(SumToLane(own));
    int32_t* at = out + (to_lane - own);
    for (; bits != 0; bits &= bits - 1) *at++ = static_cast<int32_t>(word * 32) + __ffs(bits) - 1;
    out += __shfl_sync(~0u, to_lane, 31);
  }
}

struct CountParams {
  CudaCountListsArgs args;
  int64_t tiles, tile_positions, end;  // end: of the queries
};

// A CTA a list.
__global__ void __launch_bounds__(kScanThreads) CountListsKernel(const CountParams p) {
  __shared__ uint64_t sums[kScanThreads / 32];
  __shared__ uint32_t dense_tiles;
  if (threadIdx.x == 0) dense_tiles = 0;
  __syncthreads();
  const int32_t* const counts = p.args.lists.counts + static_cast<int64_t>(blockIdx.x) * p.tiles;
  uint64_t visited = 0;
  for (int64_t tile = threadIdx.x; tile < p.tiles; tile += kScanThreads) {
    const int32_t count = counts[tile];
    const int64_t end = min(p.args.queries.first + (tile + 1) * p.tile_positions, p.end);
    visited += static_cast<uint64_t>(count < 0 ? (end + 127) / 128 : count);
    if (count < 0) atomicAdd(&dense_tiles, 1u);
  }
  visited = SumToLane(visited);
  if ((threadIdx.x & 31) == 31) sums[threadIdx.x >> 5] = visited;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  visited = SumToLane(sums[threadIdx.x]);
  if (threadIdx.x != 31) return;
  const bool adds = p.args.accumulate;
  p.args.visited[blockIdx.x] = visited + (adds ? p.args.visited[blockIdx.x] : 0);
  p.args.dense_tiles[blockIdx.x] = dense_tiles + (adds ? p.args.dense_tiles[blockIdx.x] : 0);
  if (blockIdx.x == 0 && p.args.overflow_sum != nullptr) {
    *p.args.overflow_sum = *p.args.overflows + (adds ? *p.args.overflow_sum : 0);
  }
}

}  // namespace

cudaError_t LaunchCountLists(const CudaCountListsArgs& args, cudaStream_t stream) {
  const int64_t positions = 128 / (args.num_q_heads / args.lists.num_lists);
  const int64_t count = args.queries.count > 0 ? args.queries.count : args.num_tokens;
  CountListsKernel<<<static_cast<unsigned>(args.lists.num_lists), kScanThreads, 0, stream>>>(
      {args, (count + positions - 1) / positions, positions, args.queries.first + count});
  return cudaGetLastError();
}

cudaError_t LaunchListsOfMasks(const CudaListsOfMasksArgs& args, cudaStream_t stream) {
  const MaskParams params{args, args.masks.tiles(), args.masks.tile_words(),
                          args.masks.num_lists * args.masks.tiles()};
  const auto grid = static_cast<unsigned>((params.segments + kWarps - 1) / kWarps);
  CountKernel<<<grid, kWarps * 32, 0, stream>>>(params);
  OffsetKernel<<<1, kScanThreads, 0, stream>>>(params);
  WriteKernel<<<grid, kWarps * 32, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
