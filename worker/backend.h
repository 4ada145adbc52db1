// PrefillBackend: what a worker computes with, the CPU or one GPU.
#ifndef HW_WORKER_BACKEND_H_
#define HW_WORKER_BACKEND_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

#include "headwater/v1/worker.pb.h"
#include "kernels/dtype.h"
#include "model/config.h"
#include "worker/memory_plan.h"
#include "worker/prefill.h"

namespace headwater {

// The same code, and the message after the flag that it comes from.
inline absl::Status FlagError(absl::string_view flag, const std::string& value, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("--", flag, "=", value, ": ", status.message()));
}

// One per worker. Plan() and the getters from any thread, the others from one.
class PrefillBackend {
 public:
  virtual ~PrefillBackend() = default;

  virtual const ModelConfig& config() const = 0;
  // As Model::fingerprint().
  virtual const std::string& fingerprint() const = 0;
  // Policies that Run() takes.
  virtual std::vector<std::string> policies() const = 0;
  // Ranks of the largest group that it can compute in; 0: any number.
  virtual uint32_t max_world_size() const = 0;
  // For the planner: what prompts may take.
  virtual v1::MemoryModel memory_model() const = 0;
  // One line for the log: type, weights, budget.
  virtual std::string Describe() const = 0;

  // What this rank's part of a prompt takes; the arguments are PlanMemory()'s. FAILED_PRECONDITION,
  // MEMORY_PLAN_TOO_LARGE, with bytes asked and available.
  virtual absl::StatusOr<MemoryPlan> Plan(kernels::DType wire, int64_t local_tokens, int64_t max_rank_tokens,
                                          int64_t num_tokens, int world_size) const = 0;

  // Makes room for the job. RESOURCE_EXHAUSTED.
  virtual absl::Status Reserve(const PrefillJob& job) = 0;

  // Runs the job, for which Reserve() was called last; RunPrefill()'s contract. The context's model and arena
  // are the backend's to set.
  virtual absl::StatusOr<PrefillResult> Run(const PrefillJob& job, const PrefillContext& context) = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_BACKEND_H_
