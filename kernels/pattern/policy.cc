#include "kernels/pattern/policy.h"

#include <algorithm>
#include <cmath>
#include <new>

namespace headwater::kernels {
namespace {

constexpr int64_t kMaxPatternTokens = int64_t{1} << 22;
// Blocks are int32_t.
constexpr int64_t kMaxPromptTokens = int64_t{1} << 37;

Status CheckInputs(const PatternInputs& inputs) {
  if (inputs.num_tokens < 0 || inputs.num_tokens > kMaxPromptTokens) {
    return InvalidArgument("num_tokens " + std::to_string(inputs.num_tokens) + " is outside 0 to " +
                           std::to_string(kMaxPromptTokens));
  }
  const int64_t tiles = (inputs.num_tokens + kQueryTileTokens - 1) / kQueryTileTokens;
  if (inputs.first_q_tile < 0 || inputs.num_q_tiles < 0 || inputs.num_q_tiles > tiles ||
      inputs.first_q_tile > tiles - inputs.num_q_tiles) {
    return InvalidArgument("tiles from " + std::to_string(inputs.first_q_tile) + ", " +
                           std::to_string(inputs.num_q_tiles) + " of them, are not among the prompt's " +
                           std::to_string(tiles));
  }
  return {};
}

class DensePolicy final : public PatternPolicy {
 public:
  const std::string& name() const override { return name_; }
  Status Select(const PatternInputs& inputs, BlockIndex* index) const override {
    HW_KERNELS_RETURN_IF_ERROR(CheckInputs(inputs));
    try {
      *index = DenseBlockIndex(inputs.first_q_tile, inputs.num_q_tiles);
    } catch (const std::bad_alloc&) {
      return {StatusCode::kResourceExhausted,
              "no memory for the index of " + std::to_string(inputs.num_q_tiles) + " tiles"};
    }
    return {};
  }

 private:
  const std::string name_ = "dense";
};

class AShapePolicy final : public PatternPolicy {
 public:
  AShapePolicy(int64_t sink_tokens, int64_t window_tokens)
      : sink_tokens_(sink_tokens), window_tokens_(window_tokens) {}

  const std::string& name() const override { return name_; }

  Status Select(const PatternInputs& inputs, BlockIndex* index) const override {
    HW_KERNELS_RETURN_IF_ERROR(CheckInputs(inputs));
    try {
      *index = BlockIndex{};
      index->first_q_tile = inputs.first_q_tile;
      index->num_q_tiles = inputs.num_q_tiles;
      index->sink_tokens = sink_tokens_;
      index->window_tokens = window_tokens_;
      index->offsets.push_back(0);
      for (int64_t i = 0; i < inputs.num_q_tiles; ++i) {
        AppendTile(inputs.first_q_tile + i, inputs.num_tokens, index);
      }
    } catch (const std::bad_alloc&) {
      return {StatusCode::kResourceExhausted,
              "no memory for the index of " + std::to_string(inputs.num_q_tiles) + " tiles"};
    }
    return {};
  }

 private:
  void AppendTile(int64_t tile, int64_t num_tokens, BlockIndex* index) const {
    const int64_t first_query = tile * kQueryTileTokens;
    const int64_t last_query = std::min(first_query + kQueryTileTokens, num_tokens) - 1;
    // The last query sees the fewest of the keys between sinks and window.
    const bool dense = last_query - window_tokens_ < sink_tokens_;
    index->dense.push_back(dense ? 1 : 0);
    if (!dense) {
      const int64_t sink_blocks = (sink_tokens_ + kKeyBlockTokens - 1) / kKeyBlockTokens;
      const int64_t window_block = std::max<int64_t>(first_query - window_tokens_ + 1, 0) / kKeyBlockTokens;
      const int64_t end_block = last_query / kKeyBlockTokens + 1;
      for (int64_t block = 0; block < std::min(sink_blocks, end_block); ++block) {
        index->blocks.push_back(static_cast<int32_t>(block));
      }
      for (int64_t block = std::max(sink_blocks, window_block); block < end_block; ++block) {
        index->blocks.push_back(static_cast<int32_t>(block));
      }
    }
    index->offsets.push_back(static_cast<int64_t>(index->blocks.size()));
  }

