#include "kernels/cuda/policies/dense_below.h"

#include <string>
#include <utility>

#include "kernels/cuda/policies/memory.h"

namespace headwater::kernels {
namespace {

class DenseBelowPolicy final : public CudaPolicy {
 public:
  DenseBelowPolicy(int64_t limit, std::unique_ptr<CudaPolicy> policy)
      : limit_(limit), policy_(std::move(policy)) {}

  size_t MemoryBytes(int64_t num_tokens) const override {
    return num_tokens < limit_ ? 0 : policy_->MemoryBytes(num_tokens);
  }

  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) override {
    dense_ = num_tokens < limit_;
    return dense_ ? CheckPolicyMemory(num_tokens, memory, memory_bytes, 0)
                  : policy_->Begin(num_tokens, memory, memory_bytes, stream);
  }

  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override {
    if (!dense_) return policy_->Select(layer, stream, selection);
    *selection = {};
    return {};
  }

  Status Reselect(const CudaPolicyLayer& layer, const CudaSearchSettings& settings, cudaStream_t stream,
                  CudaSelection* selection) override {
    if (!dense_) return policy_->Reselect(layer, settings, stream, selection);
    *selection = {};
    return InvalidArgument("Reselect() for a prompt of fewer tokens than dense_below_tokens " +
                           std::to_string(limit_));
  }

  bool wants_lse() const override { return !dense_ && policy_->wants_lse(); }

  Status Finish(const CudaPolicyLayer& layer, const float* lse_ln, cudaStream_t stream) override {
    return dense_ ? Status() : policy_->Finish(layer, lse_ln, stream);
  }

 private:
  const int64_t limit_;
  const std::unique_ptr<CudaPolicy> policy_;
  bool dense_ = false;  // of the prompt that has begun
};

}  // namespace

std::unique_ptr<CudaPolicy> DenseBelow(int64_t num_tokens, std::unique_ptr<CudaPolicy> policy) {
  return std::make_unique<DenseBelowPolicy>(num_tokens, std::move(policy));
}

}  // namespace headwater::kernels
