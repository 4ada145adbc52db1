// Rotary embedding as a checkpoint's config.json states it.
#ifndef HW_MODEL_ROPE_H_
#define HW_MODEL_ROPE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

#include "kernels/ops/layer_ops.h"

namespace headwater {

enum class RopeType { kDefault, kLinear, kLlama3, kYarn };

struct RopeParameters {
  RopeType type = RopeType::kDefault;
  double theta = 10'000;
  double factor = 1;                 // of every type but default
  double original_max_position = 0;  // of llama3 and yarn
  // Of llama3.
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  // Of yarn: turns that a pair makes in original_max_position.
  double beta_fast = 32;
  double beta_slow = 1;
  bool truncate = true;
  double attention_factor = 1;  // what the checkpoint states, or what follows from factor and its mscales

  bool operator==(const RopeParameters&) const = default;
};

// Reads either spelling: rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5,
// flat or under "full_attention"). What yarn leaves out is filled in as transformers 5 does: beta_fast and
// beta_slow of 0 are absent, a factor of null is max_position / original_max_position, and without
// attention_factor it is m(mscale) / m(mscale_all_dim), or m(1) unless both are there and not 0, where
// m(x) = 1 + 0.1 x ln(factor).
//
// UNIMPLEMENTED: rope types and keys of the block other than those known, or partial_rotary_factor other than
// 1. INVALID_ARGUMENT: a wrong type, a value out of range, or two spellings that contradict each other.
absl::StatusOr<RopeParameters> ParseRope(const nlohmann::json& config, int64_t max_position);

// plain[i] = theta^(-2i / head_dim), in double, and what the type makes of it with a share kept[i], clamped
// to 0 to 1: inverse[i] = kept[i] plain[i] + (1 - kept[i]) plain[i] / factor. L is original_max_position.
//   default  kept = 1
//   linear   kept = 0
//   llama3   (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), turns = L plain[i] / 2 pi
//   yarn     (high - i) / (high - low), where the pairs that make beta_fast and beta_slow turns in L are at
//            low and high, fractions of a pair unless `truncate` rounds low down and high up
//            (arXiv:2309.00071), and low is at least 0, high at most head_dim - 1
kernels::RopeFrequencies MakeRopeFrequencies(const RopeParameters& parameters, int32_t head_dim);

// The parameters as text, equal for equal parameters only.
std::string CanonicalText(const RopeParameters& parameters);

}  // namespace headwater

#endif  // HW_MODEL_ROPE_H_
