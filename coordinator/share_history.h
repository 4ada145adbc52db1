// What share of the causal blocks prompts read, and of other ranks' K and V: unknown before a policy has
// looked, but alike for prompts of one length under one policy.
#ifndef HW_COORDINATOR_SHARE_HISTORY_H_
#define HW_COORDINATOR_SHARE_HISTORY_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>

namespace headwater {

class ShareHistory {
 public:
  struct Shares {
    double density = 1;
    double selected = 1;  // of K and V that strategy sparse brought
  };

  // Of the last prompt of this model, policy and length (to a factor of two); 1 where there was none.
  Shares Find(const std::string& model, const std::string& policy, uint64_t num_tokens) const;
  // From 0 to 1 each; others, and what would be more than kMostKept lengths and policies, are not kept.
  void SetDensity(const std::string& model, const std::string& policy, uint64_t num_tokens, double density);
  void SetSelected(const std::string& model, const std::string& policy, uint64_t num_tokens, double selected);

  static constexpr size_t kMostKept = 4096;

 private:
  using Key = std::tuple<std::string, std::string, int>;
  static Key KeyOf(const std::string& model, const std::string& policy, uint64_t num_tokens);
  void Set(const Key& key, double Shares::*field, double value);

  std::map<Key, Shares> shares_;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_SHARE_HISTORY_H_
