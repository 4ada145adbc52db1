#include "coordinator/planner.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "coordinator/cost_model.h"
#include "coordinator/explain.h"
#include "coordinator/validation.h"

namespace headwater {
namespace {

// All that there are, the one first that workers have who name none.
constexpr v1::Strategy kStrategies[] = {v1::STRATEGY_RING, v1::STRATEGY_ALLGATHER, v1::STRATEGY_SPARSE};

// Of a rank, as the workers deal them.
constexpr uint64_t kMaxStripes = 64;

__extension__ using Uint128 = unsigned __int128;

uint64_t CeilDiv(uint64_t a, uint64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

// Of a rank among `world_size`.
uint64_t RankBytes(const PlanSpec& spec, uint32_t world_size, const v1::MemoryModel& memory,
                   uint64_t local_tokens) {
  Uint128 bytes_per_token = memory.bytes_per_token();
  if (world_size > 1 || spec.resumes) bytes_per_token += memory.group_bytes_per_token();
  // A token takes less than 2^65 bytes, a prompt has less than 2^32 tokens.
  Uint128 bytes = bytes_per_token * local_tokens + memory.fixed_bytes();
  if (world_size > 1) {
    bytes += Uint128{memory.group_bytes_per_prompt_token()} *
             (spec.num_tokens - std::min(spec.num_tokens, local_tokens));
  }
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  return bytes > kMost ? kMost : static_cast<uint64_t>(bytes);
}

uint64_t AvailableBytes(const v1::MemoryModel& memory) {
  return memory.budget_bytes() > memory.weight_bytes() ? memory.budget_bytes() - memory.weight_bytes() : 0;
}

v1::Partition PartitionOf(const PlanSpec& spec, uint32_t world_size) {
  if (spec.partition != v1::PARTITION_UNSPECIFIED) return spec.partition;
  return world_size > 1 ? v1::PARTITION_ZIGZAG : v1::PARTITION_CONTIGUOUS;
}

bool Has(const PlanWorker& worker, v1::Strategy strategy) {
  return worker.strategies.empty() ||
         std::find(worker.strategies.begin(), worker.strategies.end(), strategy) != worker.strategies.end();
}

// Of workers of one kind: those that all have, the one to take first in front; at least one.
std::vector<v1::Strategy> StrategiesOf(const PlanSpec& spec, const std::vector<PlanWorker>& workers) {
  if (spec.strategy != v1::STRATEGY_UNSPECIFIED) return {spec.strategy};
  std::vector<v1::Strategy> wanted = workers.front().strategies;
  if (wanted.empty()) wanted.assign(std::begin(kStrategies), std::end(kStrategies));
  std::vector<v1::Strategy> common;
  for (const v1::Strategy strategy : wanted) {
    if (std::all_of(workers.begin(), workers.end(),
                    [&](const PlanWorker& worker) { return Has(worker, strategy); })) {
      common.push_back(strategy);
    }
  }
  return common.empty() ? std::vector<v1::Strategy>{wanted.front()} : common;
}

std::vector<v1::Strategy> NotOffered(const PlanSpec& spec, const std::vector<PlanWorker>& workers) {
  if (spec.strategy != v1::STRATEGY_UNSPECIFIED) return {};
  const std::vector<v1::Strategy> offered = StrategiesOf(spec, workers);
  std::vector<v1::Strategy> others;
  for (const v1::Strategy strategy : kStrategies) {
    if (std::find(offered.begin(), offered.end(), strategy) == offered.end()) others.push_back(strategy);
  }
  return others;
}

uint32_t WishedWorldSize(const PlanSpec& spec, uint32_t num_workers) {
  if (spec.num_tokens < spec.context_parallel_min_tokens) return 1;
  const uint64_t blocks = CeilDiv(spec.num_tokens, spec.block_tokens);
  const uint64_t least_blocks = PartitionOf(spec, num_workers) == v1::PARTITION_CONTIGUOUS ? 1 : 2;
  const uint64_t useful = std::max<uint64_t>(1, blocks / least_blocks);
  return static_cast<uint32_t>(std::min<uint64_t>(num_workers, useful));
}

bool FitsGroup(const PlanSpec& spec, const PlanWorker& worker, uint32_t world_size) {
  if (world_size > 1 && spec.strategy != v1::STRATEGY_UNSPECIFIED && !Has(worker, spec.strategy))
    return false;
  return worker.max_world_size == 0 || worker.max_world_size >= world_size;
}

uint32_t NumForGroup(const PlanSpec& spec, const std::vector<PlanWorker>& workers, uint32_t world_size) {
  return static_cast<uint32_t>(std::count_if(workers.begin(), workers.end(), [&](const PlanWorker& worker) {
    return FitsGroup(spec, worker, world_size);
  }));
}

// The largest group that can be formed; 0: there are no workers.
uint32_t LargestGroup(const PlanSpec& spec, const std::vector<PlanWorker>& workers) {
  auto world_size = static_cast<uint32_t>(workers.size());
  while (world_size > 0 && NumForGroup(spec, workers, world_size) < world_size) --world_size;
  return world_size;
}

// One plan for each strategy, the one to take first in front; none: too few workers have room.
std::vector<v1::PrefillPlan> PlansWith(const PlanSpec& spec, uint32_t world_size,
                                       const std::vector<PlanWorker>& workers) {
  const v1::Partition partition = PartitionOf(spec, world_size);
  const uint64_t local_tokens = MaxLocalTokens(spec.num_tokens, world_size, partition, spec.block_tokens);
  v1::PrefillPlan plan;
  std::vector<std::string> chosen;
  uint64_t most_bytes = 0;
  v1::ComputeRates rates;
  for (const PlanWorker& worker : workers) {
    const uint64_t bytes = RankBytes(spec, world_size, worker.memory, local_tokens);
    if (bytes > AvailableBytes(worker.memory) || !FitsGroup(spec, worker, world_size)) continue;
    if (worker.max_tokens > 0 && local_tokens > worker.max_tokens) continue;
    most_bytes = std::max(most_bytes, bytes);
    rates = chosen.empty() ? worker.rates : SlowerOf(rates, worker.rates);
    chosen.push_back(worker.worker_id);
    if (chosen.size() == world_size) break;
  }
  if (chosen.size() < world_size) return {};
  std::sort(chosen.begin(), chosen.end());
  plan.set_world_size(world_size);
  plan.set_partition(partition);
  plan.set_block_tokens(spec.block_tokens);
  plan.set_bytes_per_rank(most_bytes);
  for (std::string& id : chosen) plan.add_worker_ids(std::move(id));
  std::vector<v1::Strategy> strategies = StrategiesOf(spec, workers);
  if (world_size == 1) strategies.resize(1);  // it exchanges nothing
  CostInput input;
  input.model = spec.model;
  input.num_tokens = spec.num_tokens;
  input.local_tokens = local_tokens;
  input.world_size = world_size;
  input.partition = partition;
  input.gpu = workers.front().device == "cuda";
  input.density = spec.density;
  input.selected = spec.selected;
  input.kv_bytes_per_token = spec.kv_bytes_per_token;
  std::vector<v1::PrefillPlan> plans;
  for (const v1::Strategy strategy : strategies) {
    plan.set_strategy(strategy);
    input.strategy = strategy;
    if (auto cost = PredictCost(input, rates)) *plan.mutable_cost() = *std::move(cost);
    plans.push_back(plan);
  }
  return plans;
}

// The one to take of plans by rising world size, in each of which the strategy to take first is in front.
size_t Choose(const std::vector<v1::PrefillPlan>& plans) {
  const bool predicted = std::all_of(plans.begin(), plans.end(), [](const auto& p) { return p.has_cost(); });
  size_t best = 0;
  for (size_t i = 1; i < plans.size(); ++i) {
    const bool larger = plans[i].world_size() > plans[best].world_size();
    const double total = plans[i].cost().total_s(), least = plans[best].cost().total_s();
    const bool faster = total < least && (!larger || total <= kLargerGroupShare * least);
    if (predicted ? faster : larger) best = i;
  }
  return best;
}

absl::Status TooLarge(const PlanSpec& spec, uint32_t world_size, const std::vector<PlanWorker>& workers) {
  const uint64_t local_tokens =
      MaxLocalTokens(spec.num_tokens, world_size, PartitionOf(spec, world_size), spec.block_tokens);
  uint64_t held = 0;  // most tokens that a worker holds under the policy, where that alone is too few
  for (const PlanWorker& worker : workers) {
    const bool by_policy =
        worker.max_tokens > 0 && local_tokens > worker.max_tokens &&
        RankBytes(spec, world_size, worker.memory, local_tokens) <= AvailableBytes(worker.memory);
    if (by_policy) held = std::max(held, worker.max_tokens);
  }
  if (held > 0) {
    return MakeError(
        absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE,
        absl::StrCat("a prompt of ", spec.num_tokens, " tokens over ", world_size, " workers gives ",
                     local_tokens, " to one; under policy ", spec.policy, " their memory holds ", held),
        {{"value", absl::StrCat(local_tokens)},
         {"limit", absl::StrCat(held)},
         {"num_tokens", absl::StrCat(spec.num_tokens)},
         {"world_size", absl::StrCat(world_size)}});
  }
  // The world_size roomiest workers would be taken; the least of them is the one that does not fit.
  std::vector<std::pair<uint64_t, uint64_t>> available_and_asked;
  available_and_asked.reserve(workers.size());
  for (const PlanWorker& worker : workers) {
    if (!FitsGroup(spec, worker, world_size)) continue;
    available_and_asked.emplace_back(AvailableBytes(worker.memory),
                                     RankBytes(spec, world_size, worker.memory, local_tokens));
  }
  std::sort(available_and_asked.rbegin(), available_and_asked.rend());
  const auto [available, asked] = available_and_asked[world_size - 1];
  return MakeError(
      absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE,
      absl::StrCat("a prompt of ", spec.num_tokens, " tokens over ", world_size, " workers needs ", asked,
                   " bytes on each besides the weights; ", available, " are available"),
      {{"value", absl::StrCat(asked)},
       {"limit", absl::StrCat(available)},
       {"num_tokens", absl::StrCat(spec.num_tokens)},
       {"world_size", absl::StrCat(world_size)}});
}

// Whether there is anything to choose by.
bool RatesKnown(const std::vector<PlanWorker>& workers) {
  return std::all_of(workers.begin(), workers.end(),
                     [](const PlanWorker& worker) { return worker.rates.linear_flops() > 0; });
}

// Among workers of one kind.
absl::StatusOr<v1::PrefillPlan> MakePlanAmong(const PlanSpec& spec, const std::vector<PlanWorker>& workers,
                                              v1::PlanExplanation* explanation) {
  const uint32_t needed = std::max(spec.world_size, 1u), num_workers = NumForGroup(spec, workers, needed);
  if (num_workers < needed) {
    return MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_NO_WORKERS,
                     absl::StrCat(needed, " workers with policy ", spec.policy,
                                  spec.quality ? " that serve a quality" : "", " are needed, ", num_workers,
                                  " that can be in such a group are there"),
                     {{"value", absl::StrCat(num_workers)}, {"limit", absl::StrCat(needed)}});
  }
  std::vector<v1::PrefillPlan> plans;
  std::vector<uint32_t> no_room;
  const auto look_at = [&](uint32_t world_size) {
    std::vector<v1::PrefillPlan> found = PlansWith(spec, world_size, workers);
    if (found.empty()) no_room.push_back(world_size);
    plans.insert(plans.end(), std::make_move_iterator(found.begin()), std::make_move_iterator(found.end()));
  };
  uint32_t largest = spec.world_size;
  if (spec.world_size > 0) {
    look_at(spec.world_size);
  } else {
    largest = LargestGroup(spec, workers);
    uint32_t wished = WishedWorldSize(spec, largest);
    if (RatesKnown(workers)) {
      wished = std::min(wished, kMaxWorldSize);
      for (uint32_t world_size = 1; world_size <= wished; ++world_size) look_at(world_size);
    } else {
      for (uint32_t world_size = wished; world_size >= 1 && plans.empty(); --world_size) look_at(world_size);
    }
    for (uint32_t world_size = wished + 1; world_size <= largest && plans.empty(); ++world_size) {
      look_at(world_size);
    }
  }
  if (plans.empty()) return TooLarge(spec, largest, workers);
  const size_t chosen = Choose(plans);
  if (explanation != nullptr) {
    *explanation = ExplainChoice(spec, plans, chosen, no_room, NotOffered(spec, workers));
  }
  return plans[chosen];
}

}  // namespace

uint64_t MaxLocalTokens(uint64_t num_tokens, uint32_t world_size, v1::Partition partition,
                        uint32_t block_tokens) {
  const uint64_t blocks = CeilDiv(num_tokens, block_tokens);
  const uint64_t ranks = world_size;
  uint64_t local_blocks = CeilDiv(blocks, ranks);
  if (partition == v1::PARTITION_ZIGZAG) local_blocks = 2 * CeilDiv(blocks, 2 * ranks);
  if (partition == v1::PARTITION_STRIPED) {
    const uint64_t stripe = CeilDiv(blocks, kMaxStripes * ranks);
    const uint64_t rounds = CeilDiv(blocks, stripe * ranks);
    // Of the last round, rank 0 has the first stripe, which may be short.
    local_blocks = (rounds - 1) * stripe + std::min(stripe, blocks - (rounds - 1) * stripe * ranks);
  }
  return std::min(num_tokens, local_blocks * block_tokens);
}

absl::StatusOr<v1::PrefillPlan> MakePlan(const PlanSpec& spec, const std::vector<PlanWorker>& workers,
                                         v1::PlanExplanation* explanation) {
  std::vector<std::vector<PlanWorker>> kinds;
  for (const PlanWorker& worker : workers) {
    auto kind = std::find_if(kinds.begin(), kinds.end(),
                             [&](const auto& some) { return some.front().device == worker.device; });
    if (kind == kinds.end()) kind = kinds.emplace(kinds.end());
    kind->push_back(worker);
  }
  absl::StatusOr<v1::PrefillPlan> plan =
      MakePlanAmong(spec, kinds.empty() ? workers : kinds.front(), explanation);
  for (size_t i = 1; i < kinds.size() && !plan.ok(); ++i) {
    absl::StatusOr<v1::PrefillPlan> other = MakePlanAmong(spec, kinds[i], explanation);
    // That it is too large for some says more than that others are not there.
    if (other.ok() || absl::IsUnavailable(plan.status())) plan = std::move(other);
  }
  return plan;
}

}  // namespace headwater
