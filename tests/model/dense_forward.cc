#include "tests/model/dense_forward.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/status_macros.h"
#include "kernels/attention/attention.h"
#include "model/kernel_status.h"
#include "tests/model/checkpoint_files.h"

namespace headwater::testing {
namespace {

std::vector<float> ToFloats(const std::vector<uint8_t>& bytes, kernels::DType dtype) {
  std::vector<float> values(bytes.size() / kernels::SizeOf(dtype));
  kernels::Convert(bytes.data(), dtype, values.data(), kernels::DType::kF32, values.size());
  return values;
}

template <typename T>
std::vector<T> ElementsOf(const OwnedTensors& tensors, const std::string& name) {
  const std::string& bytes = tensors.at(name).bytes;
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

}  // namespace

absl::StatusOr<DenseResult> ForwardDense(const Model& model, absl::Span<const int32_t> tokens) {
  const ModelConfig& config = model.config();
  const kernels::AttentionShape shape = model.attention_shape();
  const int64_t count = static_cast<int64_t>(tokens.size());
  const size_t q_elements = tokens.size() * config.num_q_heads * config.head_dim;
  const size_t kv_elements = tokens.size() * config.num_kv_heads * config.head_dim;
  const size_t element_bytes = kernels::SizeOf(model.compute());
  std::vector<uint8_t> q(q_elements * element_bytes);
  std::vector<uint8_t> k(kv_elements * element_bytes);
  std::vector<uint8_t> v(kv_elements * element_bytes);
  std::vector<float> attention(q_elements);
  std::vector<float> lse(tokens.size() * config.num_q_heads);
  std::vector<float> hidden(tokens.size() * config.hidden_size);
  const kernels::BlockIndex index =
      kernels::DenseBlockIndex(0, (count + kernels::kQueryTileTokens - 1) / kernels::kQueryTileTokens);

  DenseResult result;
  HW_RETURN_IF_ERROR(model.Embed(tokens, hidden.data()));
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    HW_RETURN_IF_ERROR(model.BeforeAttention(layer, hidden.data(), count, 0, q.data(), k.data(), v.data()));
    const kernels::AttentionState state = {attention.data(), lse.data()};
    kernels::ResetAttentionState(shape, count, state);
    HW_RETURN_IF_ERROR(
        FromKernels(kernels::SparseAttention(shape, {q.data(), model.compute(), 0, count},
                                             {k.data(), v.data(), model.compute(), 0, count}, index, state),
                    "attention"));
    HW_RETURN_IF_ERROR(model.AfterAttention(layer, attention.data(), count, hidden.data()));
    result.k.push_back(ToFloats(k, model.compute()));
    result.v.push_back(ToFloats(v, model.compute()));
  }
  result.logits.resize(config.vocab_size);
  HW_RETURN_IF_ERROR(
      model.Logits(hidden.data() + (tokens.size() - 1) * config.hidden_size, result.logits.data()));
  return result;
}

std::string GoldenPath(absl::string_view name) {
  // The variable: for test programs that run away from their checkout.
  const char* const moved = std::getenv("HW_GOLDEN_DIR");
  return absl::StrCat(moved != nullptr ? moved : HW_GOLDEN_DIR, "/", name);
}

Golden ReadGolden(absl::string_view name) {
  Golden golden;
  golden.directory = GoldenPath(name);
  const OwnedTensors tensors = ReadTensors(golden.directory + "/golden.safetensors");
  golden.tokens = ElementsOf<int32_t>(tensors, "tokens");
  golden.expected.logits = ElementsOf<float>(tensors, "logits");
  for (int layer = 0; tensors.contains(absl::StrCat("k.", layer)); ++layer) {
    golden.expected.k.push_back(ElementsOf<float>(tensors, absl::StrCat("k.", layer)));
    golden.expected.v.push_back(ElementsOf<float>(tensors, absl::StrCat("v.", layer)));
  }
  HW_CHECK(!golden.tokens.empty() && !golden.expected.k.empty());
  return golden;
}

std::vector<std::string> GoldenNames() {
  return {"llama", "llama_d128", "llama_linear", "qwen2", "qwen3", "qwen3_d64", "qwen3_yarn"};
}

double RelativeError(absl::Span<const float> a, absl::Span<const float> b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double difference = 0;
  double norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double delta = static_cast<double>(a[i]) - b[i];
    difference += delta * delta;
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(difference / norm);
}

}  // namespace headwater::testing
