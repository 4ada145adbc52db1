// Attention of query tiles over key blocks (dense causal, or by block lists), sm_90a.
//
// Online softmax in base 2 (Milakov and Gimelshein, arXiv:1805.02867) with the warp specialisation and the
// overlap of FlashAttention-3 (Shah et al., arXiv:2407.08608), and one thing more: the steps of successive
// tiles form one stream. The first scores of tile t + 1 are computed while the last values of tile t are
// accumulated, so a tile of ten blocks (sparse attention's usual size) has no bubble of its own.
//
// Grid: one CTA per SM; tiles are drawn from a counter. In warpgroup 0 one thread schedules tiles and one
// issues all copies; the other warpgroups consume, 64 query rows each. Per step and consumer: S = Q K^T
// (registers), P = 2^(S - max) rounded to bf16 in registers, O += P V. K runs one step ahead of V. Copies: K0
// | K1 V0 | K2 V1 | ... across tiles.
//
// Barriers: *_full one arrival by the producer plus the copy's bytes; *_empty one arrival per consumer
// warpgroup, by one thread after its own wgmma wait. Tile slots likewise. kTurn + w lets the consumers issue
// in turn, so that one's softmax runs under the other's matrix products; the turn passes once this step's
// scores have arrived (passing it right after issuing lets both run in step: 612 against 660 TFLOP/s, dense,
// 128K tokens, H100). Every consumer runs the same number of steps.
//
// Per step of 128 keys: 4 * 128 * rows * head_dim FLOP, 512 * head_dim bytes from L2.
#pragma once

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/sm90/attention_consumer.cuh"
#include "kernels/cuda/sm90/attention_tiles.cuh"
#include "kernels/cuda/sm90/attention_traits.cuh"

namespace headwater::kernels::sm90 {

// --- producer ---

template <class Traits>
struct Producer {
  using Shared = typename Traits::Shared;
  Shared& shared;
  const AttentionParams& p;
  const CUtensorMap* q_map;
  const CUtensorMap* k_map;
  const CUtensorMap* v_map;
  const CUtensorMap *k_mean_map, *v_mean_map, *k_mean_step_map, *v_mean_step_map;
  uint64_t q_policy, kv_policy;
  int queries = 0, keys = 0, values = 0;    // uses of each ring so far
  int value_token = 0, value_panel = 0;     // V that follows the next K
  const MeanGroup* value_groups = nullptr;  // or the means that do,
  bool value_groups_adjoin = false;         // which lie one after the other in the table
  int filled = 0;                           // groups of the step over means in the making

  __device__ __forceinline__ void LoadKey(int token, int panel) {
    const int stage = keys % Traits::kStages;
    if (keys >= Traits::kStages) {
      BarrierWait(SharedAddress(&shared.k_empty[stage]), (keys / Traits::kStages & 1) ^ 1);
    }
    const uint32_t full = SharedAddress(&shared.k_full[stage]);
    BarrierExpect(full, Traits::kKvBytes);
    LoadTensor3(SharedAddress(shared.k[stage]), k_map, full, 0, token, panel, kv_policy);
    ++keys;
  }

  // The V of the key block before the last one.
  __device__ __forceinline__ void LoadValue() {
    const int stage = values % Traits::kStages;
    if (values >= Traits::kStages) {
      BarrierWait(SharedAddress(&shared.v_empty[stage]), (values / Traits::kStages & 1) ^ 1);
    }
    const uint32_t full = SharedAddress(&shared.v_full[stage]);
    BarrierExpect(full, Traits::kKvBytes);
    if (Traits::kCorrected && value_groups != nullptr) {
      LoadMeanValues(stage, full);
    } else {
      LoadTensor3(SharedAddress(shared.v[stage]), v_map, full, 0, value_token, value_panel, kv_policy);
    }
    ++values;
  }

  __device__ __forceinline__ void LoadMeans(const uint8_t* to, const CUtensorMap* map, uint32_t full,
                                            int group, int kv_panel) {
    LoadTensor5(SharedAddress(to), map, full, 0, 0, 0, group, kv_panel / Traits::kPanels, kv_policy);
  }

  __device__ __forceinline__ void LoadMeanValues(int stage, uint32_t full) {
    if (value_groups_adjoin) {
      LoadMeans(shared.v[stage], v_mean_step_map, full, value_groups[0].group, value_panel);
      return;
    }
    for (int i = 0; i < Traits::kGroups; ++i) {
      LoadMeans(shared.v[stage] + i * Traits::kGroupBytes, v_mean_map, full, value_groups[i].group,
                value_panel);
    }
  }

