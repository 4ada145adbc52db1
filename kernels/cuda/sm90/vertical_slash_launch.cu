#include "kernels/cuda/sm90/vertical_slash_launch.h"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kChooseThreads = 1024, kBins = 2048;
constexpr int kMergeThreads = 128;
constexpr int kScanThreads = 1024, kScanEach = 8;
constexpr unsigned kAll = ~0u;

__device__ __forceinline__ int SumOverWarp(int x) { return __reduce_add_sync(kAll, x); }

// Sums of a head as numbers whose order is that of the choice; forced ones above all.
struct Ranks {
  const float* sums;
  int tokens, forced;
  bool from_end;  // the number i has the sum at tokens - 1 - i

  __device__ __forceinline__ uint32_t At(int i) const {
    if (i < forced) return ~0u;
    const uint32_t bits = __float_as_uint(sums[from_end ? tokens - 1 - i : i]);
    return bits == ~0u ? bits - 1 : bits;
  }
};

// Ranks with `known` in the bits from `shift` + those of a digit on: how many have each digit at `shift`.
__device__ void CountDigits(const Ranks& ranks, uint32_t known, int digit_end, int shift, int* bins) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kBins; i += kChooseThreads) bins[i] = 0;
  __syncthreads();
  const uint32_t mask = (uint32_t{1} << (digit_end - shift)) - 1;
#pragma unroll 4
  for (int64_t i = thread; i < ranks.tokens; i += kChooseThreads) {
    const uint32_t rank = ranks.At(static_cast<int>(i));
    if (digit_end == 32 || rank >> digit_end == known) atomicAdd(&bins[rank >> shift & mask], 1);
  }
  __syncthreads();
}

// The largest digit that `wanted` ranks reach; found[1]: how many ranks have larger ones. By the first warp.
__device__ void FindDigit(const int* bins, int wanted, int* found) {
  constexpr int kEach = kBins / 32;
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x), first = kBins - kEach * (lane + 1);
    int sum = 0;
    for (int i = 0; i < kEach; ++i) sum += bins[first + (i + lane) % kEach];
    int upto = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAll, upto, step);
      if (lane >= step) upto += other;
    }
    int above = upto - sum;
    if (above < wanted && wanted <= upto) {
      int digit = first + kEach - 1;
      while (above + bins[digit] < wanted) above += bins[digit--];
      found[0] = digit;
      found[1] = above;
    }
  }
  __syncthreads();
}

// One CTA for each head (x) and kind (y: columns, distances). Radix selection of the last rank that is
// chosen, then one pass in order: of equal ranks the first ones.
__global__ void __launch_bounds__(kChooseThreads) ChooseKernel(const ChooseParams p, int64_t num_words) {
  __shared__ int bins[kBins], found[2], equals[32];
  __shared__ uint32_t words[32];
  const int kind = static_cast<int>(blockIdx.y), head = p.first_head + static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread / 32;
  const CudaChosen& chosen = p.args.chosen;
  const int64_t tokens = p.args.num_tokens;
  const Ranks ranks = {(kind == 0 ? p.args.vertical : p.args.slash) + head * tokens, static_cast<int>(tokens),
                       p.forced[kind], kind == 1};
  int wanted = p.counts[kind][blockIdx.x];
  if (kind == 0 && thread == 0) chosen.column_totals[head] = wanted;
  uint32_t least = 0;
  constexpr int kEnds[4] = {32, 21, 10, 0};
#pragma unroll
  for (int digit = 0; digit < 3; ++digit) {
    CountDigits(ranks, least, kEnds[digit], kEnds[digit + 1], bins);
    FindDigit(bins, wanted, found);
    least = least << (kEnds[digit] - kEnds[digit + 1]) | static_cast<uint32_t>(found[0]);
    wanted -= found[1];
  }

  const int64_t end = kind == 0 ? tokens : num_words * 32;
  int32_t* const columns = chosen.columns + head * chosen.column_stride;
  CudaDistanceWord* const distances = chosen.distances + head * num_words;
  int taken = 0, listed = 0,
      before = -1;  // equal ranks taken, numbers listed, and the last, of earlier steps
  uint32_t ahead = thread < tokens ? ranks.At(thread) : 0;  // of the next step
  for (int64_t base = 0; base < end; base += kChooseThreads) {
    const int64_t i = base + thread;
    const bool real = i < tokens;
    const uint32_t rank = ahead;
    if (i + kChooseThreads < tokens) ahead = ranks.At(static_cast<int>(i) + kChooseThreads);
    const uint32_t larger = __ballot_sync(kAll, real && rank > least),
                   equal = __ballot_sync(kAll, real && rank == least), below = (1u << lane) - 1;
    if (lane == 0) equals[warp] = __popc(equal);
    __syncthreads();
    const int of_lane = equals[lane];
    const int earlier = taken + SumOverWarp(lane < warp ? of_lane : 0);
    const uint32_t word =
        larger | __ballot_sync(kAll, (equal >> lane & 1) != 0 && earlier + __popc(equal & below) < wanted);
    taken += SumOverWarp(of_lane);
    if (lane == 0) words[warp] = word;
    __syncthreads();
    const uint32_t word_of_lane = words[lane];
    if (kind == 0) {
      const int count = __popc(word_of_lane);
      const int at = listed + SumOverWarp(lane < warp ? count : 0) + __popc(word & below);
      if ((word >> lane & 1) != 0) columns[at] = static_cast<int32_t>(i);
      listed += SumOverWarp(count);
    } else {
      const uint32_t filled = __ballot_sync(kAll, word_of_lane != 0),
                     filled_before = filled & ((1u << warp) - 1);
      const auto last_of = [&](uint32_t warps) {
        const int w = 31 - __clz(warps);
        return static_cast<int>(base) + 32 * w + 31 - __clz(words[w]);
      };
      const int64_t at = base / 32 + warp;
      if (lane == 0 && at < num_words) {
        distances[at] = {word, filled_before != 0 ? last_of(filled_before) : before};
      }
      if (filled != 0) before = last_of(filled);
    }
  }
}

