// HookedModel: another model, with the test looking in.
#ifndef HW_TESTS_WORKER_HOOKED_MODEL_H_
#define HW_TESTS_WORKER_HOOKED_MODEL_H_

#include <cstdint>
#include <functional>
#include <string>

#include "model/model.h"

namespace headwater::testing {

class HookedModel final : public Model {
 public:
  explicit HookedModel(const Model* model) : model_(model) {}

  // Each may be empty.
  std::function<void(float* hidden)> after_embed;
  std::function<void(int32_t layer)> before_attention;
  std::function<absl::Status(int32_t layer, int64_t begin)> before_attention_status;
  std::function<void(float* k)> after_projection;
  std::function<void(int32_t layer)> after_attention;

  const ModelConfig& config() const override { return model_->config(); }
  const std::string& fingerprint() const override { return model_->fingerprint(); }
  kernels::DType compute() const override { return model_->compute(); }
  uint64_t weight_bytes() const override { return model_->weight_bytes(); }
  kernels::AttentionShape attention_shape() const override { return model_->attention_shape(); }
  int64_t chunk_tokens() const override { return model_->chunk_tokens(); }
  uint64_t scratch_bytes() const override { return model_->scratch_bytes(); }
  absl::Status Embed(absl::Span<const int32_t> tokens, float* hidden) const override {
    const absl::Status status = model_->Embed(tokens, hidden);
    if (after_embed) after_embed(hidden);
    return status;
  }
  absl::Status BeforeAttention(int32_t layer, const float* hidden, int64_t num_tokens, int64_t begin, void* q,
                               void* k, void* v) const override {
    if (before_attention) before_attention(layer);
    if (before_attention_status) {
      const absl::Status wanted = before_attention_status(layer, begin);
      if (!wanted.ok()) return wanted;
    }
    const absl::Status status = model_->BeforeAttention(layer, hidden, num_tokens, begin, q, k, v);
    if (after_projection) after_projection(static_cast<float*>(k));
    return status;
  }
  absl::Status AfterAttention(int32_t layer, const float* attention, int64_t num_tokens,
                              float* hidden) const override {
    if (after_attention) after_attention(layer);
    return model_->AfterAttention(layer, attention, num_tokens, hidden);
  }
  absl::Status Logits(const float* row, float* logits) const override { return model_->Logits(row, logits); }

 private:
  const Model* const model_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_HOOKED_MODEL_H_