  __device__ __forceinline__ void AwaitKeyStage(int stage) {
    if (keys >= Traits::kStages) {
      BarrierWait(SharedAddress(&shared.k_empty[stage]), (keys / Traits::kStages & 1) ^ 1);
    }
  }

  // After a step over means has been written and its K asked for.
  __device__ __forceinline__ void EndMeanStep(int kv_panel, uint32_t bytes, bool adjoin) {
    MeanGroup* const groups = shared.groups[keys % Traits::kStages];
    BarrierExpect(SharedAddress(&shared.k_full[keys % Traits::kStages]), bytes);
    ++keys;
    LoadValue();
    value_groups = groups;
    value_groups_adjoin = adjoin;
    value_panel = kv_panel;
  }

  // One group more of the step over means in the making.
  __device__ __forceinline__ void AddGroup(int kv_panel, MeanGroup group) {
    const int stage = keys % Traits::kStages;
    if (filled == 0) AwaitKeyStage(stage);
    shared.groups[keys % Traits::kStages][filled] = group;
    LoadMeans(shared.k[stage] + filled * Traits::kGroupBytes, k_mean_map,
              SharedAddress(&shared.k_full[stage]), group.group, kv_panel);
    if (++filled == Traits::kGroups) FlushGroups(kv_panel);
  }

  // Groups that are missing count for nothing; their K may be anything, but their V must be numbers.
  __device__ __forceinline__ void FlushGroups(int kv_panel) {
    const int count = filled;
    if (count == 0) return;
    MeanGroup* const groups = shared.groups[keys % Traits::kStages];
    for (int i = count; i < Traits::kGroups; ++i) groups[i] = {0, 0, 0};
    filled = 0;
    EndMeanStep(kv_panel, count * Traits::kGroupBytes, false);
  }

  // The blocks of one superblock that are not listed, as far as every row sees them.
  __device__ __forceinline__ void AddBlocks(const TileInfo& info, int superblock, uint32_t live) {
    const int visible = info.complete - superblock * kSuperblock;
    if (visible < kSuperblock) {
      live &= (1u << visible) - 1;
    } else {
      shared.expanded[superblock >> 3] |= 1u << (superblock & 7);
    }
    AddGroup(info.kv_panel, {live, 0, static_cast<uint32_t>(superblock)});
  }

  // Eight superblocks from 8 * at on, as far as nothing of them is listed.
  __device__ __forceinline__ MeanGroup Superblocks(const TileInfo& info, int at) {
    const int whole = info.complete / kSuperblock - 8 * at;
    const uint32_t seen = whole < 8 ? (1u << whole) - 1 : 0xFF;
    const uint32_t live = seen & ~static_cast<uint32_t>(shared.expanded[at]);
    shared.expanded[at] = 0;
    return {live, 1, static_cast<uint32_t>(p.coarse_group + at)};
  }

  // The steps over means of a tile, as CountMeanSteps() counts them.
  __device__ __forceinline__ void Correct(const TileInfo& info) {
    const int superblocks = info.complete / kSuperblock, count = info.num_blocks;
    int last = -1;
    uint32_t live = 0;
    for (int i = 0; i < count; ++i) {
      const int block = __ldg(info.blocks + i);
      if (static_cast<uint32_t>(block) >= static_cast<uint32_t>(info.complete)) break;
      if (block / kSuperblock != last) {
        if (last >= 0) AddBlocks(info, last, live);
        last = block / kSuperblock;
        live = 0xFF;
      }
      live &= ~(1u << block % kSuperblock);
    }
    if (last >= 0) AddBlocks(info, last, live);
    if (info.complete % kSuperblock != 0 && last != superblocks) AddBlocks(info, superblocks, 0xFF);
    const int coarse = (superblocks + 7) / 8, adjoining = coarse / Traits::kGroups * Traits::kGroups;
    for (int at = adjoining; at < coarse; ++at) AddGroup(info.kv_panel, Superblocks(info, at));
    FlushGroups(info.kv_panel);
    for (int at = 0; at < adjoining; at += Traits::kGroups) {
      const int stage = keys % Traits::kStages;
      AwaitKeyStage(stage);
      LoadMeans(shared.k[stage], k_mean_step_map, SharedAddress(&shared.k_full[stage]), p.coarse_group + at,
                info.kv_panel);
      for (int i = 0; i < Traits::kGroups; ++i) {
        shared.groups[keys % Traits::kStages][i] = Superblocks(info, at + i);
      }
      EndMeanStep(info.kv_panel, Traits::kKvBytes, true);
    }
  }

