// Shapes of well-known models, for benchmarks with random weights.
#ifndef HW_MODEL_PRESETS_H_
#define HW_MODEL_PRESETS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

#include "model/config.h"

namespace headwater {

// In alphabetical order.
std::vector<std::string> PresetNames();

// The config that the model's config.json gives, but for max_position, which is `max_position` where that is
// more: a benchmark may be longer than what the model was trained for. NOT_FOUND lists the names.
absl::StatusOr<ModelConfig> PresetConfig(absl::string_view name, int64_t max_position);

}  // namespace headwater

#endif  // HW_MODEL_PRESETS_H_
