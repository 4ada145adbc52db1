// A consumer warpgroup of the attention kernel: 64 query rows, scores to outputs. attention_kernel.cuh has
// the whole.
#pragma once

#include <cmath>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/sm90/attention_traits.cuh"
#include "kernels/cuda/sm90/online_softmax.cuh"

namespace headwater::kernels::sm90 {

// A value that is the same in every lane, in a form that lets the compiler know: loop counters and matrix
// descriptors then stay in uniform registers (else each wgmma takes a dozen moves of its own).
__device__ __forceinline__ int Uniform(int value) { return __shfl_sync(~0u, value, 0); }

template <class Traits>
struct Consumer {
  static constexpr int kOut = Traits::kHeadDim / 2;  // output registers of a thread
  static constexpr int kScores = Traits::kKeys / 2;  // and those of its scores
  using Shared = typename Traits::Shared;

  Shared& shared;
  const AttentionParams& p;
  const CUtensorMap* out_map;
  int warpgroup;                                      // 0-based among the consumers
  int thread;                                         // within it
  uint32_t q_descriptor, k_descriptor, v_descriptor;  // low words, of buffer or stage 0
  int tiles = 0, queries = 0, keys = 0;               // uses of each ring so far

  __device__ __forceinline__ void Release(uint64_t* barrier) {
    if (thread == 0) BarrierArrive(SharedAddress(barrier));
  }
  __device__ __forceinline__ void SyncWarpgroup() {
    NamedSync(static_cast<int>(NamedBarrier::kConsumer) + warpgroup, 128);
  }
  __device__ __forceinline__ void TakeTurn() {
    NamedSync(static_cast<int>(NamedBarrier::kTurn) + warpgroup, 256);
  }
  __device__ __forceinline__ void PassTurn() {
    NamedArrive(static_cast<int>(NamedBarrier::kTurn) + (warpgroup + 1) % Traits::kConsumers, 256);
  }

  // Of the Q of the tile begun last.
  __device__ __forceinline__ uint32_t QueryDescriptor() const {
    return Uniform(q_descriptor + (queries - 1 & 1) * (Traits::kQBytes / 16));
  }

  // Issues S = Q K^T for the K in `stage`.
  template <bool kMeans = false>
  __device__ __forceinline__ void IssueScores(float (&s)[kScores], uint32_t q, int stage) {
    constexpr uint32_t kQPanel = Traits::kRows * 128 / 16, kKPanel = (kMeans ? 8 : Traits::kKeys) * 128 / 16,
                       kHigh = kDescriptorHighFor < kMeans ? Traits::kGroupBytes : 1024 > ;
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      Wgmma<Traits::kKeys>::SsKMajor(
          s, q + (k >> 2) * kQPanel + (k & 3) * 2,
          k_descriptor + stage * (Traits::kKvBytes / 16) + (k >> 2) * kKPanel + (k & 3) * 2, k > 0, kHigh);
    }
    WgmmaCommit();
  }

