#include "kernels/cuda/sm90/block_stats_launch.h"
#include "kernels/cuda/sm90/block_stats_tile.cuh"

namespace headwater::kernels::sm90 {
namespace {

constexpr int kTableThreads = 128;

// One CTA per block and head of K or V, heads fastest: CTAs in flight read neighbouring rows.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) BlockStatsKernel(const BlockStatsParams p) {
  __shared__ typename Tile::Shared shared;
  const int units = p.k_heads + p.v_heads, unit = static_cast<int>(blockIdx.x % units);
  const bool is_v = unit >= p.k_heads;
  const int head = is_v ? unit - p.k_heads : unit;
  const int64_t block = p.args.first_token / kStatsBlockTokens + blockIdx.x / units;
  const int64_t begin = block * kStatsBlockTokens;
  const int tokens = static_cast<int>(p.args.total_k - begin < kStatsBlockTokens ? p.args.total_k - begin
                                                                                 : kStatsBlockTokens);
  const auto* const base = static_cast<const __nv_bfloat16*>(is_v ? p.args.v : p.args.k);

  RowPart parts[Tile::kSteps] = {};
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    if (Tile::Row(step) >= tokens) continue;
    const __nv_bfloat16* const row =
        base + ((begin + Tile::Row(step)) * p.args.num_kv_heads + head) * Tile::kHeadDim + Tile::Lane() * 8;
    parts[step].low = __ldcs(reinterpret_cast<const uint4*>(row));
    parts[step].high = __ldcs(reinterpret_cast<const uint4*>(row + Tile::kHeadDim / 2));
  }
  const BlockStatsOutputs out =
      OutputsOf(p.args.stats, is_v, block, head, p.args.num_kv_heads, Tile::kHeadDim);
  BlockAccumulator<Tile> accumulator;
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    accumulator.Add(parts[step], Tile::Row(step) < tokens, out.least != nullptr);
  }
  accumulator.Finish(shared, tokens, out);
}

// Thread: 8 columns of one superblock of one head. It reads 8 fine means and writes 8 fine rows and the
// coarse one; superblocks past the end are the padding of the coarse rows.
__global__ void __launch_bounds__(kTableThreads)
    MeanTableKernel(const CudaMeanTablesArgs p, int64_t fine_rows, int64_t rows) {
  const int pieces = p.head_dim / 8;
  const int64_t superblocks = fine_rows / kBlocksPerSuperblock, coarse_rows = rows - fine_rows;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kTableThreads + threadIdx.x;
  const int64_t superblock = thread / pieces / p.num_kv_heads;
  if (superblock >= coarse_rows) return;
  const int head = static_cast<int>(thread / pieces % p.num_kv_heads);
  const int column = static_cast<int>(thread % pieces) * 8;
  const float* const mean = blockIdx.y == 0 ? p.k_mean : p.v_mean;
  auto* const table = static_cast<__nv_bfloat16*>(blockIdx.y == 0 ? p.k_table : p.v_table);
  if (table == nullptr) return;
  __nv_bfloat16* const out = table + head * rows * p.head_dim + column;

  float total[8] = {};
  float tokens = 0;
  if (superblock < superblocks) {
#pragma unroll
    for (int i = 0; i < kBlocksPerSuperblock; ++i) {
      const int64_t block = superblock * kBlocksPerSuperblock + i, begin = block * kStatsBlockTokens;
      float x[8] = {};
      if (begin < p.total_k) {
        Load8(mean, (block * p.num_kv_heads + head) * p.head_dim + column, x);
        const auto weight =
            static_cast<float>(p.total_k - begin < kStatsBlockTokens ? p.total_k - begin : kStatsBlockTokens);
        tokens += weight;
#pragma unroll
        for (int j = 0; j < 8; ++j) total[j] = __fmaf_rn(x[j], weight, total[j]);
      }
      Store8(out, block * p.head_dim, x);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) total[j] = __fdiv_rn(total[j], tokens);
  }
  Store8(out, (fine_rows + superblock) * p.head_dim, total);
}

}  // namespace

cudaError_t LaunchBlockStats(const BlockStatsParams& p, int64_t ctas, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(ctas);
  if (p.args.head_dim == 128) {
    BlockStatsKernel<BlockTile<128>><<<grid, BlockTile<128>::kThreads, 0, stream>>>(p);
  } else {
    BlockStatsKernel<BlockTile<64>><<<grid, BlockTile<64>::kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t LaunchMeanTables(const CudaMeanTablesArgs& p, cudaStream_t stream) {
  const int64_t fine_rows = CudaMeanTableCoarseRow(p.total_k), rows = CudaMeanTableRows(p.total_k);
  const int64_t threads = (rows - fine_rows) * p.num_kv_heads * (p.head_dim / 8);
  const auto grid = static_cast<unsigned>((threads + kTableThreads - 1) / kTableThreads);
  MeanTableKernel<<<dim3(grid, p.v_table != nullptr ? 2 : 1), kTableThreads, 0, stream>>>(p, fine_rows, rows);
  return cudaGetLastError();
}

}  // namespace headwater::kernels::sm90
