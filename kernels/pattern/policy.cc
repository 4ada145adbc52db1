#include "kernels/pattern/policy.h"

#include <algorithm>
#include <new>
#include <utility>
#include <variant>

namespace headwater::kernels {
namespace {

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

// A policy and what it was told.
class NamedPolicy : public PatternPolicy {
 public:
  NamedPolicy(std::string name, PolicyParameters parameters)
      : name_(std::move(name)), parameters_(std::move(parameters)) {}
  const std::string& name() const override { return name_; }
  const PolicyParameters& parameters() const override { return parameters_; }

 private:
  const std::string name_;
  const PolicyParameters parameters_;
};

class DensePolicy final : public NamedPolicy {
 public:
  using NamedPolicy::NamedPolicy;
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
};

class AShapePolicy final : public NamedPolicy {
 public:
  AShapePolicy(const std::string& name, const PolicyParameters& parameters)
      : NamedPolicy(name, parameters),
        sink_tokens_(std::get<AShapeParameters>(parameters).sink_tokens),
        window_tokens_(std::get<AShapeParameters>(parameters).window_tokens) {}

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

  const int64_t sink_tokens_;
  const int64_t window_tokens_;
};

// Its lists depend on Q and K: cuda/policy.h makes them.
class SearchingPolicy final : public NamedPolicy {
 public:
  using NamedPolicy::NamedPolicy;
  Status Select(const PatternInputs&, BlockIndex*) const override {
    return {StatusCode::kUnimplemented, "policy " + name() + " searches on a GPU; there is none here"};
  }
};

}  // namespace

Status MakePolicy(const std::string& name, const std::map<std::string, double>& parameters,
                  std::unique_ptr<PatternPolicy>* policy) {
  PolicyParameters parsed;
  HW_KERNELS_RETURN_IF_ERROR(ParsePolicyParameters(name, parameters, &parsed));
  *policy = MakePolicy(name, std::move(parsed));
  return {};
}

std::unique_ptr<PatternPolicy> MakePolicy(const std::string& name, PolicyParameters parameters) {
  if (std::holds_alternative<DenseParameters>(parameters)) {
    return std::make_unique<DensePolicy>("dense", std::move(parameters));
  }
  if (std::holds_alternative<AShapeParameters>(parameters)) {
    return std::make_unique<AShapePolicy>(name, std::move(parameters));
  }
  return std::make_unique<SearchingPolicy>(name, std::move(parameters));
}

}  // namespace headwater::kernels
