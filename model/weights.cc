#include "model/weights.h"

#include <cstring>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "model/kernel_status.h"
#include "model/tensor_reader.h"

namespace headwater {
namespace {

using kernels::DType;

struct LinearSource {
  std::string name;  // without ".weight" and ".bias"
  int64_t rows = 0;
  bool bias = false;
};

class Loader {
 public:
  Loader(const ModelConfig& config, const Checkpoint& checkpoint, DType compute, uint64_t budget_bytes)
      : config_(config),
        checkpoint_(checkpoint),
        compute_(compute),
        budget_bytes_(budget_bytes),
        reader_(checkpoint) {}

  absl::Status LoadAll(ModelWeights* weights);

 private:
  absl::StatusOr<const Tensor*> Take(const std::string& name, const std::vector<int64_t>& shape) {
    bool first = false;
    HW_ASSIGN_OR_RETURN(const Tensor* const tensor, reader_.Take(name, shape, &first));
    if (first) fingerprint_.Add(name, *tensor);
    return tensor;
  }
  absl::Status ReadVector(const std::string& name, int64_t size, std::vector<float>* out);
  absl::Status LoadVector(const std::string& name, int64_t size, std::vector<float>* out);
  absl::Status LoadLinear(const std::vector<LinearSource>& sources, int64_t in_features,
                          std::unique_ptr<kernels::Linear>* linear);
  absl::Status LoadLayer(int32_t layer, LayerWeights* out);
  absl::Status LoadEmbedding(ModelWeights* weights);
  absl::Status LoadHead(ModelWeights* weights);
  absl::Status CheckBudget() const;

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  const DType compute_;
  const uint64_t budget_bytes_;
  uint64_t bytes_ = 0;
  Fingerprint fingerprint_;
  TensorReader reader_;
};

bool IsAligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % kernels::SizeOf(*tensor.element) == 0;
}

// The tensor's bytes at an address that suits its type: its own, or a copy in `copy`.
const void* AlignedData(const Tensor& tensor, std::vector<uint8_t>* copy) {
  if (IsAligned(tensor)) return tensor.data;
  copy->assign(tensor.data, tensor.data + tensor.bytes);
  return copy->data();
}

absl::Status OverBudget(uint64_t asked, uint64_t budget, absl::string_view what) {
  return absl::ResourceExhaustedError(
      absl::StrCat("the weights take ", what, asked, " bytes, ", budget, " are available to them"));
}

absl::Status Loader::ReadVector(const std::string& name, int64_t size, std::vector<float>* out) {
  HW_ASSIGN_OR_RETURN(const Tensor* const tensor, Take(name, {size}));
  std::vector<uint8_t> copy;
  out->resize(static_cast<size_t>(size));
  kernels::Convert(AlignedData(*tensor, &copy), *tensor->element, out->data(), DType::kF32, out->size());
  return absl::OkStatus();
}

absl::Status Loader::LoadVector(const std::string& name, int64_t size, std::vector<float>* out) {
  HW_RETURN_IF_ERROR(ReadVector(name, size, out));
  bytes_ += out->size() * sizeof(float);
  return absl::OkStatus();
}

absl::Status Loader::LoadLinear(const std::vector<LinearSource>& sources, int64_t in_features,
                                std::unique_ptr<kernels::Linear>* linear) {
  kernels::LinearSpec spec;
  spec.in_features = in_features;
  spec.compute = compute_;
  std::vector<const Tensor*> tensors;
  std::vector<std::vector<uint8_t>> copies(sources.size());
  std::vector<float> bias;
  for (size_t i = 0; i < sources.size(); ++i) {
    const LinearSource& source = sources[i];
    HW_ASSIGN_OR_RETURN(const Tensor* const tensor,
                        Take(absl::StrCat(source.name, ".weight"), {source.rows, in_features}));
    tensors.push_back(tensor);
    spec.weight.push_back({AlignedData(*tensor, &copies[i]), *tensor->element, source.rows});
    if (!source.bias) continue;
    std::vector<float> part;
    HW_RETURN_IF_ERROR(ReadVector(absl::StrCat(source.name, ".bias"), source.rows, &part));
    bias.insert(bias.end(), part.begin(), part.end());
  }
  if (!bias.empty()) spec.bias = bias.data();
  HW_RETURN_IF_ERROR(FromKernels(kernels::Linear::Create(spec, linear), sources.front().name));
  bytes_ += (*linear)->packed_bytes();
  // What is packed is not read again: give the pages back, so that a load needs little more than its result.
  for (const Tensor* tensor : tensors) {
    if (tensor->data != checkpoint_.Find(kEmbeddingName)->data) ReleasePages(tensor->data, tensor->bytes);
  }
  return absl::OkStatus();
}

absl::Status Loader::LoadLayer(int32_t layer, LayerWeights* out) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const std::string attention = absl::StrCat(prefix, "self_attn.");
  const std::string mlp = absl::StrCat(prefix, "mlp.");
  const int64_t hidden = config_.hidden_size;
  const int64_t inner = config_.intermediate_size;
  const int64_t head_dim = config_.head_dim;
  const int64_t q_rows = config_.num_q_heads * head_dim;
  const int64_t kv_rows = config_.num_kv_heads * head_dim;

