#include "model/tensor_reader.h"

#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#include "base/log.h"
#include "model/json.h"

namespace headwater {

absl::StatusOr<const Tensor*> TensorReader::Take(const std::string& name, const std::vector<int64_t>& shape,
                                                 bool* first) {
  const Tensor* const tensor = checkpoint_.Find(name);
  const std::string wanted = absl::StrCat("shape [", absl::StrJoin(shape, ", "), "]");
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("the checkpoint lacks the tensor ", Quoted(name), ", ", wanted));
  }
  if (tensor->shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), " has shape [",
                                                   absl::StrJoin(tensor->shape, ", "),
                                                   "]; config.json demands ", wanted));
  }
  if (!tensor->element.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), " has dtype ",
                                                   Quoted(tensor->dtype), "; must be F32, F16 or BF16"));
  }
  const bool inserted = used_.insert(name).second;
  if (first != nullptr) *first = inserted;
  return tensor;
}

// transformers 4 ties whatever the file holds, transformers 5 does not tie where the two differ.
absl::Status TensorReader::CheckTiedHead() {
  const Tensor& embedding = *checkpoint_.Find(kEmbeddingName);
  const Tensor* const head = checkpoint_.Find(kHeadName);
  if (head == nullptr) return absl::OkStatus();
  used_.insert(kHeadName);
  const bool equal = head->dtype == embedding.dtype && head->shape == embedding.shape &&
                     std::memcmp(head->data, embedding.data, embedding.bytes) == 0;
  if (equal) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tie_word_embeddings is true, but the tensors ",
                                                 Quoted(kEmbeddingName), " and ", Quoted(kHeadName),
                                                 " differ"));
}

void TensorReader::LogUnused() const {
  int64_t count = 0;
  std::string first;
  for (const auto& [name, tensor] : checkpoint_.tensors()) {
    // Old checkpoints carry the frequencies, which follow from the config.
    if (used_.contains(name) || absl::EndsWith(name, "rotary_emb.inv_freq")) continue;
    if (count++ == 0) first = name;
  }
  if (count == 0) return;
  HW_LOG(WARNING).Field("tensors", count).Field("first", Quoted(first))
      << "tensors that the config does not use";
}

}  // namespace headwater