  // Issues O (+)= P V for the V in `stage`. means: that is what it holds.
  __device__ __forceinline__ void IssueValues(float (&o)[kOut], const uint32_t (&weights)[kScores / 2],
                                              int stage, int accumulate, bool means) {
    // Panels of a group are adjacent.
    constexpr uint32_t kLeading = (1024u / 16 << 16) - (Traits::kKeys * 128u / 16 << 16);
    const bool grouped = Traits::kCorrected && means;
    const uint32_t v = v_descriptor + (grouped ? kLeading : 0) + stage * (Traits::kKvBytes / 16),
                   step = grouped ? 2 * Traits::kGroupBytes / 16 : 128,
                   high = grouped ? kDescriptorHighFor<Traits::kGroupBytes> : kDescriptorHigh;
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < Traits::kKeys / 16; ++k) {
      Wgmma<Traits::kHeadDim>::RsMnMajor(o, weights + 4 * k, v + k * step, k > 0 || accumulate, high);
    }
    WgmmaCommit();
  }

  // Only a tile's first block can reach past its sequence. What lies there is another sequence's: P is 0, but
  // 0 * NaN is not. Both consumers write the same zeros.
  __device__ __forceinline__ void ZeroTail(const TileInfo& info, int stage) {
    const int rows = info.kv_len - info.masked_block[0] * Traits::kKeys;
    if (p.num_sequences == 1 || Uniform(rows >= Traits::kKeys)) return;
    for (int i = thread; i < (Traits::kKeys - rows) * Traits::kPanels * 8; i += 128) {
      const int row = rows + i / (Traits::kPanels * 8), chunk = i % (Traits::kPanels * 8);
      *reinterpret_cast<uint4*>(shared.v[stage] + (chunk >> 3) * Traits::kKeys * 128 + row * 128 +
                                (chunk & 7) * 16) = make_uint4(0, 0, 0, 0);
    }
    FenceAsync();
    SyncWarpgroup();
  }

  __device__ __forceinline__ int Row() const {
    return warpgroup * 64 + (thread >> 5) * 16 + ((thread & 31) >> 2);
  }

  __device__ __forceinline__ RowLimits Limits(const TileInfo& info) const {
    const int last = info.kv_len - 1, base = info.position + info.key_of_row;
    return {{min(last, base + Row() / p.pack), min(last, base + (Row() + 8) / p.pack)},
            min(last, base + warpgroup * 64 / p.pack)};
  }

  // Writes one tile's rows: divides by the sum, stores O and the log-sum-exp.
  __device__ __forceinline__ void Finish(const TileInfo& info, float (&o)[kOut], RowState state) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state.sum[r] += __shfl_xor_sync(~0u, state.sum[r], 1);
      state.sum[r] += __shfl_xor_sync(~0u, state.sum[r], 2);
      const float inverse = state.sum[r] == 0 ? 0.0f : 1.0f / state.sum[r];
