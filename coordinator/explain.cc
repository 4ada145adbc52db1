#include "coordinator/explain.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"

namespace headwater {
namespace {

std::string Word(const std::string& name, absl::string_view prefix) {
  return absl::AsciiStrToLower(absl::StripPrefix(name, prefix));
}

std::string StrategyWord(v1::Strategy strategy) { return Word(v1::Strategy_Name(strategy), "STRATEGY_"); }

std::string WhyTaken(const PlanSpec& spec, const v1::PrefillPlan& plan, size_t num_plans) {
  if (spec.world_size > 0) return "as many workers as were asked for";
  if (num_plans == 1) return "the only one that comes into question";
  if (!plan.has_cost()) return "as many workers as are of use; nothing is predicted";
  return "the least time";
}

std::string WhyNot(const v1::PrefillPlan& plan, const v1::PrefillPlan& taken) {
  if (!plan.has_cost() || !taken.has_cost()) {
    if (plan.world_size() == taken.world_size()) return "its workers name it later";
    return "fewer workers; nothing is predicted";
  }
  const double share = plan.cost().total_s() / taken.cost().total_s() - 1;
  if (share > 0) return absl::StrFormat("%.1f %% slower", 100 * share);
  if (plan.world_size() > taken.world_size()) {
    return absl::StrFormat("%.1f %% faster; a larger group has to be %.0f %% faster", -100 * share,
                           100 * (1 - kLargerGroupShare));
  }
  return absl::StrCat("as fast; its workers name ", StrategyWord(taken.strategy()), " first");
}

}  // namespace

std::string DescribePlan(const v1::PrefillPlan& plan) {
  std::string text = absl::StrCat(plan.world_size(), plan.world_size() == 1 ? " worker" : " workers");
  if (plan.world_size() > 1) {
    absl::StrAppend(&text, ", ", Word(v1::Partition_Name(plan.partition()), "PARTITION_"), ", ",
                    StrategyWord(plan.strategy()));
  }
  if (plan.has_cost()) absl::StrAppend(&text, absl::StrFormat(": %.3g s predicted", plan.cost().total_s()));
  return text;
}

v1::PlanExplanation ExplainChoice(const PlanSpec& spec, const std::vector<v1::PrefillPlan>& plans,
                                  size_t chosen, const std::vector<uint32_t>& no_room,
                                  const std::vector<v1::Strategy>& not_offered) {
  v1::PlanExplanation explanation;
  explanation.set_summary(absl::StrCat(DescribePlan(plans[chosen]), "; ",
                                       WhyTaken(spec, plans[chosen], plans.size() + no_room.size())));
  explanation.set_density(spec.density);
  for (size_t i = 0; i < plans.size(); ++i) {
    v1::PlanCandidate* const candidate = explanation.add_candidates();
    candidate->set_world_size(plans[i].world_size());
    candidate->set_partition(plans[i].partition());
    candidate->set_strategy(plans[i].strategy());
    if (plans[i].has_cost()) *candidate->mutable_cost() = plans[i].cost();
    candidate->set_chosen(i == chosen);
    candidate->set_note(i == chosen ? WhyTaken(spec, plans[i], plans.size() + no_room.size())
                                    : WhyNot(plans[i], plans[chosen]));
  }
  for (const uint32_t world_size : no_room) {
    v1::PlanCandidate* const candidate = explanation.add_candidates();
    candidate->set_world_size(world_size);
    candidate->set_note("too few workers have the memory for a part");
  }
  const v1::PrefillPlan& taken = plans[chosen];
  for (const v1::Strategy strategy : not_offered) {
    if (taken.world_size() == 1) break;
    v1::PlanCandidate* const candidate = explanation.add_candidates();
    candidate->set_world_size(taken.world_size());
    candidate->set_partition(taken.partition());
    candidate->set_strategy(strategy);
    candidate->set_note("its workers do not offer it");
    if (!taken.has_cost()) continue;
    const v1::PlanCost& cost = taken.cost();
    candidate->set_note(
        absl::StrFormat("its workers do not offer it; no exchange at all would save %.2g %%",
                        100 * (cost.exchange_s() - cost.exchange_hidden_s()) / cost.total_s()));
  }
  return explanation;
}

}  // namespace headwater
