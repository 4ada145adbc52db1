// What benchmarks of a whole prefill share: a prompt of random tokens, and a receiver that costs nothing.
#ifndef HW_BENCH_PREFILL_JOB_H_
#define HW_BENCH_PREFILL_JOB_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <utility>

#include "absl/status/statusor.h"

#include "base/status_macros.h"
#include "kernels/pattern/policy.h"
#include "kvtransfer/sender.h"
#include "model/config.h"
#include "model/kernel_status.h"
#include "worker/prefill.h"

namespace headwater {

// Drops blocks as soon as they are handed over: what is timed is compute.
class DiscardingSender final : public KvSender {
 public:
  absl::Status Submit(const KvBlockId&, const void*, std::function<void()> done) override {
    done();
    return absl::OkStatus();
  }
  absl::Status Finish() override { return absl::OkStatus(); }
  void Cancel() override {}
  absl::Status status() const override { return absl::OkStatus(); }
  KvSenderStats Stats() const override { return {}; }
};

// One rank, blocks of 256 tokens; without a memory plan. density: over 0, policy probe at that forced
// density; else dense. Equal calls give equal prompts.
inline absl::StatusOr<PrefillJob> MakeBenchJob(const ModelConfig& config, int64_t num_tokens,
                                               v1::KvDtype dtype, double density = 0) {
  constexpr uint32_t kBlockTokens = 256;
  PrefillJob job;
  job.request_id = "bench";
  job.epoch = 1;
  std::mt19937 random(1);
  for (int64_t i = 0; i < num_tokens; ++i) {
    job.tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(config.vocab_size)));
  }
  v1::KvLayout layout;
  layout.set_num_layers(static_cast<uint32_t>(config.num_layers));
  layout.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  layout.set_head_dim(static_cast<uint32_t>(config.head_dim));
  layout.set_num_tokens(static_cast<uint64_t>(num_tokens));
  layout.set_block_tokens(kBlockTokens);
  layout.set_dtype(dtype);
  HW_ASSIGN_OR_RETURN(job.partition, PartitionTokens(num_tokens, 1, v1::PARTITION_CONTIGUOUS, kBlockTokens));
  HW_ASSIGN_OR_RETURN(KvGeometry geometry, KvGeometry::Create(layout));
  job.geometry = std::make_shared<const KvGeometry>(std::move(geometry));
  std::unique_ptr<kernels::PatternPolicy> policy;
  HW_RETURN_IF_ERROR(FromKernels(density > 0 ? kernels::MakePolicy("probe", {{"density", density}}, &policy)
                                             : kernels::MakePolicy("dense", {}, &policy),
                                 "policy"));
  job.policy = std::move(policy);
  return job;
}

}  // namespace headwater

#endif  // HW_BENCH_PREFILL_JOB_H_