  const std::string name_ = "a_shape";
  const int64_t sink_tokens_;
  const int64_t window_tokens_;
};

class ProbePolicy final : public PatternPolicy {
 public:
  explicit ProbePolicy(const ProbeParameters& parameters) : parameters_(parameters) {}
  const std::string& name() const override { return name_; }
  Status Select(const PatternInputs&, BlockIndex*) const override {
    return {StatusCode::kUnimplemented, "policy probe searches on a GPU; there is none here"};
  }
  const ProbeParameters* probe() const override { return &parameters_; }

 private:
  const std::string name_ = "probe";
  const ProbeParameters parameters_;
};

// Takes parameter `key` out of `parameters`: over 0, at most 1.
Status TakeShare(std::map<std::string, double>* parameters, const std::string& key, double* share) {
  const auto found = parameters->find(key);
  if (found == parameters->end()) return {};
  if (!(found->second > 0 && found->second <= 1)) {
    return InvalidArgument(key + " " + std::to_string(found->second) + " is not over 0 and at most 1");
  }
  *share = found->second;
  parameters->erase(found);
  return {};
}

// Takes parameter `key` out of `parameters`: a whole number from `least` to kMaxPatternTokens.
Status TakeTokens(std::map<std::string, double>* parameters, const std::string& key, int64_t least,
                  int64_t* tokens) {
  const auto found = parameters->find(key);
  if (found == parameters->end()) return {};
  const double value = found->second;
  if (!(value >= static_cast<double>(least) && value <= static_cast<double>(kMaxPatternTokens)) ||
      value != std::floor(value)) {
    return InvalidArgument(key + " " + std::to_string(value) + " is not a whole number from " +
                           std::to_string(least) + " to " + std::to_string(kMaxPatternTokens));
  }
  *tokens = static_cast<int64_t>(value);
  parameters->erase(found);
  return {};
}

Status RefuseRest(const std::string& policy, const std::map<std::string, double>& rest) {
  if (rest.empty()) return {};
  return InvalidArgument("policy " + policy + " has no parameter \"" + rest.begin()->first + "\"");
}

}  // namespace

Status MakePolicy(const std::string& name, const std::map<std::string, double>& parameters,
                  std::unique_ptr<PatternPolicy>* policy) {
  std::map<std::string, double> rest = parameters;
  if (name.empty() || name == "dense") {
    HW_KERNELS_RETURN_IF_ERROR(RefuseRest("dense", rest));
    *policy = std::make_unique<DensePolicy>();
    return {};
  }
  if (name == "a_shape") {
    int64_t sink_tokens = 128;
    int64_t window_tokens = 3968;
    HW_KERNELS_RETURN_IF_ERROR(TakeTokens(&rest, "sink_tokens", 0, &sink_tokens));
    HW_KERNELS_RETURN_IF_ERROR(TakeTokens(&rest, "window_tokens", 1, &window_tokens));
    HW_KERNELS_RETURN_IF_ERROR(RefuseRest("a_shape", rest));
    *policy = std::make_unique<AShapePolicy>(sink_tokens, window_tokens);
    return {};
  }
  if (name == "probe") {
    ProbeParameters probe;
    if (rest.count("threshold") > 0 && rest.count("density") > 0) {
      return InvalidArgument("policy probe takes a threshold or a density, not both");
    }
    HW_KERNELS_RETURN_IF_ERROR(TakeShare(&rest, "threshold", &probe.threshold));
    HW_KERNELS_RETURN_IF_ERROR(TakeShare(&rest, "density", &probe.forced_density));
    HW_KERNELS_RETURN_IF_ERROR(RefuseRest("probe", rest));
    *policy = std::make_unique<ProbePolicy>(probe);
    return {};
  }
  std::string known;
  for (const std::string& each : PolicyNames()) known += (known.empty() ? "" : ", ") + each;
  return InvalidArgument("policy \"" + name + "\" is not one of " + known);
}

std::vector<std::string> PolicyNames() { return {"dense", "a_shape", "probe"}; }

}  // namespace headwater::kernels
