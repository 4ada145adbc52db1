#include "worker/recall_contract.h"

#include <algorithm>
#include <utility>

namespace headwater {
namespace {

constexpr float kTighter = 0.5f;  // what was enough is short by rounding alone
// Lists end where blocks do: a correction aims at this share of the bound.
constexpr double kAim = 0.99;
// The least density that can be forced: lists hold what is always listed.
constexpr double kLeastForced = 1e-6;

}  // namespace

RecallContract::RecallContract(const ContractRules& rules, std::vector<GroupSetting> settings)
    : rules_(rules) {
  for (const GroupSetting& setting : settings) outcomes_.push_back({setting});
}

// False: it is dense, and can read no more.
bool RecallContract::Tighten(float enough, GroupOutcome* group) {
  float& threshold = group->setting.threshold;
  if (threshold == 0) return false;
  ++group->rounds;
  if (enough == 0 || group->rounds >= kMostRounds) {
    threshold = 0;
    group->fallback = v1::ATTENTION_FALLBACK_DENSE_RECALL;
  } else {
    threshold = enough < threshold ? enough : threshold * kTighter;
  }
  return true;
}

bool RecallContract::JudgeDensity(double density) {
  if (density <= rules_.max_density) return false;
  const bool floor = forced_density_ > 0 && forced_density_ <= kLeastForced;
  if (floor || density_rounds_ >= kMostRounds) {
    for (GroupOutcome& group : outcomes_) {
      group.over_bound = true;
      if (floor) group.fallback = v1::ATTENTION_FALLBACK_DENSITY_FLOOR;
    }
    return false;
  }
  ++density_rounds_;
  // What was measured over what was forced is listed whatever the density.
  forced_density_ =
      forced_density_ == 0 ? rules_.max_density : forced_density_ - (density - kAim * rules_.max_density);
  forced_density_ = std::clamp(forced_density_, kLeastForced, std::max(kLeastForced, rules_.most_forced));
  for (GroupOutcome& group : outcomes_) {
    ++group.rounds;
    group.fallback = v1::ATTENTION_FALLBACK_DENSITY_BOUND;
    group.forced_density = forced_density_;
  }
  return true;
}

bool RecallContract::Judge(absl::Span<const GroupMeasure> groups) {
  bool again = false;
  double density = 0;
  for (size_t i = 0; i < outcomes_.size(); ++i) {
    density += groups[i].density / static_cast<double>(outcomes_.size());
    const RecallEstimate& recall = groups[i].recall;
    if (rules_.min_recall > 0 && recall.mean - kErrors * recall.error < rules_.min_recall) {
      again = Tighten(groups[i].enough, &outcomes_[i]) || again;
    }
  }
  if (rules_.max_density < 1) again = JudgeDensity(density) || again;
  return again;
}

std::vector<float> RecallContract::thresholds() const {
  std::vector<float> all;
  for (const GroupOutcome& group : outcomes_) all.push_back(group.setting.threshold);
  return all;
}

}  // namespace headwater
