// Plans a prompt over workers: how many, which, how its tokens are dealt and how K and V are exchanged. Pure
// functions of their arguments.
#ifndef HW_COORDINATOR_PLANNER_H_
#define HW_COORDINATOR_PLANNER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "headwater/v1/types.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

struct PlanWorker {
  std::string worker_id;
  v1::MemoryModel memory;
  uint32_t max_world_size = 0;  // of a group that it can be in; 0: any
  uint64_t max_tokens = 0;      // that it holds under the prompt's policy; 0: no more is known than `memory`
  std::string device;           // "cpu", "cuda": a group is of one kind
  std::vector<v1::Strategy> strategies;  // of groups that it can be in, the best first; empty: all
  v1::ComputeRates rates;
};

struct PlanSpec {
  uint64_t num_tokens = 0;
  // Exactly this many workers; 0: one for prompts below context_parallel_min_tokens, else as many as make it
  // fastest (see cost_model.h; where rates are unknown, as many as there are), but no more than leave a block
  // (contiguous; else two) for each.
  uint32_t world_size = 0;
  // Unspecified: zigzag over several workers, contiguous on one.
  v1::Partition partition = v1::PARTITION_UNSPECIFIED;
  // Unspecified: of those that all have the fastest, else the first of the first worker's (by default ring).
  v1::Strategy strategy = v1::STRATEGY_UNSPECIFIED;
  uint32_t block_tokens = 256;
  uint64_t context_parallel_min_tokens = 2048;
  // For messages: what the workers were chosen by.
  std::string policy = "dense";
  bool quality = false;
  // The ranks go on from a checkpoint.
  bool resumes = false;
  // For the cost model. A model without its shape: nothing is predicted.
  v1::ServedModel model;
  double density = 1;
  double selected = 1;
  uint64_t kv_bytes_per_token = 0;
};

// A larger group is taken where it is predicted to need at most this share of a smaller one's time: workers
// that are left out serve others.
inline constexpr double kLargerGroupShare = 0.95;

// The most tokens that a rank gets: whole blocks (zigzag: whole chunks of 2R) dealt evenly, rounded up;
// striped: rank 0's stripes, of ceil(blocks / 64R) blocks each. Requires world_size and block_tokens > 0.
uint64_t MaxLocalTokens(uint64_t num_tokens, uint32_t world_size, v1::Partition partition,
                        uint32_t block_tokens);

// Chooses among `workers`, which serve one model and what the prompt asks for. Those earlier in the vector
// are preferred among equally fitting ones; `worker_ids` of the plan is sorted, so that the same set of
// workers always gives the same ranks. A rank with n tokens fits where its bytes by MemoryModel <=
// budget_bytes - weight_bytes and n <= max_tokens. Where no wished number fits, more workers are tried,
// unless spec.world_size is set. A group is of one kind of device: the first worker's, or the next one's
// where no plan fits. The plan holds what it is predicted to cost, where all rates are known. `explanation`
// (may be null) gets the candidates of the plan's kind, in the order in which they were looked at.
//
// UNAVAILABLE, NO_WORKERS: fewer workers that can be in a group of spec.world_size than that, or none.
// FAILED_PRECONDITION, MEMORY_PLAN_TOO_LARGE, with bytes asked and available: no choice fits.
absl::StatusOr<v1::PrefillPlan> MakePlan(const PlanSpec& spec, const std::vector<PlanWorker>& workers,
                                         v1::PlanExplanation* explanation = nullptr);

}  // namespace headwater

#endif  // HW_COORDINATOR_PLANNER_H_
