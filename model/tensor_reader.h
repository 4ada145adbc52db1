// TensorReader: the tensors that a config demands, checked as they are taken from a checkpoint.
#ifndef HW_MODEL_TENSOR_READER_H_
#define HW_MODEL_TENSOR_READER_H_

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "model/safetensors.h"

namespace headwater {

inline constexpr char kEmbeddingName[] = "model.embed_tokens.weight";
inline constexpr char kHeadName[] = "lm_head.weight";

class TensorReader {
 public:
  // The checkpoint must outlive it.
  explicit TensorReader(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  // INVALID_ARGUMENT names the tensor: it is missing, or has another shape or type than F32, F16 and BF16.
  // *first (may be null): whether it was not taken before.
  absl::StatusOr<const Tensor*> Take(const std::string& name, const std::vector<int64_t>& shape,
                                     bool* first = nullptr);

  // Where the config ties the LM head to the embedding, which has been taken: INVALID_ARGUMENT if the
  // checkpoint has a head that differs from it.
  absl::Status CheckTiedHead();

  // Warns of tensors that nobody has taken.
  void LogUnused() const;

 private:
  const Checkpoint& checkpoint_;
  std::set<std::string, std::less<>> used_;
};

}  // namespace headwater

#endif  // HW_MODEL_TENSOR_READER_H_
