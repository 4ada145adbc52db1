#include "model/cuda/cuda_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/quantize.h"
#include "model/cuda/cuda_weights.h"
#include "model/cuda/device_buffer.h"
#include "model/kernel_status.h"
#include "model/safetensors.h"

namespace headwater {
namespace {

using kernels::DType;

constexpr uint64_t kLinearWorkspaceBytes = 32 << 20;
constexpr uint64_t kPartAlignment = 256;

uint64_t Aligned(uint64_t bytes) { return (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment; }

absl::Status Unsupported(const char* what, int64_t value, const char* wanted) {
  return absl::UnimplementedError(absl::StrCat(what, " is ", value, "; the GPU kernels take ", wanted));
}

absl::Status CheckFp8(const char* what, int64_t width) {
  if (width % 16 == 0 && width <= kernels::kMaxQuantizedWidth) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(
      what, " is ", width, "; fp8 linear layers take multiples of 16 up to ", kernels::kMaxQuantizedWidth));
}

absl::Status CheckSupported(const ModelConfig& config, LinearType linear) {
  if (config.head_dim != 64 && config.head_dim != 128)
    return Unsupported("head_dim", config.head_dim, "64 and 128");
  const int32_t group = config.num_q_heads / config.num_kv_heads;
  if (group > 8) return Unsupported("query heads per KV head", group, "at most 8");
  if (config.hidden_size % 8 != 0 || config.hidden_size > kernels::kMaxNormWidth) {
    return Unsupported("hidden_size", config.hidden_size, "multiples of 8 up to 16384");
  }
  if (config.intermediate_size % 8 != 0) {
    return Unsupported("intermediate_size", config.intermediate_size, "multiples of 8");
  }
  if (config.vocab_size % 8 != 0) return Unsupported("vocab_size", config.vocab_size, "multiples of 8");
  if (linear != LinearType::kFP8) return absl::OkStatus();
  HW_RETURN_IF_ERROR(CheckFp8("hidden_size", config.hidden_size));
  HW_RETURN_IF_ERROR(CheckFp8("intermediate_size", config.intermediate_size));
  return CheckFp8("num_q_heads * head_dim", int64_t{config.num_q_heads} * config.head_dim);
}

class CheckpointCudaModel final : public CudaModel {
 public:
  CheckpointCudaModel(ModelConfig config, const CudaModelOptions& options)
      : config_(std::move(config)),
        device_(options.device),
        chunk_tokens_(options.chunk_tokens),
        linear_type_(options.linear) {}

  // load(bytes): the weights, which may take so many bytes; 0: no limit.
  template <typename LoadWeights>
  absl::Status Init(const CudaModelOptions& options, const LoadWeights& load) {
    const Parts parts = Sizes();
    const uint64_t scratch = parts.total() + kLinearWorkspaceBytes;
    if (options.budget_bytes != 0 && scratch > options.budget_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("scratch takes ", scratch, " bytes, ", options.budget_bytes, " are available"));
    }
    HW_ASSIGN_OR_RETURN(weights_, load(options.budget_bytes == 0 ? 0 : options.budget_bytes - scratch));
    HW_ASSIGN_OR_RETURN(scratch_, DeviceBuffer::Allocate(parts.total(), "the model's scratch"));
    char* at = scratch_.data();
    const auto take = [&](uint64_t bytes) { return std::exchange(at, at + bytes); };
    normed_ = take(parts.normed);
    wide_ = take(parts.wide);
    product_ = take(parts.product);
    cos_ = reinterpret_cast<float*>(take(parts.angles));
    sin_ = reinterpret_cast<float*>(take(parts.angles));
    if (fp8()) scale_ = reinterpret_cast<float*>(take(parts.scale));
    kernels::CudaLinearOptions linear;
    linear.workspace_bytes = kLinearWorkspaceBytes;
    return FromKernels(kernels::CudaLinear::Create(linear, &linear_), "cuBLASLt");
  }

  const ModelConfig& config() const override { return config_; }
  const std::string& fingerprint() const override { return weights_.fingerprint; }
  int device() const override { return device_; }
  LinearType linear() const override { return linear_type_; }
  uint64_t weight_bytes() const override { return weights_.memory.bytes(); }
  uint64_t scratch_bytes() const override { return scratch_.bytes() + kLinearWorkspaceBytes; }
  int64_t chunk_tokens() const override { return chunk_tokens_; }

  absl::Status Embed(const int32_t* ids, int64_t num_tokens, float* hidden, cudaStream_t stream) override {
    return FromKernels(kernels::CudaEmbedTokens({weights_.embedding, ids, hidden, DType::kF32, num_tokens,
                                                 config_.vocab_size, config_.hidden_size},
                                                stream),
                       "embedding");
  }

