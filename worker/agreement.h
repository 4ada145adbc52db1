// What the ranks of a group tell each other before a prompt and behind it.
#ifndef HW_WORKER_AGREEMENT_H_
#define HW_WORKER_AGREEMENT_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

#include "worker/collectives.h"
#include "worker/job_control.h"

namespace headwater {

struct PrefillJob;

// Of a job and what computes it: model, types, policy, prompt, partition, first layer. Ranks that differ in
// what sizes a chunk would read each other's bytes wrong. computes: what the rank computes with, as
// "fingerprint, compute type".
//
// checkpoint_layers: in, how often this rank wants checkpoints, 0 for none; out, as often as the rank wants
// that wants fewest. group: null for one rank. FAILED_PRECONDITION, MODEL_MISMATCH, with the ranks; errors of
// CollectiveError().
absl::Status AgreeOnPlan(const PrefillJob& job, absl::string_view computes, Collectives* group,
                         JobControl* control, int32_t* checkpoint_layers);

// Returns when every rank has called it, so that no rank leaves the group while another still waits for what
// it has sent. Errors of CollectiveError().
absl::Status WaitForPeers(Collectives* group, JobControl* control);

}  // namespace headwater

#endif  // HW_WORKER_AGREEMENT_H_
