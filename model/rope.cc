#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"

#include "base/status_macros.h"
#include "model/json_fields.h"

namespace headwater {
namespace {

using nlohmann::json;

constexpr double kLeastTheta = 1;
constexpr double kMostTheta = 1e15;
constexpr double kLeastFactor = 1e-6;
constexpr double kMostFactor = 1e6;
constexpr double kMostPosition = 1LL << 40;

struct TypeTraits {
  RopeType type;
  const char* name;
  std::vector<absl::string_view> keys;  // of its block, beside those that every block may have
};

const std::vector<TypeTraits>& Types() {
  static const auto* const types = new std::vector<TypeTraits>{
      {RopeType::kDefault, "default", {}},
      {RopeType::kLinear, "linear", {"factor"}},
      {RopeType::kLlama3,
       "llama3",
       {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}},
      {RopeType::kYarn,
       "yarn",
       {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
        "attention_factor", "mscale", "mscale_all_dim"}}};
  return *types;
}

absl::Status CheckPartialRotaryFactor(const JsonFields& fields) {
  HW_ASSIGN_OR_RETURN(const double factor, fields.Number("partial_rotary_factor", 0, 1, 1.0));
  if (factor != 1) return fields.NotSupported("partial_rotary_factor", "1 (the whole head is rotated)");
  return absl::OkStatus();
}

// An unknown key may change what the known ones mean.
absl::Status CheckKeys(const json& block, const JsonFields& fields,
                       absl::Span<const absl::string_view> known) {
  for (const auto& [key, value] : block.items()) {
    if (value.is_null() || std::find(known.begin(), known.end(), key) != known.end()) continue;
    return fields.NotSupported(key, absl::StrJoin(known, ", "));
  }
  return absl::OkStatus();
}

absl::StatusOr<const TypeTraits*> ParseType(const json& block, const JsonFields& fields) {
  const char* const name = fields.Find("rope_type") != nullptr ? "rope_type" : "type";
  HW_ASSIGN_OR_RETURN(const std::string type, fields.String(name, "default"));
  HW_ASSIGN_OR_RETURN(const std::string old_type, fields.String("type", type));
  if (type != old_type) return fields.Wrong("type", absl::StrCat("equal to rope_type, \"", type, "\""));
  for (const TypeTraits& traits : Types()) {
    if (traits.name != type) continue;
    std::vector<absl::string_view> keys = traits.keys;
    keys.insert(keys.end(), {"rope_type", "type", "rope_theta", "partial_rotary_factor"});
    HW_RETURN_IF_ERROR(CheckKeys(block, fields, keys));
    return &traits;
  }
  return fields.NotSupported(name, absl::StrJoin(Types(), ", ", [](std::string* out, const auto& traits) {
                               out->append(traits.name);
                             }));
}

absl::StatusOr<double> ParseTheta(const JsonFields& fields, const JsonFields& config) {
  HW_ASSIGN_OR_RETURN(const double outer,
                      config.Number("rope_theta", kLeastTheta, kMostTheta, RopeParameters().theta));
  HW_ASSIGN_OR_RETURN(const double theta, fields.Number("rope_theta", kLeastTheta, kMostTheta, outer));
  if (config.Find("rope_theta") != nullptr && theta != outer) {
    return fields.Wrong("rope_theta", absl::StrCat("equal to rope_theta, ", outer));
  }
  return theta;
}

// transformers 5 lets a value beside the block win over the one inside, and defaults to the model's limit.
absl::StatusOr<double> ParseOriginalLength(const JsonFields& fields, const JsonFields& config,
                                           int64_t max_position) {
  const char* const name = "original_max_position_embeddings";
  const JsonFields& holder = config.Find(name) != nullptr ? config : fields;
  return holder.Number(name, 1, kMostPosition, static_cast<double>(max_position));
}

absl::Status ParseLlama3(const JsonFields& fields, RopeParameters* rope) {
  HW_ASSIGN_OR_RETURN(rope->factor, fields.Number("factor", 1, kMostFactor));
  HW_ASSIGN_OR_RETURN(rope->low_freq_factor, fields.Number("low_freq_factor", kLeastFactor, kMostFactor));
  HW_ASSIGN_OR_RETURN(rope->high_freq_factor, fields.Number("high_freq_factor", kLeastFactor, kMostFactor));
  if (rope->high_freq_factor <= rope->low_freq_factor) {
    return fields.Wrong("high_freq_factor", absl::StrCat("above low_freq_factor, ", rope->low_freq_factor));
  }
  return absl::OkStatus();
}

absl::StatusOr<double> ParseYarnFactor(const JsonFields& fields, double original, int64_t max_position) {
  if (fields.Find("factor") != nullptr || !fields.Contains("factor")) {
    return fields.Number("factor", 1, kMostFactor);
  }
  const double ratio = static_cast<double>(max_position) / original;
  if (ratio >= 1 && ratio <= kMostFactor) return ratio;
  return fields.Wrong("factor", absl::StrCat("a number from 1 to ", kMostFactor, ", and stands for ", ratio,
                                             ", max_position_embeddings / original_max_position_embeddings"));
}

// 0 counts as absent.
absl::Status ParseYarnTurns(const JsonFields& fields, RopeParameters* rope) {
  const RopeParameters defaults;
  HW_ASSIGN_OR_RETURN(const double fast, fields.Number("beta_fast", 0, kMostFactor, 0.0));
  HW_ASSIGN_OR_RETURN(const double slow, fields.Number("beta_slow", 0, kMostFactor, 0.0));
  rope->beta_fast = fast == 0 ? defaults.beta_fast : fast;
  rope->beta_slow = slow == 0 ? defaults.beta_slow : slow;
  if (rope->beta_fast > rope->beta_slow) return absl::OkStatus();
  if (fast == 0) return fields.Wrong("beta_slow", absl::StrCat("below beta_fast, ", rope->beta_fast));
  return fields.Wrong("beta_fast", absl::StrCat("above beta_slow, ", rope->beta_slow));
}

absl::StatusOr<double> ParseAttentionFactor(const JsonFields& fields, double factor) {
  HW_ASSIGN_OR_RETURN(const double mscale, fields.Number("mscale", 0, kMostFactor, 0.0));
  HW_ASSIGN_OR_RETURN(const double all_dim, fields.Number("mscale_all_dim", 0, kMostFactor, 0.0));
  const auto magnitude = [&](double scale) { return 1 + 0.1 * scale * std::log(factor); };
  const double implied = mscale > 0 && all_dim > 0 ? magnitude(mscale) / magnitude(all_dim) : magnitude(1);
  return fields.Number("attention_factor", kLeastFactor, kMostFactor, implied);
}

absl::Status ParseYarn(const JsonFields& fields, int64_t max_position, RopeParameters* rope) {
  HW_ASSIGN_OR_RETURN(rope->factor, ParseYarnFactor(fields, rope->original_max_position, max_position));
  HW_RETURN_IF_ERROR(ParseYarnTurns(fields, rope));
  // transformers takes null for false.
  if (fields.Contains("truncate") && fields.Find("truncate") == nullptr) {
    return fields.Wrong("truncate", "true or false");
  }
  HW_ASSIGN_OR_RETURN(rope->truncate, fields.Boolean("truncate", true));
  HW_ASSIGN_OR_RETURN(rope->attention_factor, ParseAttentionFactor(fields, rope->factor));
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
    HW_RETURN_IF_ERROR(CheckKeys(*block, by_layer_type, {"full_attention", "sliding_attention"}));
    block = by_layer_type.Find("full_attention");
    if (block == nullptr || !block->is_object()) return by_layer_type.Wrong("full_attention", "an object");
    absl::StrAppend(&prefix, "full_attention.");
  }
  if (block == nullptr || block->empty()) return std::nullopt;