  __device__ __forceinline__ void LoadQuery(const TileInfo& info) {
    const int buffer = queries & 1;
    if (queries >= 2) BarrierWait(SharedAddress(&shared.q_empty[buffer]), (queries >> 1 & 1) ^ 1);
    const uint32_t full = SharedAddress(&shared.q_full[buffer]);
    BarrierExpect(full, p.tile_positions * p.pack * Traits::kHeadDim * 2);
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      LoadTensor5(SharedAddress(shared.q[buffer]) + panel * Traits::kRows * 128, q_map, full, 0, 0,
                  info.q_begin + info.position, panel, info.head, q_policy);
    }
    ++queries;
  }

  __device__ __forceinline__ void Run() {
    for (int n = 0;; ++n) {
      const int slot = n % Traits::kTileSlots;
      BarrierWait(SharedAddress(&shared.tile_full[slot]), n / Traits::kTileSlots & 1);
      const TileInfo& info = shared.tiles[slot];
      const int steps = info.num_blocks;
      if (steps == kNoMoreTiles) break;
      if (steps > 0) {
        LoadQuery(info);
        const int begin = info.k_begin, panel = info.kv_panel;
        int block = info.masked_block[0];
        for (int step = 0; step < steps; ++step) {
          const int next =
              step + 1 < steps ? info.Block(step + 1) : 0;  // in flight while stages are waited for
          const int token = begin + block * Traits::kKeys;
          LoadKey(token, panel);
          if (keys > 1) LoadValue();
          value_token = token;
          value_panel = panel;
          value_groups = nullptr;
          block = next;
        }
        if constexpr (Traits::kCorrected) {
          if (info.corrections > 0) Correct(info);
        }
      }
      BarrierArrive(SharedAddress(&shared.tile_empty[slot]));
    }
    if (keys > 0) LoadValue();
  }
};

// --- shell ---

template <class Traits>
__device__ __forceinline__ void InitBarriers(typename Traits::Shared& shared) {
  for (int i = 0; i < 2; ++i) {
    BarrierInit(SharedAddress(&shared.q_full[i]), 1);
    BarrierInit(SharedAddress(&shared.q_empty[i]), Traits::kConsumers);
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    BarrierInit(SharedAddress(&shared.k_full[i]), 1);
    BarrierInit(SharedAddress(&shared.k_empty[i]), Traits::kConsumers);
    BarrierInit(SharedAddress(&shared.v_full[i]), 1);
    BarrierInit(SharedAddress(&shared.v_empty[i]), Traits::kConsumers);
  }
  for (int i = 0; i < Traits::kTileSlots; ++i) {
    BarrierInit(SharedAddress(&shared.tile_full[i]), 1);
    BarrierInit(SharedAddress(&shared.tile_empty[i]), Traits::kConsumers + 1);
  }
  FenceBarrierInit();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    AttentionKernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map,
                    const __grid_constant__ CUtensorMap k_mean_map,
                    const __grid_constant__ CUtensorMap v_mean_map,
                    const __grid_constant__ CUtensorMap k_mean_step_map,
                    const __grid_constant__ CUtensorMap v_mean_step_map,
                    const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(storage);
  if (threadIdx.x == 0) {
    InitBarriers<Traits>(shared);
    PrefetchTensorMap(&q_map);
    PrefetchTensorMap(&k_map);
    PrefetchTensorMap(&v_map);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    RegistersDecrease<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) {
      if constexpr (Traits::kCorrected) {
        for (int i = 0; i < kMaxSuperblockBytes; ++i) shared.expanded[i] = 0;
      }
      Producer<Traits> producer{
          shared,           params,      &q_map,           &k_map,           &v_map,
          &k_mean_map,      &v_mean_map, &k_mean_step_map, &v_mean_step_map, PolicyEvictFirst(),
          PolicyEvictLast()};
      producer.Run();
    } else if (threadIdx.x == 32) {
      Schedule<Traits>(shared, params);
    }
  } else {
    RegistersIncrease<Traits::kConsumerRegisters>();
    const int warpgroup = Uniform(static_cast<int>(threadIdx.x >> 7)) - 1;
    Consumer<Traits> consumer{shared,
                              params,
                              &out_map,
                              warpgroup,
                              static_cast<int>(threadIdx.x & 127),
                              DescriptorLow(SharedAddress(shared.q[0]) + warpgroup * 8192, 16),
                              DescriptorLow(SharedAddress(shared.k[0]), 16),
                              DescriptorLow(SharedAddress(shared.v[0]), Traits::kKeys * 128)};
    // The first turn is consumer 0's.
    if (warpgroup == Traits::kConsumers - 1) consumer.PassTurn();
    consumer.Run();
    if (consumer.thread == 0) BulkWait<0>();
  }
}

}  // namespace headwater::kernels::sm90
