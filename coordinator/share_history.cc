#include "coordinator/share_history.h"

#include <bit>

namespace headwater {

ShareHistory::Key ShareHistory::KeyOf(const std::string& model, const std::string& policy,
                                      uint64_t num_tokens) {
  return {model, policy, static_cast<int>(std::bit_width(num_tokens))};
}

ShareHistory::Shares ShareHistory::Find(const std::string& model, const std::string& policy,
                                        uint64_t num_tokens) const {
  const auto found = shares_.find(KeyOf(model, policy, num_tokens));
  return found == shares_.end() ? Shares() : found->second;
}

void ShareHistory::SetDensity(const std::string& model, const std::string& policy, uint64_t num_tokens,
                              double density) {
  Set(KeyOf(model, policy, num_tokens), &Shares::density, density);
}

void ShareHistory::SetSelected(const std::string& model, const std::string& policy, uint64_t num_tokens,
                               double selected) {
  Set(KeyOf(model, policy, num_tokens), &Shares::selected, selected);
}

void ShareHistory::Set(const Key& key, double Shares::*field, double value) {
  if (!(value >= 0 && value <= 1)) return;
  if (shares_.size() >= kMostKept && shares_.find(key) == shares_.end()) return;
  shares_[key].*field = value;
}

}  // namespace headwater