// The steps of 64 keys of one tile's ranges. All is in terms of d = (end of the tile) - key: the step after
// one that ends at `at` (a distance, of which keys after the step have less) starts the largest chosen
// distance below it, or 64 below it, whichever is further.
class StepWalk {
 public:
  __device__ StepWalk(const CudaDistanceWord* words, int tile)
      : words_(words),
        tile_end_((tile + 1) * static_cast<int>(kRangeRows)),
        at_(tile_end_),
        word_(words[at_ >> 5]) {}

  // Whether there is another; its keys are [*begin, *begin + 64).
  __device__ __forceinline__ bool Next(int* begin) {
    if (at_ <= 0) return false;
    const uint32_t lower = word_.bits & ((1u << (at_ & 31)) - 1);
    const int distance = lower != 0 ? (at_ & ~31) + 31 - __clz(lower) : word_.before;
    if (distance < 0) return false;
    const int next = at_ - static_cast<int>(kRangeRows);
    at_ = distance < next ? distance : next;
    if (at_ > 0) word_ = words_[at_ >> 5];
    *begin = tile_end_ - at_ - static_cast<int>(kRangeRows);
    return true;
  }

 private:
  const CudaDistanceWord* words_;
  int tile_end_, at_;
  CudaDistanceWord word_;  // that of at_, read before the step is used
};

// Chosen columns before a tile's first row.
class ColumnWalk {
 public:
  static constexpr int kNone = INT32_MAX;

  __device__ ColumnWalk(const int32_t* columns, int total, int first_row)
      : columns_(columns), left_(total), first_row_(first_row) {
    Take();
    Take();
  }
  __device__ __forceinline__ void Take() {
    column = ahead_ < first_row_ ? ahead_ : kNone;
    ahead_ = kNone;
    if (left_ > 0) {
      --left_;
      ahead_ = *columns_++;
    }
  }

  int column;

 private:
  const int32_t* columns_;
  int left_, first_row_, ahead_ = kNone;
};

// One thread per tile; x: tiles, y: heads. First kFill false: counts; then true: lists, where there is room.
template <bool kFill>
__global__ void __launch_bounds__(kMergeThreads) MergeKernel(const CudaMergeVerticalSlashArgs p, int tiles) {
  const int tile = static_cast<int>(blockIdx.x) * kMergeThreads + static_cast<int>(threadIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  unsigned long long steps = 0;
  if (tile < tiles) {
    const int64_t segment = static_cast<int64_t>(head) * tiles + tile;
    const bool room = !kFill || p.range_counts[segment] >= 0;
    CudaKeyRange* const ranges = kFill ? p.ranges + p.range_offsets[segment] : nullptr;
    int32_t* const columns = kFill ? p.columns + p.column_offsets[segment] : nullptr;
    StepWalk walk(p.chosen.distances + head * (2 * int64_t{tiles} + 1), tile);
    ColumnWalk others(p.chosen.columns + head * p.chosen.column_stride, p.chosen.column_totals[head],
                      tile * static_cast<int>(kRangeRows));
    int num_ranges = 0, num_columns = 0, begin = 0;
    CudaKeyRange range = {0, -1};
    while (room && walk.Next(&begin)) {
      if (begin != range.end) {
        if (kFill && num_ranges > 0) ranges[num_ranges - 1] = range;
        ++num_ranges;
        range.begin = begin;
      }
      range.end = begin + static_cast<int>(kRangeRows);
      ++steps;
      for (; others.column < begin; others.Take()) {
        if (kFill) columns[num_columns] = others.column;
        ++num_columns;
      }
      while (others.column < range.end) others.Take();
    }
    if (kFill && num_ranges > 0) ranges[num_ranges - 1] = range;
    for (; room && others.column != ColumnWalk::kNone; others.Take()) {
      if (kFill) columns[num_columns] = others.column;
      ++num_columns;
    }
    if (!kFill) {
      p.range_counts[segment] = num_ranges;
      p.column_counts[segment] = num_columns;
    }
    steps = room ? steps + (num_columns + kRangeRows - 1) / kRangeRows : tile + 1;
  }
  if constexpr (kFill) {
    for (int lane = 16; lane > 0; lane /= 2) steps += __shfl_xor_sync(kAll, steps, lane);
    if ((threadIdx.x & 31) == 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.visited), steps);
  }
}