#pragma unroll
      for (int j = 0; j < kOut / 4; ++j) {
        o[4 * j + 2 * r] *= inverse;
        o[4 * j + 2 * r + 1] *= inverse;
      }
    }
    const bool whole = info.position + p.tile_positions <= info.q_len;
    if constexpr (Traits::kOutBytes > 0) {
      if (p.store_by_map && whole) {
        StoreByMap(info, o);
        StoreLse(info, state);
        return;
      }
    }
    StoreRows(info, o);
    StoreLse(info, state);
  }

  __device__ __forceinline__ void StoreByMap(const TileInfo& info, float (&o)[kOut]) {
    constexpr uint32_t kBytes = 64 * Traits::kHeadDim * 2;
    const uint32_t base = SharedAddress(shared.out) + warpgroup * kBytes;
    if (thread == 0) BulkWaitRead<0>();
    SyncWarpgroup();
    const int row = (thread >> 5) * 16 + (thread & 15);
#pragma unroll
    for (int j = 0; j < Traits::kHeadDim / 8; j += 2) {
      const int chunk = j + (thread >> 4 & 1);
      StoreMatrix4(base + (chunk >> 3) * 8192 + row * 128 + (((chunk & 7) ^ (row & 7)) << 4),
                   PackBf16(o[4 * j], o[4 * j + 1]), PackBf16(o[4 * j + 2], o[4 * j + 3]),
                   PackBf16(o[4 * j + 4], o[4 * j + 5]), PackBf16(o[4 * j + 6], o[4 * j + 7]));
    }
    FenceAsync();
    SyncWarpgroup();
    if (thread == 0) {
      const int position = info.q_begin + info.position + warpgroup * 64 / p.pack;
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel) {
        StoreTensor5(out_map, base + panel * 8192, 0, 0, position, panel, info.head);
      }
      BulkCommit();
    }
  }

  // Any pack, f32, and tiles that cross the sequence's end.
  __device__ __forceinline__ void StoreRows(const TileInfo& info, const float (&o)[kOut]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = GlobalRow(info, r);
      if (row < 0) continue;
      const int64_t at = row * Traits::kHeadDim + 2 * (thread & 3);
#pragma unroll
      for (int j = 0; j < Traits::kHeadDim / 8; ++j) {
        const float low = o[4 * j + 2 * r], high = o[4 * j + 2 * r + 1];
        if (p.out_f32 != nullptr) *reinterpret_cast<float2*>(p.out_f32 + at + 8 * j) = make_float2(low, high);
        if (p.out != nullptr) {
          *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p.out) + at + 8 * j) = PackBf16(low, high);
        }
      }
    }
  }

  // (token * query heads + head) of this thread's row r; -1: no such row.
  __device__ __forceinline__ int64_t GlobalRow(const TileInfo& info, int r) const {
    const int row = Row() + 8 * r, position = info.position + row / p.pack;
    if (row >= p.tile_positions * p.pack || position >= info.q_len) return -1;
    return static_cast<int64_t>(info.q_begin + position) * p.num_q_heads + info.head * p.pack + row % p.pack;
  }

  __device__ __forceinline__ void StoreLse(const TileInfo& info, const RowState& state) {
    if (p.lse_ln == nullptr || (thread & 3) != 0) return;
    constexpr float kLn2 = 0.693147180559945f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = GlobalRow(info, r);
      if (row < 0) continue;
      // A sum of 0: the row saw no key. NaN passes through.
      p.lse_ln[row] = state.sum[r] == 0 ? -INFINITY : state.shift[r] * kLn2 + logf(state.sum[r]);
    }
  }

  // The slot of the next tile that has keys; those without are written and passed over. kNoMoreTiles at the
  // end.
  __device__ __forceinline__ int NextTile() {
    for (;;) {
      const int slot = tiles % Traits::kTileSlots;
      BarrierWait(SharedAddress(&shared.tile_full[slot]), tiles / Traits::kTileSlots & 1);
      ++tiles;
      const int steps = Uniform(shared.tiles[slot].num_blocks);
      if (steps == kNoMoreTiles) return kNoMoreTiles;
      if (steps > 0) return slot;
      float zero[kOut];
#pragma unroll
      for (int i = 0; i < kOut; ++i) zero[i] = 0;
      RowState none;
      none.Reset();
      StoreRows(shared.tiles[slot], zero);
      StoreLse(shared.tiles[slot], none);
      SyncWarpgroup();
      Release(&shared.tile_empty[slot]);
    }
  }

  // What a thread carries through the stream of steps.
  struct Registers {
    float s[kScores];               // scores
    uint32_t weights[kScores / 2];  // in bf16, of the step whose values come next
    float o[kOut];
    RowState state;
    RowLimits limits;  // of the tile in `slot`
    int slot;
    uint32_t q;       // descriptor of its Q
    bool means;       // what the weights are of
    bool key_landed;  // K of the next step has; asked early, since the answer takes its time
  };

  // Whether K of the step to come has landed.
  __device__ __forceinline__ bool KeyLanded() const {
    return BarrierTestWait(SharedAddress(&shared.k_full[keys % Traits::kStages]), keys / Traits::kStages & 1);
  }

  __device__ __forceinline__ void MaskStep(Registers& t, int step) {
    const int key = shared.tiles[t.slot].masked_block[step] * Traits::kKeys;
    if (Uniform(key + Traits::kKeys - 1 > t.limits.first_row)) Mask(t.s, key, t.limits);
  }

  // Scores of means: each counts for the tokens it stands for, or not at all.
  __device__ __forceinline__ void WeighMeans(float (&s)[kScores], const MeanGroup* groups) const {
    const int column = 2 * (thread & 3);
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      const MeanGroup group = groups[j];
      const float gain = group.coarse ? p.superblock_gain : p.block_gain;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool live = group.live >> (column + e) & 1;
        s[4 * j + e] = live ? s[4 * j + e] + gain : -INFINITY;
        s[4 * j + 2 + e] = live ? s[4 * j + 2 + e] + gain : -INFINITY;
      }
    }
  }

  // The stream's first scores have nothing to hide behind.
  __device__ __forceinline__ void FirstScores(Registers& t) {
    BarrierWait(SharedAddress(&shared.q_full[0]), 0);
    BarrierWait(SharedAddress(&shared.k_full[0]), 0);
    queries = 1;
    t.q = QueryDescriptor();
    IssueScores(t.s, t.q, 0);
    WgmmaWait<0>();
    Release(&shared.k_empty[0]);
    keys = 1;
    MaskStep(t, 0);
    t.state.Reset();
    float factor[2];
    MoveShift(t.s, p.scale_log2, &t.state, factor);
    Weigh(t.s, p.scale_log2, &t.state, t.weights);
  }

  // Scores of the next step and values of this one. kBoundary: the scores begin the tile in `next_slot`, the
  // values end the one in t.slot, which is then written. `step`: of the scores; `accumulate`: the values are
  // not their tile's first.
  // kMeans: the scores are those of means.
  template <bool kBoundary, bool kMasked, bool kMeans = false>
  __device__ __forceinline__ void Step(Registers& t, int step, int accumulate, int next_slot) {
    const int values = keys - 1;  // V runs one behind K
    const int k_stage = keys % Traits::kStages, v_stage = values % Traits::kStages;
    const uint32_t q = Uniform(t.q);
    if (!t.key_landed) BarrierWait(SharedAddress(&shared.k_full[k_stage]), keys / Traits::kStages & 1);
    TakeTurn();
    IssueScores<kMeans>(t.s, q, k_stage);
    BarrierWait(SharedAddress(&shared.v_full[v_stage]), values / Traits::kStages & 1);
    if (!accumulate) ZeroTail(shared.tiles[t.slot], v_stage);
    IssueValues(t.o, t.weights, v_stage, accumulate, t.means);
    ++keys;
    const RowState finished = t.state;
    const int finished_slot = t.slot;
    if constexpr (kBoundary) {
      t.state.Reset();
      t.slot = next_slot;
      t.limits = Limits(shared.tiles[next_slot]);
    }
    WgmmaWait<1>();
    if constexpr (!kMeans) Release(&shared.k_empty[k_stage]);
    PassTurn();
    if constexpr (kMasked) MaskStep(t, step);
    if constexpr (kMeans) {
      WeighMeans(t.s, shared.groups[k_stage]);
      SyncWarpgroup();  // everyone has read the groups
      Release(&shared.k_empty[k_stage]);
    }
    float factor[2];
    const bool moved = MoveShift(t.s, p.scale_log2, &t.state, factor);
    t.key_landed = KeyLanded();
    WgmmaWait<0>();
    Release(&shared.v_empty[v_stage]);
    if constexpr (kBoundary) {
      Finish(shared.tiles[finished_slot], t.o, finished);
      SyncWarpgroup();
      Release(&shared.tile_empty[finished_slot]);
    } else if (moved) {
#pragma unroll
      for (int i = 0; i < kOut; ++i) t.o[i] *= factor[i >> 1 & 1];
    }
    Weigh(t.s, p.scale_log2, &t.state, t.weights);
    t.means = kMeans;
  }

  __device__ __forceinline__ void Run() {
    Registers t;
    t.key_landed = t.means = false;
    t.slot = NextTile();
    if (t.slot == kNoMoreTiles) return;
    t.limits = Limits(shared.tiles[t.slot]);
    FirstScores(t);
    for (;;) {
      const int steps = Uniform(shared.tiles[t.slot].num_blocks);
      const int masked = min(steps, TileInfo::kMaskedBlocks);
      int step = 1;
      for (; step < masked; ++step) Step<false, true>(t, step, step > 1, 0);
      for (; step < steps; ++step) Step<false, false>(t, step, 1, 0);
      if constexpr (Traits::kCorrected) {
        const int end = step + Uniform(shared.tiles[t.slot].corrections);
        for (; step < end; ++step) Step<false, false, true>(t, step, step > 1, 0);
      }
      Release(&shared.q_empty[(queries - 1) & 1]);
      const int next_slot = NextTile();
      if (next_slot == kNoMoreTiles) {
        LastValues(t, step > 1);
        return;
      }
      BarrierWait(SharedAddress(&shared.q_full[queries & 1]), queries >> 1 & 1);
      ++queries;
      t.q = QueryDescriptor();
      Step<true, true>(t, 0, step > 1, next_slot);
    }
  }

  __device__ __forceinline__ void LastValues(Registers& t, int accumulate) {
    const int values = keys - 1, v_stage = values % Traits::kStages;
    BarrierWait(SharedAddress(&shared.v_full[v_stage]), values / Traits::kStages & 1);
    if (!accumulate) ZeroTail(shared.tiles[t.slot], v_stage);
    IssueValues(t.o, t.weights, v_stage, accumulate, t.means);
    WgmmaWait<0>();
    Finish(shared.tiles[t.slot], t.o, t.state);
  }
};

}  // namespace headwater::kernels::sm90
