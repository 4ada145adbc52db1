#include "kernels/pattern/parameters.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMaxPatternTokens = int64_t{1} << 22;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;
constexpr int64_t kMaxBudget = (int64_t{1} << 31) - 1;

// Takes parameters out of what a request says; keeps the first thing that is wrong.
class Taker {
 public:
  Taker(const std::string& policy, const std::map<std::string, double>& parameters)
      : policy_(policy), rest_(parameters) {}

  // A whole number from `least` to `most`.
  template <typename Integer>
  void Whole(const std::string& key, int64_t least, int64_t most, Integer* value) {
    double given = 0;
    if (!Take(key, &given)) return;
    if (!(given >= static_cast<double>(least) && given <= static_cast<double>(most)) ||
        given != std::floor(given)) {
      return Refuse(key, given,
                    "is not a whole number from " + std::to_string(least) + " to " + std::to_string(most));
    }
    *value = static_cast<Integer>(given);
  }

  // Over 0, at most 1.
  void Share(const std::string& key, double* value) {
    double given = 0;
    if (!Take(key, &given)) return;
    if (!(given > 0 && given <= 1)) return Refuse(key, given, "is not over 0 and at most 1");
    *value = given;
  }

  void Real(const std::string& key, double least, double most, double* value) {
    double given = 0;
    if (!Take(key, &given)) return;
    if (!(given >= least && given <= most)) {
      return Refuse(key, given, "is not from " + NumberText(least) + " to " + NumberText(most));
    }
    *value = given;
  }

  bool Has(const std::string& key) const { return rest_.count(key) > 0; }
  void Refuse(const std::string& message) {
    if (status_.ok()) status_ = InvalidArgument(message);
  }

  // The first thing that was wrong, or a name that nobody took.
  Status Finish() const {
    if (!status_.ok() || rest_.empty()) return status_;
    return InvalidArgument("policy " + policy_ + " has no parameter \"" + rest_.begin()->first + "\"");
  }

 private:
  bool Take(const std::string& key, double* value) {
    const auto found = rest_.find(key);
    if (found == rest_.end()) return false;
    *value = found->second;
    rest_.erase(found);
    return true;
  }
  void Refuse(const std::string& key, double value, const std::string& why) {
    Refuse(key + " " + NumberText(value) + " " + why);
  }

  const std::string policy_;
  std::map<std::string, double> rest_;
  Status status_;
};

void TakeDense(Taker*, DenseParameters*) {}

void TakeAShape(Taker* from, AShapeParameters* p) {
  from->Whole("sink_tokens", 0, kMaxPatternTokens, &p->sink_tokens);
  from->Whole("window_tokens", 1, kMaxPatternTokens, &p->window_tokens);
}

void TakeProbe(Taker* from, ProbeParameters* p) {
  if (from->Has("threshold") && from->Has("density")) {
    from->Refuse("policy probe takes a threshold or a density, not both");
  }
  from->Share("threshold", &p->threshold);
  from->Share("density", &p->forced_density);
  from->Whole("dense_below_tokens", 0, kMaxBudget, &p->dense_below_tokens);
}

void TakeHeadwater(Taker* from, HeadwaterParameters* p) {
  from->Share("threshold", &p->threshold);
  from->Whole("sink_blocks", 0, kMaxBlocks, &p->sink_blocks);
  from->Whole("window_blocks", 1, kMaxBlocks, &p->window_blocks);
  from->Whole("dense_last_tokens", 0, kMaxPatternTokens, &p->dense_last_tokens);
  from->Whole("correction", 0, 1, &p->correction);
  from->Whole("dense_below_tokens", 0, kMaxBudget, &p->dense_below_tokens);
}

void TakeFlash(Taker* from, reference::FlashParameters* p) {
  from->Real("alpha", 0, 1, &p->alpha);
  from->Whole("sink_blocks", 0, kMaxBlocks, &p->sink_blocks);
  from->Whole("window_blocks", 1, kMaxBlocks, &p->window_blocks);
  from->Whole("dense_last_blocks", 0, kMaxBlocks, &p->dense_last_blocks);
  from->Whole("min_blocks", 0, kMaxBlocks, &p->min_blocks);
}

void TakeFlash2(Taker* from, reference::Flash2Parameters* p) {
  from->Real("alpha", 0, 1, &p->alpha);
  from->Whole("sink_blocks", 0, kMaxBlocks, &p->sink_blocks);
  from->Whole("window_blocks", 1, kMaxBlocks, &p->window_blocks);
  from->Whole("dense_last_tiles", 0, kMaxBlocks, &p->dense_last_tiles);
  from->Whole("dense_layers", 0, kMaxBlocks, &p->dense_layers);
  from->Whole("dense_tokens", 0, int64_t{1} << 40, &p->dense_tokens);
}

// gamma is over 0 and below 1.
void TakeGamma(Taker* from, double* gamma) { from->Real("gamma", 1e-9, 1 - 1e-9, gamma); }

void TakeFlex(Taker* from, reference::FlexParameters* p) {
  TakeGamma(from, &p->gamma);
  from->Real("tau", 0, 1, &p->tau);
  from->Whole("min_budget_tokens", 1, kMaxBudget, &p->min_budget_tokens);
  from->Whole("max_budget_tokens", 0, kMaxBudget, &p->max_budget_tokens);
}