// Sums of `mine` over earlier threads, and over all.
__device__ int64_t ScanThreads(int64_t mine, int64_t* of_warps, int64_t* total) {
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x / 32);
  int64_t upto = mine;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(kAll, upto, step);
    if (lane >= step) upto += other;
  }
  __syncthreads();
  if (lane == 31) of_warps[warp] = upto;
  __syncthreads();
  int64_t earlier = 0;
  *total = 0;
  for (int w = 0; w < kScanThreads / 32; ++w) {
    if (w < warp) earlier += of_warps[w];
    *total += of_warps[w];
  }
  return earlier + upto - mine;
}

// One CTA: counts to offsets; tiles that find no room get -1 and no columns.
__global__ void __launch_bounds__(kScanThreads)
    OffsetsKernel(const CudaMergeVerticalSlashArgs p, int64_t segments) {
  __shared__ int64_t of_warps[kScanThreads / 32];
  __shared__ unsigned overflows;
  if (threadIdx.x == 0) overflows = 0;
  int64_t ranges = 0, columns = 0;
  for (int64_t base = 0; base < segments; base += kScanThreads * kScanEach) {
    const int64_t first = base + static_cast<int64_t>(threadIdx.x) * kScanEach;
    int32_t num_ranges[kScanEach], num_columns[kScanEach];
    int64_t range_sum = 0, column_sum = 0, range_total, column_total;
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      num_ranges[i] = first + i < segments ? p.range_counts[first + i] : 0;
      num_columns[i] = first + i < segments ? p.column_counts[first + i] : 0;
      range_sum += num_ranges[i];
      column_sum += num_columns[i];
    }
    int64_t range = ranges + ScanThreads(range_sum, of_warps, &range_total),
            column = columns + ScanThreads(column_sum, of_warps, &column_total);
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      if (first + i >= segments) break;
      const bool room =
          range + num_ranges[i] <= p.range_capacity && column + num_columns[i] <= p.column_capacity;
      p.range_offsets[first + i] = room ? range : 0;
      p.column_offsets[first + i] = room ? column : 0;
      if (!room) {
        p.range_counts[first + i] = -1;
        p.column_counts[first + i] = 0;
        atomicAdd(&overflows, 1u);
      }
      range += num_ranges[i];
      column += num_columns[i];
    }
    ranges += range_total;
    columns += column_total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *p.overflows = overflows;
    *p.visited = 0;
  }
}

}  // namespace

cudaError_t LaunchChoose(const ChooseParams& params, cudaStream_t stream) {
  ChooseKernel<<<dim3(static_cast<unsigned>(params.heads), 2), kChooseThreads, 0, stream>>>(
      params, CudaDistanceWords(params.args.num_tokens));
  return cudaGetLastError();
}

cudaError_t LaunchMergeVerticalSlash(const CudaMergeVerticalSlashArgs& args, cudaStream_t stream) {
  const int64_t tiles = CudaRangeTiles(args.num_tokens);
  const dim3 grid(static_cast<unsigned>((tiles + kMergeThreads - 1) / kMergeThreads),
                  static_cast<unsigned>(args.num_heads));
  MergeKernel<false><<<grid, kMergeThreads, 0, stream>>>(args, static_cast<int>(tiles));
  OffsetsKernel<<<1, kScanThreads, 0, stream>>>(args, tiles * args.num_heads);
  MergeKernel<true><<<grid, kMergeThreads, 0, stream>>>(args, static_cast<int>(tiles));
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
