// RecallContract: which KV heads of a layer read more after a look at what they read, and when to stop. Pure.
#ifndef HW_WORKER_RECALL_CONTRACT_H_
#define HW_WORKER_RECALL_CONTRACT_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

#include "headwater/v1/types.pb.h"
#include "worker/recall_samples.h"

namespace headwater {

// How the lists of one KV head in one layer are made; CudaSearchArgs has the rules.
struct GroupSetting {
  float threshold = 0.1f;  // 0: dense
  int32_t window_blocks = 4;

  bool operator==(const GroupSetting&) const = default;
};

// What is seen of the lists that a group has.
struct GroupMeasure {
  double density = 1;
  RecallEstimate recall;
  float enough = 0;  // the threshold under which lists hold min_recall, by the same queries; 0: none does
};

// What became of a group.
struct GroupOutcome {
  GroupSetting setting;
  uint32_t rounds = 0;  // selections after the first one
  v1::AttentionFallback fallback = v1::ATTENTION_FALLBACK_UNSPECIFIED;
  double forced_density = 0;  // over 0: the lists were made with it, not with the threshold
  bool over_bound = false;    // the layer still reads more than max_density
};

struct ContractRules {
  double min_recall = 0;   // 0: none
  double max_density = 1;  // 1: none
  double most_forced = 1;  // density for which lists have room
};

// One per layer: Judge() after each selection, until it says that the lists stay.
//
// min_recall: a group is short whose estimate less kErrors standard errors is under it. A short group's
// threshold goes to the one that is enough, to half of that if it should not be, and then the group
// goes dense; it does so at once where no threshold is enough. Groups that are not short keep their lists.
// max_density: where the mean over the groups is over it, the whole layer's density is forced, and corrected
// by what else is always listed, up to three times.
class RecallContract {
 public:
  static constexpr uint32_t kMostRounds = 3;
  static constexpr double kErrors = 2.5;

  RecallContract(const ContractRules& rules, std::vector<GroupSetting> settings);

  // Whether other lists are wanted: of settings() by group, or of forced_density() where that is over 0.
  bool Judge(absl::Span<const GroupMeasure> groups);

  std::vector<float> thresholds() const;
  double forced_density() const { return forced_density_; }
  const std::vector<GroupOutcome>& outcomes() const { return outcomes_; }

 private:
  static bool Tighten(float enough, GroupOutcome* group);
  bool JudgeDensity(double density);

  const ContractRules rules_;
  std::vector<GroupOutcome> outcomes_;
  double forced_density_ = 0;
  uint32_t density_rounds_ = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_RECALL_CONTRACT_H_
