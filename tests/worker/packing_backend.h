// PackingBackend: a backend that packs, on the CPU: the prompts of a pass one after the other, each in memory
// of its own.
#ifndef HW_TESTS_WORKER_PACKING_BACKEND_H_
#define HW_TESTS_WORKER_PACKING_BACKEND_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "model/model.h"
#include "worker/cpu_backend.h"

namespace headwater::testing {

class PackingBackend final : public PrefillBackend {
 public:
  PackingBackend(std::shared_ptr<const Model> model, const PackLimits& limits)
      : model_(std::move(model)), limits_(limits), alone_(NewBackend()) {}

  const ModelConfig& config() const override { return alone_->config(); }
  const std::string& fingerprint() const override { return alone_->fingerprint(); }
  std::vector<std::string> policies() const override { return alone_->policies(); }
  uint32_t max_world_size() const override { return 1; }
  v1::MemoryModel memory_model() const override { return alone_->memory_model(); }
  std::string Describe() const override { return "packs for a test"; }
  absl::StatusOr<MemoryPlan> Plan(const kernels::PatternPolicy& policy, kernels::DType wire,
                                  int64_t local_tokens, int64_t max_rank_tokens, int64_t num_tokens,
                                  int world_size, int64_t held_tokens, v1::Strategy strategy) const override {
    return alone_->Plan(policy, wire, local_tokens, max_rank_tokens, num_tokens, world_size, held_tokens,
                        strategy);
  }
  absl::Status Reserve(const PrefillJob& job) override { return alone_->Reserve(job); }
  absl::StatusOr<PrefillResult> Run(const PrefillJob& job, const PrefillContext& context) override {
    return alone_->Run(job, context);
  }
  PackLimits pack_limits() const override { return limits_; }
  std::vector<absl::StatusOr<PrefillResult>> RunPacked(absl::Span<const PrefillJob* const> jobs,
                                                       absl::Span<const PrefillContext> contexts) override {
    {
      absl::MutexLock lock(&mutex_);
      std::vector<std::string>& ids = passes_.emplace_back();
      for (const PrefillJob* job : jobs) ids.push_back(job->request_id);
    }
    if (before_pass) before_pass();
    std::vector<absl::StatusOr<PrefillResult>> results;
    for (size_t i = 0; i < jobs.size(); ++i) {
      if (const absl::Status ended = contexts[i].control->status(); !ended.ok()) {
        contexts[i].ended(ended);
        results.push_back(ended);
        continue;
      }
      // Kept: senders may read its memory after the pass.
      used_.push_back(NewBackend());
      const absl::Status reserved = used_.back()->Reserve(*jobs[i]);
      results.push_back(reserved.ok() ? used_.back()->Run(*jobs[i], contexts[i]) : reserved);
    }
    return results;
  }

  // Request ids of each pass so far.
  std::vector<std::vector<std::string>> passes() const {
    absl::MutexLock lock(&mutex_);
    return passes_;
  }

  std::function<void()> before_pass;

 private:
  std::unique_ptr<CpuBackend> NewBackend() const {
    return std::make_unique<CpuBackend>(model_, MakeMemoryShape(*model_, 1, 3, 2), uint64_t{1} << 30);
  }

  const std::shared_ptr<const Model> model_;
  const PackLimits limits_;
  const std::unique_ptr<CpuBackend> alone_;
  std::vector<std::unique_ptr<CpuBackend>> used_;
  mutable absl::Mutex mutex_;
  std::vector<std::vector<std::string>> passes_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_PACKING_BACKEND_H_