  absl::Status BeforeAttention(int32_t layer, const float* hidden, int64_t num_tokens, int64_t begin,
                               const int32_t* positions, void* q, void* k, void* v,
                               const kernels::CudaBlockStats& stats, cudaStream_t stream) override {
    HW_RETURN_IF_ERROR(CheckCall(layer, num_tokens));
    const CudaLayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
    HW_RETURN_IF_ERROR(Norm(hidden, weights.input_norm, num_tokens, scale_, stream));
    HW_RETURN_IF_ERROR(Linear("QKV projection", normed_, config_.hidden_size, weights.qkv, wide_,
                              q_width() + 2 * kv_width(), DType::kBF16, num_tokens, stream));
    kernels::CudaRopeTableArgs rope;
    std::copy(config_.rope.inverse.begin(), config_.rope.inverse.end(), rope.inverse);
    rope.attention_factor = config_.rope.attention_factor;
    rope.head_dim = config_.head_dim;
    rope.num_tokens = num_tokens;
    rope.begin = begin;
    rope.positions_i32 = positions;
    rope.cos = cos_;
    rope.sin = sin_;
    HW_RETURN_IF_ERROR(FromKernels(kernels::CudaRopeTable(rope, stream), "rotation"));
    kernels::CudaSplitQkvArgs split;
    split.qkv = wide_;
    split.num_tokens = num_tokens;
    split.num_q_heads = config_.num_q_heads;
    split.num_kv_heads = config_.num_kv_heads;
    split.head_dim = config_.head_dim;
    split.q_norm = weights.q_norm;
    split.k_norm = weights.k_norm;
    split.norm_dtype = DType::kF32;
    split.epsilon = config_.rms_norm_epsilon;
    split.cos = cos_;
    split.sin = sin_;
    split.q = q;
    split.k = k;
    split.v = v;
    split.stats = stats;
    split.first_token = begin;
    return FromKernels(kernels::CudaSplitQkv(split, stream), absl::StrCat("layer ", layer, ": Q, K and V"));
  }

  absl::Status AfterAttention(int32_t layer, const void* attention, int64_t num_tokens, float* hidden,
                              int64_t* bad_row, cudaStream_t stream) override {
    HW_RETURN_IF_ERROR(CheckCall(layer, num_tokens));
    const CudaLayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
    if (fp8()) {
      HW_RETURN_IF_ERROR(
          FromKernels(kernels::CudaQuantizeRows({attention, product_, scale_, num_tokens, q_width()}, stream),
                      "attention to fp8"));
      attention = product_;
    }
    HW_RETURN_IF_ERROR(Linear("output projection", attention, q_width(), weights.output, hidden,
                              config_.hidden_size, DType::kF32, num_tokens, stream));
    HW_RETURN_IF_ERROR(Norm(hidden, weights.post_attention_norm, num_tokens, scale_, stream));
    HW_RETURN_IF_ERROR(Linear("gate and up", normed_, config_.hidden_size, weights.gate_up, wide_,
                              2 * int64_t{config_.intermediate_size}, DType::kBF16, num_tokens, stream));
    HW_RETURN_IF_ERROR(FromKernels(
        kernels::CudaSiluMul({wide_, product_, num_tokens, config_.intermediate_size, scale_}, stream),
        "SiLU"));
    HW_RETURN_IF_ERROR(Linear("down", product_, config_.intermediate_size, weights.down, hidden,
                              config_.hidden_size, DType::kF32, num_tokens, stream));
    return FromKernels(kernels::CudaFirstNonFiniteRow(
                           {hidden, DType::kF32, num_tokens, config_.hidden_size, bad_row}, stream),
                       "the check of the hidden state");
  }

  absl::Status Logits(const float* hidden, absl::Span<const int64_t> rows, float* logits,
                      cudaStream_t stream) override {
    const auto count = static_cast<int64_t>(rows.size()), width = int64_t{config_.hidden_size};
    HW_RETURN_IF_ERROR(CheckCall(0, 2 * count));  // normed_ may have room for e4m3 only
    for (int64_t i = 0; i < count; ++i) {
      HW_RETURN_IF_ERROR(Norm(hidden + rows[static_cast<size_t>(i)] * width, weights_.final_norm, 1, nullptr,
                              stream, normed_ + i * width * 2));
    }
    return FromKernels(linear_->Run({normed_, weights_.lm_head, nullptr, logits, DType::kF32, false, count,
                                     width, config_.vocab_size},
                                    stream),
                       "LM head");
  }

 private:
  // Scratch of one chunk, in bytes.
  struct Parts {
    uint64_t normed = 0;
    uint64_t wide = 0;     // QKV, or gate and up
    uint64_t product = 0;  // fp8: also the attention's output
    uint64_t angles = 0;   // cos and sin each
    uint64_t scale = 0;    // fp8: of what a linear layer reads
    uint64_t total() const { return normed + wide + product + 2 * angles + scale; }
  };
  Parts Sizes() const {
    const auto rows = [&](int64_t width, int64_t size) {
      return Aligned(static_cast<uint64_t>(chunk_tokens_) * static_cast<uint64_t>(width * size));
    };
    const int64_t inner = config_.intermediate_size;
    Parts parts;
    // The bf16 row of Logits() fits the e4m3 rows of the fewest tokens.
    parts.normed = rows(config_.hidden_size, fp8() ? 1 : 2);
    parts.wide = rows(std::max(q_width() + 2 * kv_width(), 2 * inner), 2);
    parts.product = fp8() ? rows(std::max(inner, q_width()), 1) : rows(inner, 2);
    parts.angles = rows(config_.head_dim / 2, 4);
    parts.scale = fp8() ? rows(1, 4) : 0;
    return parts;
  }
  bool fp8() const { return linear_type_ == LinearType::kFP8; }

