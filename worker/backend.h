// PrefillBackend: what a worker computes with, the CPU or one GPU.
#ifndef HW_WORKER_BACKEND_H_
#define HW_WORKER_BACKEND_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"

#include "headwater/v1/worker.pb.h"
#include "kernels/dtype.h"
#include "model/config.h"
#include "worker/memory_plan.h"
#include "worker/prefill.h"
#include "worker/quality.h"

namespace headwater {

// The same code, and the message after the flag that it comes from.
inline absl::Status FlagError(absl::string_view flag, const std::string& value, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("--", flag, "=", value, ": ", status.message()));
}

// What --default_policy may be.
inline absl::Status CheckDefaultPolicy(const std::string& policy, const std::vector<std::string>& served) {
  if (std::find(served.begin(), served.end(), policy) != served.end()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--default_policy=", policy, ": this worker has ", absl::StrJoin(served, ", ")));
}

// What one packed pass may hold: several short prompts that are computed together.
struct PackLimits {
  uint32_t max_prompts = 1;  // 1: prompts run alone
  int64_t max_tokens = 0;    // of all its prompts together
  // The senders of a pass may still be reading while the next pass computes: no memory that they were given
  // is written again before its `done` has run, in whatever pass. False: all of them are gone before the next
  // pass.
  bool overlaps_egress = false;
  // Policies whose prompts go dense, and so into a pass, where they are shorter; "" is the default policy.
  // With default parameters and no quality.
  std::map<std::string, int64_t> dense_below = {{"", std::numeric_limits<int64_t>::max()},
                                                {"dense", std::numeric_limits<int64_t>::max()}};
};

// One per worker. Plan() and the getters from any thread, the others from one.
class PrefillBackend {
 public:
  virtual ~PrefillBackend() = default;

  virtual const ModelConfig& config() const = 0;
  // As Model::fingerprint().
  virtual const std::string& fingerprint() const = 0;
  // Policies that Run() takes.
  virtual std::vector<std::string> policies() const = 0;
  // Of them, the one of assignments that name none.
  virtual std::string default_policy() const { return "dense"; }
  // What registers with each policy: the longest prompt under it, and below what length it is dense.
  virtual std::vector<v1::PolicyLimit> policy_limits() const { return {}; }
  // Whether Run() takes jobs with a quality.
  virtual bool serves_quality() const { return false; }
  // Adds what the worker knows to the parameters that a request gave (`given`, by name).
  virtual void AddTables(const std::map<std::string, double>& /*given*/,
                         kernels::PolicyParameters* /*parameters*/) const {}
  // Ranks of the largest group that it can compute in; 0: any number.
  virtual uint32_t max_world_size() const = 0;
  // How it shares prompts with others, the best first; empty: any way.
  virtual std::vector<v1::Strategy> strategies() const { return {}; }
  // For the planner: what prompts may take.
  virtual v1::MemoryModel memory_model() const = 0;
  // How fast it is, measured now, before it takes jobs; within a second or so. UNIMPLEMENTED: it cannot.
  virtual absl::StatusOr<ComputeSpeed> MeasureSpeed() {
    return absl::UnimplementedError("this backend does not measure itself");
  }
  // Type in which ranks exchange K and V.
  virtual kernels::DType exchange_type() const { return kernels::DType::kBF16; }
  // One line for the log: type, weights, budget.
  virtual std::string Describe() const = 0;

  // What this rank's part of a prompt takes under a policy; the other arguments are PlanMemory()'s.
  // FAILED_PRECONDITION, MEMORY_PLAN_TOO_LARGE, with bytes asked and available; errors of the policy.
  virtual absl::StatusOr<MemoryPlan> Plan(const kernels::PatternPolicy& policy, kernels::DType wire,
                                          int64_t local_tokens, int64_t max_rank_tokens, int64_t num_tokens,
                                          int world_size, int64_t held_tokens,
                                          v1::Strategy strategy) const = 0;

  // Makes room for the job. RESOURCE_EXHAUSTED.
  virtual absl::Status Reserve(const PrefillJob& job) = 0;

  // Runs the job, for which Reserve() was called last; RunPrefill()'s contract. The context's model and arena
  // are the backend's to set.
  // No sender of an earlier call lives.
  virtual absl::StatusOr<PrefillResult> Run(const PrefillJob& job, const PrefillContext& context) = 0;

  // What a packed pass may hold. A pass of max_tokens tokens fits memory_model()'s budget and takes a few
  // seconds at most: a cancelled job is answered at its end, and the coordinator waits ten. Fixed for the
  // life of the backend; from any thread.
  virtual PackLimits pack_limits() const { return {}; }

  // Whether the job may share a pass: one rank, at most max_tokens tokens, a policy that a packed pass
  // computes.
  virtual bool MayPack(const PrefillJob& job) const {
    const PackLimits limits = pack_limits();
    return limits.max_prompts > 1 && job.world_size() == 1 &&
           static_cast<int64_t>(job.tokens.size()) <= limits.max_tokens && job.policy->name() == "dense";
  }

  // Runs jobs that MayPack() in one pass, at most max_prompts of them with at most max_tokens tokens
  // together; contexts[i] belongs to jobs[i] and is as Run()'s. One result a job, in their order, each as
  // Run()'s: where it is OK, all blocks of that job have been submitted. A job that fails or is cancelled
  // leaves the others alone where it can; the pass stops when none is left.
  //
  // Calls Step() of every context's control at least every 50 ms of work, and `progress` of every context
  // after each layer, from the calling thread. Calls `ended` of one that ends before the pass does. Reserve()
  // is not called: the pass makes its own room, by a plan for the sum of the tokens; without it, every result
  // is RESOURCE_EXHAUSTED.
  virtual std::vector<absl::StatusOr<PrefillResult>> RunPacked(
      absl::Span<const PrefillJob* const> jobs, absl::Span<const PrefillContext> /*contexts*/) {
    return std::vector<absl::StatusOr<PrefillResult>>(jobs.size(),
                                                      absl::UnimplementedError("this backend packs nothing"));
  }
};

}  // namespace headwater

#endif  // HW_WORKER_BACKEND_H_
