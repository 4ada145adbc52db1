// Rotary embedding as a checkpoint's config.json states it.
#ifndef HW_MODEL_ROPE_H_
#define HW_MODEL_ROPE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

#include "kernels/ops/layer_ops.h"

namespace headwater {

struct RopeParameters {
  double theta = 10'000;
  // Llama 3.1's scaling; the fields below count only then.
  bool llama3 = false;
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_max_position = 0;

  bool operator==(const RopeParameters&) const = default;
};

// Reads either spelling: rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5,
// flat or under "full_attention"). UNIMPLEMENTED: a rope type other than "default" and "llama3", or
// partial_rotary_factor other than 1. INVALID_ARGUMENT: a wrong type, a value out of range, or two spellings
// that contradict each other.
absl::StatusOr<RopeParameters> ParseRope(const nlohmann::json& config, int64_t max_position);

// inverse[i] = theta^(-2i / head_dim), in double. Under llama3, with wavelength w = 2 pi / inverse[i] and
// L = original_max_position: divided by `factor` where w > L / low_freq_factor, unchanged where
// w < L / high_freq_factor, and between them the mean of both, weighted by
// (L / w - low_freq_factor) / (high_freq_factor - low_freq_factor) towards unchanged.
kernels::RopeFrequencies MakeRopeFrequencies(const RopeParameters& parameters, int32_t head_dim);

// The parameters as text, equal for equal parameters only.
std::string CanonicalText(const RopeParameters& parameters);

}  // namespace headwater

#endif  // HW_MODEL_ROPE_H_
