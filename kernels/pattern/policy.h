// PatternPolicy: decides which key blocks each query tile attends to.
#ifndef HW_KERNELS_PATTERN_POLICY_H_
#define HW_KERNELS_PATTERN_POLICY_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/pattern/parameters.h"
#include "kernels/status.h"

namespace headwater::kernels {

// What a policy may look at. Statistics of K and Q join here when a policy needs them.
struct PatternInputs {
  int32_t layer = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int64_t num_tokens = 0;  // of the whole prompt
  int64_t first_q_tile = 0;
  int64_t num_q_tiles = 0;
};

// Immutable and thread-safe: the same inputs give the same index on every rank.
class PatternPolicy {
 public:
  virtual ~PatternPolicy() = default;
  virtual const std::string& name() const = 0;
  // Fills `index` for the tiles asked for. The result passes ValidateBlockIndex(). UNIMPLEMENTED: a policy
  // whose lists depend on Q and K.
  virtual Status Select(const PatternInputs& inputs, BlockIndex* index) const = 0;
  virtual const PolicyParameters& parameters() const = 0;
};

// Makes the policy called `name` with `parameters`, as ParsePolicyParameters() takes them; errors as there.
Status MakePolicy(const std::string& name, const std::map<std::string, double>& parameters,
                  std::unique_ptr<PatternPolicy>* policy);

// Likewise of parameters that have been parsed for `name`, with tables added.
std::unique_ptr<PatternPolicy> MakePolicy(const std::string& name, PolicyParameters parameters);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_PATTERN_POLICY_H_
