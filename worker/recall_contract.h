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
  double min_recall = 0;      // 0: none
  double max_density = 1;     // 1: none
  double most_forced = 1;     // density for which lists have room
  float first_threshold = 0;  // of a head that was not searched so far
};

// One per layer: Judge() after each selection, until it says that the lists stay.
//
// min_recall: a group is short whose estimate less two standard errors is under it. A short group's threshold
// goes to a quarter, then its window to four times what it was, then its threshold to a quarter once more;
// after that it goes dense. Groups that are not short keep their lists.
// max_density: where the mean over the groups is over it, the whole layer's density is forced, and corrected
// by what else is always listed, up to three times.
class RecallContract {
 public:
  static constexpr uint32_t kMostRounds = 3;

  RecallContract(const ContractRules& rules, std::vector<GroupSetting> settings);

  // Whether other lists are wanted: of settings() by group, or of forced_density() where that is over 0.
  bool Judge(absl::Span<const GroupMeasure> groups);

  std::vector<float> thresholds() const;
  std::vector<int32_t> windows() const;
  double forced_density() const { return forced_density_; }
  const std::vector<GroupOutcome>& outcomes() const { return outcomes_; }

 private:
  bool Tighten(GroupOutcome* group) const;
  bool JudgeDensity(double density);

  const ContractRules rules_;
  std::vector<GroupOutcome> outcomes_;
  double forced_density_ = 0;
  uint32_t density_rounds_ = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_RECALL_CONTRACT_H_
