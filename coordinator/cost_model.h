// Predicts how long a prompt takes over a group of workers, from the rates that they state. Pure.
//
// Of the rank that has most to do; n of the prompt's N tokens are its own, R ranks, L layers, H hidden size,
// I intermediate size, Q and K the widths of all query and of all key heads:
//
//   linear     2 n (L H (Q + 2 K) + (L - 1) H (Q + 3 I)) FLOP: QKV projection, output projection and MLP
//              (worker/quality.cc, WorkOf()); of the last layer the last token's alone count
//              after attention, and that is left out
//   attention  (L - 1) 4 Q FLOP for each pair of a query and a key it may see, times the density. Pairs: all,
//              N (N + 1) / 2, on one rank; n / N of them where the prompt is dealt out zigzag or striped;
//              those of the last n tokens where each rank has one run. GPU, density below 1: and what probe's
//              search takes, 0.0016 of dense attention's time (one H200, 1,048,576 tokens: 0.7 s of 5.2)
//   exchange   L (N - n) tokens' K and V, and a latency a step.
//              CPU (worker/ring_attention.cc): R - 1 steps a layer, each while the chunk before it is
//              attended to: at most (R - 1) / R of attention's time hides it. "sparse" brings `selected` of
//              it, and first R - 1 steps for the lists' bitmaps, one bit for 128 keys and head, not hidden.
//              GPU (worker/cuda/cuda_group.cc): four pieces a layer, each sent while the next one is
//              projected; "ring" takes R - 1 steps for each, the others one
//   egress     n tokens' K and V of L layers, each sent while the next layers are computed
//   start      forming a group
//
// What is cut into P parts, each of which goes out while the next ones are made in time T, and takes X in
// all, shows max(X / P, X - T (P - 1) / P) of X.
//
// Not modelled: ranks on one machine that share its cores or links, a decode node that is slower than its
// streams' sum, packing, checkpoints, the search of other policies than probe.
#ifndef HW_COORDINATOR_COST_MODEL_H_
#define HW_COORDINATOR_COST_MODEL_H_

#include <cstdint>
#include <optional>

#include "headwater/v1/types.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

struct CostInput {
  v1::ServedModel model;
  uint64_t num_tokens = 0;
  uint64_t local_tokens = 0;  // of the rank that has most; see MaxLocalTokens()
  uint32_t world_size = 1;
  v1::Partition partition = v1::PARTITION_CONTIGUOUS;
  v1::Strategy strategy = v1::STRATEGY_RING;
  bool gpu = false;                 // how the exchange is hidden
  double density = 1;               // share of the causal blocks that attention reads
  double selected = 1;              // of other ranks' K and V, what strategy sparse brings
  uint64_t kv_bytes_per_token = 0;  // that are sent, of all layers; 0: none is
};

// Seconds, all >= 0. Nullopt: a rate that it takes, or the model's shape, is not known.
std::optional<v1::PlanCost> PredictCost(const CostInput& input, const v1::ComputeRates& rates);

// Of two workers of a group: each rate the lower one, each latency the higher.
v1::ComputeRates SlowerOf(const v1::ComputeRates& a, const v1::ComputeRates& b);

}  // namespace headwater

#endif  // HW_COORDINATOR_COST_MODEL_H_
