#include "model/rope.h"

#include <cmath>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "base/status_macros.h"
#include "model/json_fields.h"

namespace headwater {
namespace {

using nlohmann::json;

constexpr double kLeastTheta = 1;
constexpr double kMostTheta = 1e15;
constexpr double kMostFactor = 1e6;
constexpr double kMostPosition = 1LL << 40;

absl::Status CheckPartialRotaryFactor(const JsonFields& fields) {
  HW_ASSIGN_OR_RETURN(const double factor, fields.Number("partial_rotary_factor", 0, 1, 1.0));
  if (factor != 1) return fields.NotSupported("partial_rotary_factor", "1 (the whole head is rotated)");
  return absl::OkStatus();
}

absl::Status ParseLlama3(const JsonFields& fields, const JsonFields& config, int64_t max_position,
                         RopeParameters* rope) {
  HW_ASSIGN_OR_RETURN(rope->factor, fields.Number("factor", 1, kMostFactor));
  HW_ASSIGN_OR_RETURN(rope->low_freq_factor, fields.Number("low_freq_factor", 1e-6, kMostFactor));
  HW_ASSIGN_OR_RETURN(rope->high_freq_factor, fields.Number("high_freq_factor", 1e-6, kMostFactor));
  if (rope->high_freq_factor <= rope->low_freq_factor) {
    return fields.Wrong("high_freq_factor", absl::StrCat("above low_freq_factor, ", rope->low_freq_factor));
  }
  // transformers 5 lets a value beside the block win over the one inside, and defaults to the model's limit.
  const char* const name = "original_max_position_embeddings";
  const JsonFields& holder = config.Find(name) != nullptr ? config : fields;
  HW_ASSIGN_OR_RETURN(rope->original_max_position,
                      holder.Number(name, 1, kMostPosition, static_cast<double>(max_position)));
  return absl::OkStatus();
}

// `name`: rope_scaling or rope_parameters. Nothing: the block is absent, null or empty.
absl::StatusOr<std::optional<RopeParameters>> ParseBlock(const JsonFields& config, absl::string_view name,
                                                         int64_t max_position) {
  const json* block = config.Find(name);
  std::string prefix = absl::StrCat(name, ".");
  if (block != nullptr && !block->is_object()) return config.Wrong(name, "an object");
  if (block != nullptr && block->contains("full_attention")) {
    const JsonFields by_layer_type(*block, prefix);
    block = by_layer_type.Find("full_attention");
    if (block == nullptr || !block->is_object()) return by_layer_type.Wrong("full_attention", "an object");
    absl::StrAppend(&prefix, "full_attention.");
  }
  if (block == nullptr || block->empty()) return std::nullopt;

  const JsonFields fields(*block, prefix);
  RopeParameters rope;
  HW_RETURN_IF_ERROR(CheckPartialRotaryFactor(fields));
  const char* const type_name = fields.Find("rope_type") != nullptr ? "rope_type" : "type";
  HW_ASSIGN_OR_RETURN(const std::string type, fields.String(type_name, "default"));
  if (type != "default" && type != "llama3") return fields.NotSupported(type_name, "default, llama3");

  HW_ASSIGN_OR_RETURN(const double outer, config.Number("rope_theta", kLeastTheta, kMostTheta, rope.theta));
  HW_ASSIGN_OR_RETURN(rope.theta, fields.Number("rope_theta", kLeastTheta, kMostTheta, outer));
  if (config.Find("rope_theta") != nullptr && rope.theta != outer) {
    return fields.Wrong("rope_theta", absl::StrCat("equal to rope_theta, ", outer));
  }
  rope.llama3 = type == "llama3";
  if (rope.llama3) HW_RETURN_IF_ERROR(ParseLlama3(fields, config, max_position, &rope));
  return std::optional<RopeParameters>(rope);
}

}  // namespace

absl::StatusOr<RopeParameters> ParseRope(const json& config, int64_t max_position) {
  const JsonFields fields(config);
  HW_RETURN_IF_ERROR(CheckPartialRotaryFactor(fields));
  HW_ASSIGN_OR_RETURN(const auto scaling, ParseBlock(fields, "rope_scaling", max_position));
  HW_ASSIGN_OR_RETURN(const auto parameters, ParseBlock(fields, "rope_parameters", max_position));
  if (scaling.has_value() && parameters.has_value() && !(*scaling == *parameters)) {
    return absl::InvalidArgumentError(absl::StrCat("rope_scaling says ", CanonicalText(*scaling),
                                                   ", rope_parameters says ", CanonicalText(*parameters),
                                                   "; they must agree"));
  }
  if (scaling.has_value()) return *scaling;
  if (parameters.has_value()) return *parameters;
  RopeParameters rope;
  HW_ASSIGN_OR_RETURN(rope.theta, fields.Number("rope_theta", kLeastTheta, kMostTheta, rope.theta));
  return rope;
}

kernels::RopeFrequencies MakeRopeFrequencies(const RopeParameters& parameters, int32_t head_dim) {
  kernels::RopeFrequencies frequencies;
  for (int32_t i = 0; i < head_dim / 2; ++i) {
    const double plain = std::pow(parameters.theta, -2.0 * i / head_dim);
    if (!parameters.llama3) {
      frequencies.inverse.push_back(plain);
      continue;
    }
    const double turns = parameters.original_max_position * plain / (2 * M_PI);
    const double slow = plain / parameters.factor;
    if (turns < parameters.low_freq_factor) {
      frequencies.inverse.push_back(slow);
    } else if (turns > parameters.high_freq_factor) {
      frequencies.inverse.push_back(plain);
    } else {
      const double smooth =
          (turns - parameters.low_freq_factor) / (parameters.high_freq_factor - parameters.low_freq_factor);
      frequencies.inverse.push_back((1 - smooth) * slow + smooth * plain);
    }
  }
  return frequencies;
}

std::string CanonicalText(const RopeParameters& parameters) {
  std::string text = absl::StrFormat("theta=%.17g", parameters.theta);
  if (parameters.llama3) {
    absl::StrAppendFormat(&text, " llama3 factor=%.17g low=%.17g high=%.17g original=%.17g",
                          parameters.factor, parameters.low_freq_factor, parameters.high_freq_factor,
                          parameters.original_max_position);
  }
  return text;
}

}  // namespace headwater