  absl::Status CheckCall(int32_t layer, int64_t num_tokens) const {
    if (layer < 0 || layer >= config_.num_layers) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer is ", layer, "; must be below ", config_.num_layers));
    }
    if (num_tokens < 0 || num_tokens > chunk_tokens_) {
      return absl::InvalidArgumentError(
          absl::StrCat("num_tokens is ", num_tokens, "; at most ", chunk_tokens_));
    }
    return absl::OkStatus();
  }

  // Into normed_, or `out`; scale: null, or e4m3 with it.
  absl::Status Norm(const float* x, const float* weight, int64_t num_tokens, float* scale,
                    cudaStream_t stream, void* out = nullptr) {
    kernels::CudaRmsNormArgs args;
    args.x = const_cast<float*>(x);  // written only with a delta
    args.x_dtype = DType::kF32;
    args.weight = weight;
    args.weight_dtype = DType::kF32;
    args.out = out != nullptr ? out : normed_;
    args.epsilon = config_.rms_norm_epsilon;
    args.num_tokens = num_tokens;
    args.width = config_.hidden_size;
    args.scale = scale;
    return FromKernels(kernels::CudaRmsNorm(args, stream), "norm");
  }

  // A layer's: to bf16, or added to f32. x: bf16, or e4m3 with scale_.
  absl::Status Linear(const char* what, const void* x, int64_t in, const CudaLinearWeights& weights, void* y,
                      int64_t out, DType y_dtype, int64_t num_tokens, cudaStream_t stream) {
    return FromKernels(linear_->Run({x, weights.weight, weights.bias, y, y_dtype, y_dtype == DType::kF32,
                                     num_tokens, in, out, scale_, weights.scale},
                                    stream),
                       what);
  }

  int64_t q_width() const { return int64_t{config_.num_q_heads} * config_.head_dim; }
  int64_t kv_width() const { return int64_t{config_.num_kv_heads} * config_.head_dim; }

  const ModelConfig config_;
  const int device_;
  const int64_t chunk_tokens_;
  const LinearType linear_type_;
  CudaWeights weights_;
  DeviceBuffer scratch_;
  char* normed_ = nullptr;
  char* wide_ = nullptr;
  char* product_ = nullptr;
  float* cos_ = nullptr;
  float* sin_ = nullptr;
  float* scale_ = nullptr;  // null: bf16
  std::unique_ptr<kernels::CudaLinear> linear_;
};

}  // namespace

namespace {

template <typename LoadWeights>
absl::StatusOr<std::unique_ptr<CudaModel>> Make(ModelConfig config, const CudaModelOptions& options,
                                                const LoadWeights& load) {
  HW_RETURN_IF_ERROR(CheckSupported(config, options.linear));
  HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(options.device), absl::StrCat("device ", options.device)));
  auto model = std::make_unique<CheckpointCudaModel>(std::move(config), options);
  HW_RETURN_IF_ERROR(model->Init(options, load));
  return std::unique_ptr<CudaModel>(std::move(model));
}

absl::Status CheckOptions(const CudaModelOptions& options) {
  if (options.chunk_tokens >= 128 && options.chunk_tokens % 128 == 0 && options.chunk_tokens <= (1 << 20)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("chunk_tokens is ", options.chunk_tokens, "; a multiple of 128 up to 1048576 is wanted"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaModel>> CudaModel::Load(const CudaModelOptions& options) {
  HW_RETURN_IF_ERROR(CheckOptions(options));
  HW_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(options.directory));
  return Make(config, options, [&](uint64_t budget) -> absl::StatusOr<CudaWeights> {
    HW_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(options.directory));
    return LoadCudaWeights(config, *checkpoint, options.linear, options.num_threads, budget);
  });
}

absl::StatusOr<std::unique_ptr<CudaModel>> CudaModel::Random(const ModelConfig& config,
                                                             const CudaModelOptions& options, uint32_t seed) {
  HW_RETURN_IF_ERROR(CheckOptions(options));
  return Make(config, options, [&](uint64_t budget) -> absl::StatusOr<CudaWeights> {
    if (const uint64_t bytes = CudaWeightBytes(config, options.linear); budget != 0 && bytes > budget) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the weights take ", bytes, " bytes, ", budget, " are available to them"));
    }
    return RandomCudaWeights(config, options.linear, seed);
  });
}

}  // namespace headwater
