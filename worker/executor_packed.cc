// Several assignments in one pass.
#include <algorithm>
#include <optional>
#include <utility>

#include "base/log.h"
#include "base/status_macros.h"
#include "kernels/ops/linear.h"
#include "worker/executor.h"

namespace headwater {
namespace {

// A cancelled job is seen after this long at most.
constexpr absl::Duration kPoll = absl::Milliseconds(20);
// A connection carries more than a short prompt's KV asks for, and costs a thread and a handshake at either
// end.
constexpr int kPackedChannels = 1;

}  // namespace

struct PrefillExecutor::PackedJob {
  Task task;
  PrefillJob job;
  absl::Time start;
  std::unique_ptr<KvSender> sender;
  std::optional<JobControl::CancelHook> hook;
  // While it waits for other jobs or for the decode node.
  std::optional<JobControl::Waiting> waiting;
  absl::StatusOr<PrefillResult> result;
  // Before its pass has ended: the task's assignment and control may be gone.
  bool answered = false;
};

absl::Status PrefillExecutor::WaitForPasses(JobControl* control) {
  const JobControl::Waiting waiting(control);
  // The senders' own stall timeouts bound this.
  while (!finisher_.WaitUntil(0, kPoll)) HW_RETURN_IF_ERROR(control->status());
  return absl::OkStatus();
}

void PrefillExecutor::WaitForRoom(Pass* pass) {
  const PackLimits limits = pack_limits();
  for (const auto& packed : *pass) packed->waiting.emplace(packed->task.control);
  while (true) {
    const size_t most = limits.overlaps_egress ? 2 * size_t{limits.max_prompts} - pass->size() : 0;
    if (finisher_.WaitUntil(most, kPoll)) break;
    for (auto it = pass->begin(); it != pass->end();) {
      PackedJob& packed = **it;
      const absl::Status status = packed.task.control->status();
      if (status.ok()) {
        ++it;
        continue;
      }
      packed.waiting.reset();
      packed.task.done(Report(*packed.task.assignment, nullptr, status, packed.start));
      it = pass->erase(it);
    }
    if (pass->empty()) return;
  }
  for (const auto& packed : *pass) packed->waiting.reset();
}

void PrefillExecutor::RunPacked(std::vector<Task> tasks) {
  kernels::SetNumThreads(options_.num_threads);
  HW_CHECK(tasks.size() <= pack_limits().max_prompts);
  Pass pass;
  std::vector<Task> alone;
  for (Task& task : tasks) {
    const v1::PrefillAssignment& assignment = *task.assignment;
    options_.metrics->epoch.Set(assignment.epoch());
    absl::StatusOr<PrefillJob> job = CheckAssignment(assignment, {options_.backend, options_.worker_id});
    if (!job.ok()) {
      task.done(Report(assignment, nullptr, job.status(), Clock::Real()->Now()));
    } else if (job->resume.has_value() || !options_.backend->MayPack(*job)) {
      alone.push_back(std::move(task));
    } else {
      auto packed = std::make_shared<PackedJob>();
      packed->task = std::move(task);
      packed->job = *std::move(job);
      packed->start = Clock::Real()->Now();
      pass.push_back(std::move(packed));
    }
  }
  if (!pass.empty()) WaitForRoom(&pass);
  if (!pass.empty()) RunPass(pass);
  pass.clear();
  for (const Task& task : alone) task.done(Run(*task.assignment, task.control, task.progress));
}

void PrefillExecutor::RunPass(const Pass& pass) {
  last_group_.reset();
  checkpoints_.Clear();
  options_.metrics->checkpoint_bytes.Set(0);
  std::vector<const PrefillJob*> jobs;
  std::vector<PrefillContext> contexts;
  uint64_t planned = 0;
  for (const auto& packed : pass) {
    const Task& task = packed->task;
    packed->start = Clock::Real()->Now();
    packed->sender = MakeSender(*task.assignment, packed->job, kPackedChannels);
    packed->hook.emplace(task.control, [sender = packed->sender.get()] { sender->Cancel(); });
    jobs.push_back(&packed->job);
    contexts.push_back(MakeContext(packed->job, packed->sender.get(), task.control, task.progress));
    contexts.back().ended = [this, packed = packed.get()](const absl::Status& why) {
      AnswerEarly(packed, why);
    };
    planned += packed->job.plan.total_bytes();
  }
  options_.metrics->planned_bytes.Set(static_cast<double>(planned));
  options_.metrics->pass_prompts.Observe(static_cast<double>(pass.size()));
  auto results = options_.backend->RunPacked(jobs, contexts);
  options_.metrics->planned_bytes.Set(0);
  HW_CHECK(results.size() == pass.size());
  for (size_t i = 0; i < pass.size(); ++i) {
    pass[i]->result = std::move(results[i]);
    if (!pass[i]->answered) pass[i]->waiting.emplace(pass[i]->task.control);
    finisher_.Add([this, packed = pass[i]] { EndPacked(packed.get()); });
  }
}

void PrefillExecutor::AnswerEarly(PackedJob* packed, const absl::Status& why) {
  // The pass may last, and so the sender, which sends nothing more.
  packed->sender->Cancel();
  packed->hook.reset();
  absl::StatusOr<Outcome> outcome = why;
  if (const absl::Status cancelled = packed->task.control->status(); !cancelled.ok()) outcome = cancelled;
  packed->answered = true;
  packed->task.done(Report(*packed->task.assignment, &packed->job, outcome, packed->start));
}

void PrefillExecutor::EndPacked(PackedJob* packed) {
  if (packed->answered) {
    EndSender(std::move(packed->sender));
    return;
  }
  JobControl* const control = packed->task.control;
  absl::StatusOr<Outcome> outcome = Outcome();
  if (packed->result.ok()) {
    outcome->result = *std::move(packed->result);
    const absl::Status finished = FinishSender(packed->sender.get(), control, &*outcome);
    outcome->sent = packed->sender->Stats();
    if (!finished.ok()) outcome = finished;
  } else {
    outcome = packed->result.status();
  }
  if (!outcome.ok()) {
    packed->sender->Cancel();
    // Whatever broke on the way down, the cause is the cancellation.
    if (const absl::Status cancelled = control->status(); !cancelled.ok()) outcome = cancelled;
  }
  packed->hook.reset();
  EndSender(std::move(packed->sender));
  packed->waiting.reset();
  packed->task.done(Report(*packed->task.assignment, &packed->job, outcome, packed->start));
}

}  // namespace headwater