  HW_RETURN_IF_ERROR(LoadVector(absl::StrCat(prefix, "input_layernorm.weight"), hidden, &out->input_norm));
  HW_RETURN_IF_ERROR(LoadLinear({{absl::StrCat(attention, "q_proj"), q_rows, config_.qkv_bias},
                                 {absl::StrCat(attention, "k_proj"), kv_rows, config_.qkv_bias},
                                 {absl::StrCat(attention, "v_proj"), kv_rows, config_.qkv_bias}},
                                hidden, &out->qkv));
  if (config_.qk_norm) {
    HW_RETURN_IF_ERROR(LoadVector(absl::StrCat(attention, "q_norm.weight"), head_dim, &out->q_norm));
    HW_RETURN_IF_ERROR(LoadVector(absl::StrCat(attention, "k_norm.weight"), head_dim, &out->k_norm));
  }
  HW_RETURN_IF_ERROR(
      LoadLinear({{absl::StrCat(attention, "o_proj"), hidden, config_.output_bias}}, q_rows, &out->output));
  HW_RETURN_IF_ERROR(
      LoadVector(absl::StrCat(prefix, "post_attention_layernorm.weight"), hidden, &out->post_attention_norm));
  HW_RETURN_IF_ERROR(LoadLinear({{absl::StrCat(mlp, "gate_proj"), inner, config_.mlp_bias},
                                 {absl::StrCat(mlp, "up_proj"), inner, config_.mlp_bias}},
                                hidden, &out->gate_up));
  HW_RETURN_IF_ERROR(
      LoadLinear({{absl::StrCat(mlp, "down_proj"), hidden, config_.mlp_bias}}, inner, &out->down));
  return CheckBudget();
}

absl::Status Loader::LoadEmbedding(ModelWeights* weights) {
  HW_ASSIGN_OR_RETURN(const Tensor* const tensor,
                      Take(kEmbeddingName, {config_.vocab_size, config_.hidden_size}));
  weights->embedding = AlignedData(*tensor, &weights->embedding_copy);
  weights->embedding_dtype = *tensor->element;
  bytes_ += weights->embedding_copy.size();
  if (config_.tied_embeddings) HW_RETURN_IF_ERROR(reader_.CheckTiedHead());
  return absl::OkStatus();
}

absl::Status Loader::LoadHead(ModelWeights* weights) {
  const std::string name = config_.tied_embeddings ? kEmbeddingName : kHeadName;
  const std::string stem = name.substr(0, name.size() - std::strlen(".weight"));
  return LoadLinear({{stem, config_.vocab_size, false}}, config_.hidden_size, &weights->lm_head);
}

absl::Status Loader::CheckBudget() const {
  if (budget_bytes_ == 0 || bytes_ <= budget_bytes_) return absl::OkStatus();
  return OverBudget(bytes_, budget_bytes_, "at least ");
}

absl::Status Loader::LoadAll(ModelWeights* weights) {
  HW_RETURN_IF_ERROR(LoadEmbedding(weights));
  weights->layers.resize(static_cast<size_t>(config_.num_layers));
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
    HW_RETURN_IF_ERROR(LoadLayer(layer, &weights->layers[static_cast<size_t>(layer)]));
  }
  HW_RETURN_IF_ERROR(LoadVector("model.norm.weight", config_.hidden_size, &weights->final_norm));
  HW_RETURN_IF_ERROR(LoadHead(weights));
  HW_RETURN_IF_ERROR(CheckBudget());
  reader_.LogUnused();
  weights->bytes = bytes_;
  weights->fingerprint = fingerprint_.Finish(config_);
  return absl::OkStatus();
}

}  // namespace

uint64_t PlannedWeightBytes(const ModelConfig& config, DType compute) {
  const auto size = [](int32_t value) { return static_cast<uint64_t>(value); };
  const uint64_t hidden = size(config.hidden_size);
  const uint64_t inner = size(config.intermediate_size);
  const uint64_t q_rows = size(config.num_q_heads) * size(config.head_dim);
  const uint64_t qkv_rows = q_rows + 2 * size(config.num_kv_heads) * size(config.head_dim);
  const uint64_t layer_matrices = qkv_rows * hidden + q_rows * hidden + 3 * inner * hidden;
  uint64_t layer_vectors = 2 * hidden;
  if (config.qkv_bias) layer_vectors += qkv_rows;
  if (config.output_bias) layer_vectors += hidden;
  if (config.mlp_bias) layer_vectors += 2 * inner + hidden;
  if (config.qk_norm) layer_vectors += 2 * size(config.head_dim);
  const uint64_t layers = size(config.num_layers);
  return (layers * layer_matrices + size(config.vocab_size) * hidden) * kernels::SizeOf(compute) +
         (layers * layer_vectors + hidden) * sizeof(float);
}

absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config, std::unique_ptr<Checkpoint> checkpoint,
                                         DType compute, uint64_t budget_bytes) {
  const uint64_t planned = PlannedWeightBytes(config, compute);
  if (budget_bytes != 0 && planned > budget_bytes) return OverBudget(planned, budget_bytes, "");
  ModelWeights weights;
  try {
    Loader loader(config, *checkpoint, compute, budget_bytes);
    HW_RETURN_IF_ERROR(loader.LoadAll(&weights));
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for weights of ", planned, " bytes"));
  }
  weights.checkpoint = std::move(checkpoint);
  return weights;
}

}  // namespace headwater
