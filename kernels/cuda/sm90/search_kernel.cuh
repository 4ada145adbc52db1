// Pattern search: which key blocks each query tile attends to, from one mean query per tile and head (the
// probe) and one mean key per block. sm_90a.
//
// For tile t, head h of its group and block J that is visible to the whole tile, let y = scale * probe_h .
// kbar_J, lse_h = log sum_J exp(y) and M = max over h, J of (y - lse_h). J is listed if y - lse_h >=
// log(alpha) + M for some head h: a block that is worth alpha of the best one, each head measured by its own
// softmax. The first `sink` blocks and the last `window` ones are always listed. (FlashPrefill's threshold
// rule, arXiv:2603.06199, with probes in place of all rows and normalised per head: Prism, arXiv:2602.08426,
// scores means against means.)
//
// Two passes and no quadratic buffer: the first finds each row's maximum and sum, the second computes the
// scores again and sets a bit per listed block. A forced density takes four passes: search_density.cuh.
//
// Grid: one CTA per KV head and up to kSearchRows probes (128 / row_pack tiles), long ones first. Warpgroup 0
// copies the means, 128 blocks a stage, once a pass; two warpgroups take 64 probes each: S = probes * kbar^T
// in registers, the next 128 blocks' under this one's statistics. At the end a warp per tile draws room from
// a global cursor and writes the list, ascending. A list that finds no room becomes a dense tile, counted.
//
// Per pass and step: 2 * 128 * 128 * head_dim FLOP, 256 * head_dim bytes from L2.
#pragma once

#include "kernels/cuda/sm90/search_consumer.cuh"
#include "kernels/cuda/sm90/search_density.cuh"

namespace headwater::kernels::sm90 {

// kForcedRows: 0, blocks are listed by threshold; else by forced density, and it is row_pack.
template <class Traits, int kForcedRows>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    SearchKernel(const __grid_constant__ CUtensorMap probe_map, const __grid_constant__ CUtensorMap mean_map,
                 const __grid_constant__ SearchParams p) {
  extern __shared__ __align__(1024) uint8_t storage[];
  constexpr int kPasses = kForcedRows == 0 ? 2 : DensitySearch<Traits, kForcedRows>::kPasses;
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(storage);
  const int groups = (p.end_tile - p.begin_tile + p.tiles_per_cta - 1) / p.tiles_per_cta;
  const int head = HeadOfCta(p);
  const int first_tile =
      p.begin_tile + (groups - 1 - static_cast<int>(blockIdx.x) / p.num_heads) * p.tiles_per_cta;
  const int tiles = min(p.tiles_per_cta, p.end_tile - first_tile);
  const int complete = BlocksOfTile(p, first_tile + tiles - 1).complete;
  const bool searched = kForcedRows != 0 || fabsf(p.thresholds_log2[head]) < INFINITY;
  const int steps = first_tile >= p.first_dense_tile || !searched ? 0 : (complete + 127) / 128;
  for (int i = threadIdx.x; i < tiles * p.tile_words; i += Traits::kThreads) shared.bitmap[i] = 0;
  if (threadIdx.x == 0) {
    BarrierInit(SharedAddress(&shared.probes_full), 1);
    for (int i = 0; i < Traits::kStages; ++i) {
      BarrierInit(SharedAddress(&shared.means_full[i]), 1);
      BarrierInit(SharedAddress(&shared.means_empty[i]), 2);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    RegistersDecrease<24>();
    if (threadIdx.x == 0 && steps > 0) {
      const uint64_t policy = PolicyEvictLast();
      const uint32_t full = SharedAddress(&shared.probes_full);
      BarrierExpect(full, Traits::kTileBytes);
      LoadTensor5(SharedAddress(shared.probes), &probe_map, full, 0, 0, first_tile - p.begin_tile, 0, head,
                  PolicyEvictFirst());
      for (int use = 0, step = 0; use < kPasses * steps; ++use, step = step + 1 < steps ? step + 1 : 0) {
        const int stage = use % Traits::kStages;
        if (use >= Traits::kStages) {
          BarrierWait(SharedAddress(&shared.means_empty[stage]), (use / Traits::kStages & 1) ^ 1);
        }
        const uint32_t means_full = SharedAddress(&shared.means_full[stage]);
        BarrierExpect(means_full, Traits::kTileBytes);
        LoadTensor4(SharedAddress(shared.means[stage]), &mean_map, means_full, 0, (steps - 1 - step) * 128, 0,
                    head, policy);
      }
    }
  } else {
    RegistersIncrease<240>();
    const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 7), 0) - 1;
    SearchConsumer<Traits> consumer{shared,
                                    p,
                                    first_tile,
                                    tiles,
                                    warpgroup,
                                    static_cast<int>(threadIdx.x & 127),
                                    DescriptorLow(SharedAddress(shared.probes) + warpgroup * 8192, 16),
                                    DescriptorLow(SharedAddress(shared.means[0]), 16)};
    consumer.Prepare();
    if (steps > 0) BarrierWait(SharedAddress(&shared.probes_full), 0);
    consumer.Pass(steps, [&](float(&s)[64], int first_block) { consumer.Gather(s, first_block); });
    consumer.StoreRows();
    NamedSync(1, 256);
    if constexpr (kForcedRows == 0) {
      const float log2 = p.thresholds_log2[head];
      const float threshold[2] = {consumer.Threshold(0, log2), consumer.Threshold(1, log2)};
      consumer.Pass(steps, [&](float(&s)[64], int first_block) { consumer.Mark(s, first_block, threshold); });
      NamedSync(1, 256);
      for (int local = warpgroup * 4 + (consumer.thread >> 5); local < tiles; local += 8) {
        consumer.WriteList(local, head, p.thresholds_log2[head] == -INFINITY);
      }
    } else {
      DensitySearch<Traits, kForcedRows>{consumer}.Write(steps, head);
    }
  }
}

}  // namespace headwater::kernels::sm90
