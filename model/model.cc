#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "kernels/ops/layer_ops.h"
#include "model/kernel_status.h"
#include "model/safetensors.h"
#include "model/scratch.h"
#include "model/weights.h"

namespace headwater {
namespace {

using kernels::DType;

constexpr int64_t kChunkTokens = 512;

// kernels::Convert() with the calling thread's team.
void ConvertRows(const float* from, int64_t num_rows, int64_t width, DType to_dtype, void* to) {
  const int64_t row_bytes = width * static_cast<int64_t>(kernels::SizeOf(to_dtype));
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < num_rows; ++row) {
    kernels::Convert(from + row * width, DType::kF32, static_cast<uint8_t*>(to) + row * row_bytes, to_dtype,
                     static_cast<size_t>(width));
  }
}

class CheckpointModel : public Model {
 public:
  CheckpointModel(ModelConfig config, DType compute, ModelWeights weights)
      : config_(std::move(config)), compute_(compute), weights_(std::move(weights)) {}

  const ModelConfig& config() const override { return config_; }
  const std::string& fingerprint() const override { return weights_.fingerprint; }
  DType compute() const override { return compute_; }
  uint64_t weight_bytes() const override { return weights_.bytes; }
  kernels::AttentionShape attention_shape() const override;
  int64_t chunk_tokens() const override { return kChunkTokens; }
  uint64_t scratch_bytes() const override {
    return std::max(BeforeBytes(kChunkTokens).total, AfterBytes(kChunkTokens).total);
  }

  absl::Status Embed(absl::Span<const int32_t> tokens, float* hidden) const override;
  absl::Status BeforeAttention(int32_t layer, const float* hidden, int64_t num_tokens, int64_t begin, void* q,
                               void* k, void* v) const override;
  absl::Status AfterAttention(int32_t layer, const float* attention, int64_t num_tokens,
                              float* hidden) const override;
  absl::Status Logits(const float* hidden_row, float* logits) const override;

 private:
  // Scratch of one chunk, in bytes.
  struct BeforeSizes {
    uint64_t normed = 0;
    uint64_t qkv = 0;
    uint64_t angles = 0;  // cos and sin each
    uint64_t total = 0;
  };
  struct AfterSizes {
    uint64_t input = 0;  // of a linear layer: normed rows, or attention in bf16
    uint64_t gate_up = 0;
    uint64_t product = 0;
    uint64_t total = 0;
  };
  BeforeSizes BeforeBytes(int64_t num_tokens) const;
  AfterSizes AfterBytes(int64_t num_tokens) const;

  // One chunk; `input`, `gate_up` and `product` are scratch.
  absl::Status AfterChunk(const LayerWeights& layer, const float* attention, int64_t num_tokens, void* input,
                          void* gate_up, void* product, float* hidden) const;
  absl::Status CheckLayer(int32_t layer, int64_t num_tokens) const;

  int64_t q_width() const { return int64_t{config_.num_q_heads} * config_.head_dim; }
  int64_t kv_width() const { return int64_t{config_.num_kv_heads} * config_.head_dim; }
  int64_t element_bytes() const { return static_cast<int64_t>(kernels::SizeOf(compute_)); }

  const ModelConfig config_;
  const DType compute_;
  const ModelWeights weights_;
  mutable ScratchPool scratch_;
};

kernels::AttentionShape CheckpointModel::attention_shape() const {
  kernels::AttentionShape shape;
  shape.num_q_heads = config_.num_q_heads;
  shape.num_kv_heads = config_.num_kv_heads;
  shape.head_dim = config_.head_dim;
  shape.softmax_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(config_.head_dim)));
  return shape;
}

CheckpointModel::BeforeSizes CheckpointModel::BeforeBytes(int64_t num_tokens) const {
  const int64_t rows = std::min(num_tokens, kChunkTokens);
  BeforeSizes sizes;
  sizes.normed = AlignedBytes(rows * config_.hidden_size * element_bytes());
  sizes.qkv = AlignedBytes(rows * (q_width() + 2 * kv_width()) * sizeof(float));
  sizes.angles = AlignedBytes(rows * (config_.head_dim / 2) * sizeof(float));
  sizes.total = sizes.normed + sizes.qkv + 2 * sizes.angles;
  return sizes;
}

