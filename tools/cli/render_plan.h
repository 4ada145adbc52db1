// A plan and how it was chosen, as a table and as JSON.
#ifndef HW_TOOLS_CLI_RENDER_PLAN_H_
#define HW_TOOLS_CLI_RENDER_PLAN_H_

#include <string>

#include <nlohmann/json.hpp>

#include "headwater/v1/types.pb.h"

namespace headwater {

// "zigzag", "ring".
std::string PartitionWord(v1::Partition partition);
std::string StrategyWord(v1::Strategy strategy);

// Times are in seconds, as in the proto.
nlohmann::ordered_json PlanToJson(const v1::PrefillPlan& plan);
nlohmann::ordered_json ExplanationToJson(const v1::PlanExplanation& explanation);

// The summary, and a table of the candidates in which what was taken has a star; what passes hidden is in
// brackets behind all of it.
std::string RenderExplanation(const v1::PlanExplanation& explanation);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_RENDER_PLAN_H_
