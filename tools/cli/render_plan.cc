#include "tools/cli/render_plan.h"

#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"

#include "tools/cli/render.h"

namespace headwater {
namespace {

Json CostToJson(const v1::PlanCost& cost) {
  Json json;
  json["linear_s"] = cost.linear_s();
  json["attention_s"] = cost.attention_s();
  json["exchange_s"] = cost.exchange_s();
  json["exchange_hidden_s"] = cost.exchange_hidden_s();
  json["egress_s"] = cost.egress_s();
  json["egress_hidden_s"] = cost.egress_hidden_s();
  json["start_s"] = cost.start_s();
  json["total_s"] = cost.total_s();
  return json;
}

std::string Number(double seconds) { return absl::StrFormat("%.3g", seconds); }

std::string WithHidden(double seconds, double hidden) {
  return absl::StrCat(Number(seconds), " (", Number(hidden), ")");
}

}  // namespace

std::string PartitionWord(v1::Partition partition) {
  return absl::AsciiStrToLower(absl::StripPrefix(v1::Partition_Name(partition), "PARTITION_"));
}

std::string StrategyWord(v1::Strategy strategy) {
  return absl::AsciiStrToLower(absl::StripPrefix(v1::Strategy_Name(strategy), "STRATEGY_"));
}

Json PlanToJson(const v1::PrefillPlan& plan) {
  Json json;
  json["world_size"] = plan.world_size();
  json["partition"] = PartitionWord(plan.partition());
  json["strategy"] = StrategyWord(plan.strategy());
  json["block_tokens"] = plan.block_tokens();
  json["bytes_per_rank"] = plan.bytes_per_rank();
  json["worker_ids"] = std::vector<std::string>(plan.worker_ids().begin(), plan.worker_ids().end());
  if (plan.has_cost()) json["cost"] = CostToJson(plan.cost());
  return json;
}

Json ExplanationToJson(const v1::PlanExplanation& explanation) {
  Json json;
  json["summary"] = explanation.summary();
  json["density"] = explanation.density();
  json["candidates"] = Json::array();
  for (const v1::PlanCandidate& candidate : explanation.candidates()) {
    Json one;
    one["world_size"] = candidate.world_size();
    one["partition"] = PartitionWord(candidate.partition());
    one["strategy"] = StrategyWord(candidate.strategy());
    if (candidate.has_cost()) one["cost"] = CostToJson(candidate.cost());
    one["chosen"] = candidate.chosen();
    one["note"] = candidate.note();
    json["candidates"].push_back(std::move(one));
  }
  return json;
}

std::string RenderExplanation(const v1::PlanExplanation& explanation) {
  std::vector<std::vector<std::string>> rows = {{"", "WORKERS", "PARTITION", "STRATEGY", "LINEAR",
                                                 "ATTENTION", "EXCHANGE", "EGRESS", "START", "TOTAL s",
                                                 "WHY"}};
  for (const v1::PlanCandidate& candidate : explanation.candidates()) {
    const bool planned = candidate.partition() != v1::PARTITION_UNSPECIFIED;
    std::vector<std::string> row = {candidate.chosen() ? "*" : "", absl::StrCat(candidate.world_size()),
                                    planned ? PartitionWord(candidate.partition()) : "-",
                                    planned ? StrategyWord(candidate.strategy()) : "-"};
    if (candidate.has_cost()) {
      const v1::PlanCost& cost = candidate.cost();
      row.insert(row.end(), {Number(cost.linear_s()), Number(cost.attention_s()),
                             WithHidden(cost.exchange_s(), cost.exchange_hidden_s()),
                             WithHidden(cost.egress_s(), cost.egress_hidden_s()), Number(cost.start_s()),
                             Number(cost.total_s())});
    } else {
      row.insert(row.end(), 6, "-");
    }
    row.push_back(candidate.note());
    rows.push_back(std::move(row));
  }
  const std::string head =
      RenderPairs({{"plan", explanation.summary()},
                   {"density", absl::StrFormat("%.4f expected", explanation.density())}});
  return absl::StrCat(head, RenderTable(rows));
}

}  // namespace headwater