  const JsonFields fields(*block, prefix);
  HW_RETURN_IF_ERROR(CheckPartialRotaryFactor(fields));
  HW_ASSIGN_OR_RETURN(const TypeTraits* const traits, ParseType(*block, fields));
  RopeParameters rope;
  rope.type = traits->type;
  HW_ASSIGN_OR_RETURN(rope.theta, ParseTheta(fields, config));
  if (rope.type == RopeType::kLinear) {
    HW_ASSIGN_OR_RETURN(rope.factor, fields.Number("factor", 1, kMostFactor));
  } else if (rope.type != RopeType::kDefault) {
    HW_ASSIGN_OR_RETURN(rope.original_max_position, ParseOriginalLength(fields, config, max_position));
  }
  if (rope.type == RopeType::kLlama3) HW_RETURN_IF_ERROR(ParseLlama3(fields, &rope));
  if (rope.type == RopeType::kYarn) {
    if (rope.theta <= 1) {
      const JsonFields& holder = fields.Find("rope_theta") != nullptr ? fields : config;
      return holder.Wrong("rope_theta", absl::StrCat("above 1 for yarn, and up to ", kMostTheta));
    }
    HW_RETURN_IF_ERROR(ParseYarn(fields, max_position, &rope));
  }
  return std::optional<RopeParameters>(rope);
}

double Clamp01(double share) { return std::clamp(share, 0.0, 1.0); }

// First and last pair of yarn's ramp, as MakeRopeFrequencies() says.
std::pair<double, double> YarnRamp(const RopeParameters& p, int32_t head_dim) {
  const auto pair_of = [&](double turns) {
    return head_dim * std::log(p.original_max_position / (turns * 2 * M_PI)) / (2 * std::log(p.theta));
  };
  double low = pair_of(p.beta_fast);
  double high = pair_of(p.beta_slow);
  if (p.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;
  return {low, high};
}

// The share of the plain frequency of each pair that stays.
std::vector<double> KeptShares(const RopeParameters& p, const std::vector<double>& plain) {
  std::vector<double> kept(plain.size(), p.type == RopeType::kDefault ? 1 : 0);
  if (p.type == RopeType::kLlama3) {
    for (size_t i = 0; i < plain.size(); ++i) {
      const double turns = p.original_max_position * plain[i] / (2 * M_PI);
      kept[i] = Clamp01((turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor));
    }
  } else if (p.type == RopeType::kYarn) {
    // Past its borders, high can be below low; what this then gives is what transformers gives.
    const auto [low, high] = YarnRamp(p, static_cast<int32_t>(2 * plain.size()));
    for (size_t i = 0; i < plain.size(); ++i) {
      kept[i] = 1 - Clamp01((static_cast<double>(i) - low) / (high - low));
    }
  }
  return kept;
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
  std::vector<double> plain;
  for (int32_t i = 0; i < head_dim / 2; ++i) plain.push_back(std::pow(parameters.theta, -2.0 * i / head_dim));
  const std::vector<double> kept = KeptShares(parameters, plain);
  kernels::RopeFrequencies frequencies;
  frequencies.attention_factor = parameters.attention_factor;
  for (size_t i = 0; i < plain.size(); ++i) {
    frequencies.inverse.push_back((1 - kept[i]) * (plain[i] / parameters.factor) + kept[i] * plain[i]);
  }
  return frequencies;
}

std::string CanonicalText(const RopeParameters& p) {
  std::string text = absl::StrFormat("theta=%.17g", p.theta);
  switch (p.type) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear:
      absl::StrAppendFormat(&text, " linear factor=%.17g", p.factor);
      break;
    case RopeType::kLlama3:
      absl::StrAppendFormat(&text, " llama3 factor=%.17g low=%.17g high=%.17g original=%.17g", p.factor,
                            p.low_freq_factor, p.high_freq_factor, p.original_max_position);
      break;
    case RopeType::kYarn:
      absl::StrAppendFormat(
          &text,
          " yarn factor=%.17g original=%.17g beta_fast=%.17g beta_slow=%.17g truncate=%d attention=%.17g",
          p.factor, p.original_max_position, p.beta_fast, p.beta_slow, p.truncate, p.attention_factor);
      break;
  }
  return text;
}

}  // namespace headwater