CheckpointModel::AfterSizes CheckpointModel::AfterBytes(int64_t num_tokens) const {
  const int64_t rows = std::min(num_tokens, kChunkTokens);
  const int64_t inner = config_.intermediate_size;
  AfterSizes sizes;
  sizes.input = AlignedBytes(rows * std::max<int64_t>(config_.hidden_size, q_width()) * element_bytes());
  sizes.gate_up = AlignedBytes(rows * 2 * inner * element_bytes());
  sizes.product = AlignedBytes(rows * inner * element_bytes());
  sizes.total = sizes.input + sizes.gate_up + sizes.product;
  return sizes;
}

absl::Status CheckpointModel::CheckLayer(int32_t layer, int64_t num_tokens) const {
  if (layer < 0 || layer >= config_.num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer is ", layer, "; must be below ", config_.num_layers));
  }
  if (num_tokens < 0) return absl::InvalidArgumentError(absl::StrCat("num_tokens is ", num_tokens));
  return absl::OkStatus();
}

absl::Status CheckpointModel::Embed(absl::Span<const int32_t> tokens, float* hidden) const {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < config_.vocab_size) continue;
    return absl::OutOfRangeError(absl::StrCat("token ", i, " has id ", tokens[i], "; must be from 0 to ",
                                              config_.vocab_size - 1, " (vocab_size ", config_.vocab_size,
                                              ")"));
  }
  kernels::EmbedTokens(weights_.embedding, weights_.embedding_dtype, config_.hidden_size, tokens.data(),
                       static_cast<int64_t>(tokens.size()), hidden);
  return absl::OkStatus();
}

absl::Status CheckpointModel::BeforeAttention(int32_t layer, const float* hidden, int64_t num_tokens,
                                              int64_t begin, void* q, void* k, void* v) const {
  HW_RETURN_IF_ERROR(CheckLayer(layer, num_tokens));
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  const BeforeSizes sizes = BeforeBytes(num_tokens);
  HW_ASSIGN_OR_RETURN(ScratchPool::Loan scratch, scratch_.Acquire(sizes.total));
  void* const normed = scratch.Part(sizes.normed);
  float* const qkv = static_cast<float*>(scratch.Part(sizes.qkv));
  float* const cos = static_cast<float*>(scratch.Part(sizes.angles));
  float* const sin = static_cast<float*>(scratch.Part(sizes.angles));

  kernels::SplitQkvArgs args;
  args.qkv = qkv;
  args.num_q_heads = config_.num_q_heads;
  args.num_kv_heads = config_.num_kv_heads;
  args.head_dim = config_.head_dim;
  args.q_norm = weights.q_norm.empty() ? nullptr : weights.q_norm.data();
  args.k_norm = weights.k_norm.empty() ? nullptr : weights.k_norm.data();
  args.epsilon = config_.rms_norm_epsilon;
  args.cos = cos;
  args.sin = sin;
  args.out_dtype = compute_;
  for (int64_t done = 0; done < num_tokens; done += kChunkTokens) {
    const int64_t count = std::min(kChunkTokens, num_tokens - done);
    kernels::RmsNorm(hidden + done * config_.hidden_size, weights.input_norm.data(), config_.rms_norm_epsilon,
                     count, config_.hidden_size, normed, compute_);
    HW_RETURN_IF_ERROR(FromKernels(weights.qkv->Run(normed, count, qkv, DType::kF32, false),
                                   absl::StrCat("layer ", layer, ": QKV projection")));
    kernels::RopeTable(config_.rope, begin + done, count, cos, sin);
    args.num_tokens = count;
    args.q = static_cast<uint8_t*>(q) + done * q_width() * element_bytes();
    args.k = static_cast<uint8_t*>(k) + done * kv_width() * element_bytes();
    args.v = static_cast<uint8_t*>(v) + done * kv_width() * element_bytes();
    kernels::SplitQkv(args);
  }
  return absl::OkStatus();
}