void TakeShare(Taker* from, ShareWithClusters* p) {
  TakeGamma(from, &p->share.gamma);
  from->Real("similarity", 0, 1, &p->share.similarity);
  from->Real("fallback", 0, 1, &p->share.fallback);
  from->Real("query_aware", 0, 1, &p->share.query_aware);
  from->Whole("min_budget_tokens", 1, kMaxBudget, &p->share.min_budget_tokens);
  from->Whole("max_budget_tokens", 0, kMaxBudget, &p->share.max_budget_tokens);
  from->Whole("pivots_per_layer", 0, kMaxBlocks, &p->share.pivots_per_layer);
}

void TakeSkeleton(Taker* from, reference::SkeletonParameters* p) {
  from->Whole("sink_tokens", 0, kMaxBlocks, &p->sink_tokens);
  from->Whole("local_tokens", 1, kMaxBlocks, &p->local_tokens);
  from->Whole("samples_per_dim", 1, 1 << 16, &p->samples_per_dim);
  from->Whole("seed", 0, int64_t{1} << 53, &p->seed);
  from->Real("ridge", 1e-9, 1, &p->ridge);
  from->Real("epsilon", 1e-12, 1e6, &p->epsilon);
  from->Real("budget_blocks", 0, std::ldexp(1.0, 40), &p->budget_blocks);
  from->Real("rope_base", 1, 1e12, &p->rope_base);
}

void TakeVerticalSlash(Taker* from, reference::VerticalSlashParameters* p) {
  from->Whole("n_vertical", 1, kMaxPatternTokens, &p->budgets[0].n_vertical);
  from->Whole("n_slash", 1, kMaxPatternTokens, &p->budgets[0].n_slash);
  from->Whole("last_q", 1, kMaxPatternTokens, &p->last_q);
  from->Whole("forced_verticals", 0, kMaxPatternTokens, &p->forced_verticals);
  from->Whole("forced_locals", 1, kMaxPatternTokens, &p->forced_locals);
  from->Whole("least_verticals", 1, kMaxPatternTokens, &p->least_verticals);
  from->Whole("least_slashes", 1, kMaxPatternTokens, &p->least_slashes);
}

void TakeXAttention(Taker* from, reference::XAttentionParameters* p) {
  from->Whole("stride", 1, 128, &p->stride);
  if (128 % p->stride != 0) {
    from->Refuse("stride " + std::to_string(p->stride) + " does not divide 128");
  }
  from->Real("threshold", 0, 1, &p->thresholds[0]);
  from->Real("norm", 1e-9, 1e9, &p->norm);
}

using Given = std::map<std::string, double>;

template <typename Parameters, void (*kTake)(Taker*, Parameters*)>
Status Parse(const std::string& name, const Given& given, int64_t crossover, PolicyParameters* taken) {
  Taker taker(name, given);
  Parameters parameters;
  kTake(&taker, &parameters);
  PolicyParameters all;
  all.dense_below_tokens = crossover;
  if (crossover > 0) taker.Whole("dense_below_tokens", 0, kMaxBudget, &all.dense_below_tokens);
  HW_KERNELS_RETURN_IF_ERROR(taker.Finish());
  all = std::move(parameters);
  *taken = std::move(all);
  return {};
}

struct Known {
  const char* name;
  Status (*parse)(const std::string& name, const Given& given, int64_t crossover, PolicyParameters* taken);
  // PolicyParameters::dense_below_tokens where none is given; 0: the policy has its own, or none.
  int64_t crossover;
};
constexpr Known kKnown[] = {
    {"dense", Parse<DenseParameters, TakeDense>, 0},
    {"a_shape", Parse<AShapeParameters, TakeAShape>, 20480},
    {"headwater", Parse<HeadwaterParameters, TakeHeadwater>, 0},
    {"probe", Parse<ProbeParameters, TakeProbe>, 0},
    {"flash", Parse<reference::FlashParameters, TakeFlash>, 8192},
    {"flash2", Parse<reference::Flash2Parameters, TakeFlash2>, 8192},
    {"flex", Parse<reference::FlexParameters, TakeFlex>, 8192},
    {"share", Parse<ShareWithClusters, TakeShare>, 12288},
    {"skeleton", Parse<reference::SkeletonParameters, TakeSkeleton>, 20480},
    {"vertical_slash", Parse<reference::VerticalSlashParameters, TakeVerticalSlash>, 32768},
    {"xattention", Parse<reference::XAttentionParameters, TakeXAttention>, 8192},
};

}  // namespace

Status ParsePolicyParameters(const std::string& name, const std::map<std::string, double>& parameters,
                             PolicyParameters* parsed) {
  for (const Known& known : kKnown) {
    if (name == known.name || (name.empty() && &known == kKnown)) {
      return known.parse(known.name, parameters, known.crossover, parsed);
    }
  }
  std::string names;
  for (const std::string& each : PolicyNames()) names += (names.empty() ? "" : ", ") + each;
  return InvalidArgument("policy \"" + name + "\" is not one of " + names);
}

int64_t DenseBelowTokens(const PolicyParameters& parameters) {
  if (std::holds_alternative<DenseParameters>(parameters)) return INT64_MAX;
  if (const auto* const probe = std::get_if<ProbeParameters>(&parameters)) {
    return probe->forced_density == 0 ? probe->dense_below_tokens : 0;
  }
  if (const auto* const own = std::get_if<HeadwaterParameters>(&parameters)) return own->dense_below_tokens;
  if (const auto* const flash2 = std::get_if<reference::Flash2Parameters>(&parameters)) {
    return std::max(flash2->dense_tokens + 1, parameters.dense_below_tokens);
  }
  return parameters.dense_below_tokens;
}

std::vector<std::string> PolicyNames() {
  std::vector<std::string> names;
  for (const Known& known : kKnown) names.emplace_back(known.name);
  return names;
}

}  // namespace headwater::kernels
