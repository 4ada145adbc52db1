// The whole prompt through a model in one process, with dense attention: what the distributed paths are
// compared with.
#ifndef HW_TESTS_MODEL_DENSE_FORWARD_H_
#define HW_TESTS_MODEL_DENSE_FORWARD_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

#include "model/model.h"

namespace headwater::testing {

struct DenseResult {
  // Per layer, [tokens, num_kv_heads, head_dim], in f32 whatever the compute type.
  std::vector<std::vector<float>> k;
  std::vector<std::vector<float>> v;
  std::vector<float> logits;  // of the last token
};

absl::StatusOr<DenseResult> ForwardDense(const Model& model, absl::Span<const int32_t> tokens);

// Of a file or folder of tests/model/golden.
std::string GoldenPath(absl::string_view name);

// One folder of tests/model/golden; README.md there describes the files.
struct Golden {
  std::string directory;
  std::vector<int32_t> tokens;
  DenseResult expected;
};
Golden ReadGolden(absl::string_view name);

// The folders' names.
std::vector<std::string> GoldenNames();

// ||a - b|| / ||b||; infinity where the sizes differ.
double RelativeError(absl::Span<const float> a, absl::Span<const float> b);

}  // namespace headwater::testing

#endif  // HW_TESTS_MODEL_DENSE_FORWARD_H_