absl::Status CheckpointModel::AfterChunk(const LayerWeights& layer, const float* attention,
                                         int64_t num_tokens, void* input, void* gate_up, void* product,
                                         float* hidden) const {
  const void* attention_input = attention;
  if (compute_ != DType::kF32) {
    ConvertRows(attention, num_tokens, q_width(), compute_, input);
    attention_input = input;
  }
  HW_RETURN_IF_ERROR(FromKernels(layer.output->Run(attention_input, num_tokens, hidden, DType::kF32, true),
                                 "output projection"));
  kernels::RmsNorm(hidden, layer.post_attention_norm.data(), config_.rms_norm_epsilon, num_tokens,
                   config_.hidden_size, input, compute_);
  HW_RETURN_IF_ERROR(
      FromKernels(layer.gate_up->Run(input, num_tokens, gate_up, compute_, false), "gate and up"));
  kernels::SiluMul(gate_up, compute_, num_tokens, config_.intermediate_size, product, compute_);
  return FromKernels(layer.down->Run(product, num_tokens, hidden, DType::kF32, true), "down");
}

absl::Status CheckpointModel::AfterAttention(int32_t layer, const float* attention, int64_t num_tokens,
                                             float* hidden) const {
  HW_RETURN_IF_ERROR(CheckLayer(layer, num_tokens));
  const AfterSizes sizes = AfterBytes(num_tokens);
  HW_ASSIGN_OR_RETURN(ScratchPool::Loan scratch, scratch_.Acquire(sizes.total));
  void* const input = scratch.Part(sizes.input);
  void* const gate_up = scratch.Part(sizes.gate_up);
  void* const product = scratch.Part(sizes.product);
  for (int64_t done = 0; done < num_tokens; done += kChunkTokens) {
    const int64_t count = std::min(kChunkTokens, num_tokens - done);
    float* const rows = hidden + done * config_.hidden_size;
    const absl::Status status =
        AfterChunk(weights_.layers[static_cast<size_t>(layer)], attention + done * q_width(), count, input,
                   gate_up, product, rows);
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat("layer ", layer, ": ", status.message()));
    }
    const int64_t bad = kernels::FirstNonFiniteRow(rows, count, config_.hidden_size);
    if (bad >= 0) {
      return absl::InternalError(
          absl::StrCat("non-finite hidden state after layer ", layer, " in row ", done + bad));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckpointModel::Logits(const float* hidden_row, float* logits) const {
  const uint64_t bytes = AlignedBytes(config_.hidden_size * element_bytes());
  HW_ASSIGN_OR_RETURN(ScratchPool::Loan scratch, scratch_.Acquire(bytes));
  void* const normed = scratch.Part(bytes);
  kernels::RmsNorm(hidden_row, weights_.final_norm.data(), config_.rms_norm_epsilon, 1, config_.hidden_size,
                   normed, compute_);
  HW_RETURN_IF_ERROR(FromKernels(weights_.lm_head->Run(normed, 1, logits, DType::kF32, false), "LM head"));
  if (kernels::FirstNonFiniteRow(logits, 1, config_.vocab_size) >= 0) {
    return absl::InternalError("non-finite logits");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> Model::Load(const ModelOptions& options) {
  if (options.compute != DType::kF32 && options.compute != DType::kBF16) {
    return absl::InvalidArgumentError(
        absl::StrCat("compute type is ", kernels::NameOf(options.compute), "; must be f32 or bf16"));
  }
  HW_ASSIGN_OR_RETURN(ModelConfig config, ReadModelConfig(options.directory));
  HW_ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open(options.directory));
  HW_ASSIGN_OR_RETURN(ModelWeights weights, LoadWeights(config, std::move(checkpoint), options.compute,
                                                        options.weight_budget_bytes));
  return std::unique_ptr<Model>(new CheckpointModel(std::move(config), options.compute, std::move(weights)));
}

}  // namespace headwater
