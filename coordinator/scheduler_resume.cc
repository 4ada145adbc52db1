// Going on from the checkpoints of the epoch before.
#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"

#include "base/log.h"
#include "coordinator/scheduler.h"

namespace headwater {

// Prefers the workers that hold a part. Without providers: the prompt cannot go on with these workers.
Scheduler::FreePlan Scheduler::PlanResumed(const Job& job, PlanSpec spec, std::vector<PlanWorker> free) {
  if (!job.resume.has_value()) {
    const absl::Status none = absl::NotFoundError("there is no checkpoint");
    return {none, none};
  }
  absl::flat_hash_set<std::string> living;
  for (const CheckpointHolder& holder : job.resume->holders) {
    const Worker* worker = cluster_.FindWorker(holder.worker_id);
    if (worker == nullptr || worker->connection != holder.connection) continue;
    if (worker->last_serial == job.serial) living.insert(holder.worker_id);
  }
  std::stable_partition(free.begin(), free.end(),
                        [&](const PlanWorker& worker) { return living.contains(worker.worker_id); });
  spec.resumes = true;
  absl::StatusOr<v1::PrefillPlan> plan = MakePlan(spec, free);
  if (!plan.ok()) return {plan.status(), plan.status()};
  if (IsPacked(job, *plan)) {
    const absl::Status packed = absl::FailedPreconditionError("the prompt is computed together with others");
    return {packed, packed};
  }
  absl::StatusOr<std::vector<uint32_t>> providers = FindProviders(*job.resume, living, *plan);
  return {std::move(plan), std::move(providers)};
}

// An epoch was given up, and the job will be queued again.
void Scheduler::UpdateResume(Job& job) {
  // Before the assignments nobody knows of an epoch, and what it was to go on from is there still.
  const bool assigned = job.ranks.front().connection != 0;
  if (assigned) {
    if (std::optional<Resume> next = NextResume(job)) {
      job.resume = std::move(next);
    } else {
      DropResume(job, "its ranks have no checkpoint of the same layer");
    }
  }
  if (job.state_lost) DropResume(job, "the session or a checkpoint was lost");
}

void Scheduler::DropResume(Job& job, absl::string_view why) {
  if (!job.resume.has_value()) return;
  HW_LOG(INFO)
          .Field("request_id", job.key.request_id)
          .Field("epoch", job.resume->point.epoch())
          .Field("layer", job.resume->point.layer())
          .Field("why", why)
      << "checkpoint not used, the next epoch begins at layer 0";
  metrics_->lost_checkpoints_total.Increment();
  job.resume.reset();
}

}  // namespace headwater
