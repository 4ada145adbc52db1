// How a plan was chosen, in words. Pure.
#ifndef HW_COORDINATOR_EXPLAIN_H_
#define HW_COORDINATOR_EXPLAIN_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "coordinator/planner.h"
#include "headwater/v1/types.pb.h"

namespace headwater {

// "2 workers, zigzag, ring: 1.23 s predicted".
std::string DescribePlan(const v1::PrefillPlan& plan);

// plans: those that fit, of which `chosen` was taken. no_room: numbers of workers that were tried and have
// too little memory. not_offered: strategies that the workers lack; both come last, these only for a group.
v1::PlanExplanation ExplainChoice(const PlanSpec& spec, const std::vector<v1::PrefillPlan>& plans,
                                  size_t chosen, const std::vector<uint32_t>& no_room,
                                  const std::vector<v1::Strategy>& not_offered);

}  // namespace headwater

#endif  // HW_COORDINATOR_EXPLAIN_H_
