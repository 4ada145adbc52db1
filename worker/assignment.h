// Assignments from the coordinator: checked before anything is done for them.
#ifndef HW_WORKER_ASSIGNMENT_H_
#define HW_WORKER_ASSIGNMENT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

#include "headwater/v1/worker.pb.h"
#include "worker/backend.h"
#include "worker/prefill.h"

namespace headwater {

// What an assignment is checked against.
struct AssignmentContext {
  const PrefillBackend* backend = nullptr;
  std::string worker_id;
};

inline constexpr int kMaxTopLogprobs = 20;

// The job, with its memory plan, or the first field that is wrong: INVALID_ARGUMENT with the reason that fits
// (EMPTY_PROMPT, TOKEN_OUT_OF_RANGE, PROMPT_TOO_LONG, UNKNOWN_POLICY, BAD_POLICY_PARAMETER, BAD_REQUEST_ID,
// KV_DTYPE_UNSUPPORTED, BAD_FIELD); FAILED_PRECONDITION: MODEL_MISMATCH, MEMORY_PLAN_TOO_LARGE;
// UNIMPLEMENTED: a quality, where the backend serves none. Messages name value and limit.
absl::StatusOr<PrefillJob> CheckAssignment(const v1::PrefillAssignment& assignment,
                                           const AssignmentContext& context);

}  // namespace headwater

#endif  // HW_WORKER_ASSIGNMENT_H_
