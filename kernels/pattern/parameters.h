// Parameters of every policy, typed and checked, from the names and numbers that requests carry.
#ifndef HW_KERNELS_PATTERN_PARAMETERS_H_
#define HW_KERNELS_PATTERN_PARAMETERS_H_

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "kernels/reference/policies/flash.h"
#include "kernels/reference/policies/flash2.h"
#include "kernels/reference/policies/flex.h"
#include "kernels/reference/policies/share.h"
#include "kernels/reference/policies/skeleton.h"
#include "kernels/reference/policies/vertical_slash.h"
#include "kernels/reference/policies/xattention.h"
#include "kernels/status.h"

namespace headwater::kernels {

struct DenseParameters {};

// StreamingLLM's attention sinks and sliding window (Xiao et al., arXiv:2309.17453), token-exact: query p
// sees key j <= p if j < sink_tokens or j > p - window_tokens.
struct AShapeParameters {
  int64_t sink_tokens = 128;     // 0 to 2^22
  int64_t window_tokens = 3968;  // 1 to 2^22
};

// What the search of cuda/pattern.h is told.
struct ProbeParameters {
  double threshold = 0.18;
  double forced_density = 0;  // over 0: that share of the blocks, whatever their scores
  // Shorter prompts go dense, which is faster; not where a density is forced.
  int64_t dense_below_tokens = 8192;
};

// Our own: the search of cuda/pattern.h, each KV head with a threshold of its own, and mean correction.
struct HeadwaterParameters {
  double threshold = 0.1;  // over 0, at most 1: of heads that `thresholds` does not have
  int32_t sink_blocks = 2;
  int32_t window_blocks = 16;       // 1 and more
  int32_t dense_last_tokens = 256;  // tiles of the last queries, which ask for what the prompt holds
  bool correction = true;           // block means stand for what is not listed
  // Faster from 8,192 on, but 1.2 times there, for 2.6 % of perplexity: docs/policies.md.
  int64_t dense_below_tokens = 16384;
  // [layers * KV heads], what `python -m headwater.calibrate` found: over 0 and at most 1 a threshold; 0: the
  // head is dense; over 1: sinks and window alone, it is not searched. Empty: `threshold` for all.
  std::vector<float> thresholds;
  std::vector<int32_t> windows;  // likewise, in place of window_blocks
};

// SharePrefill's, with the map of heads that `python -m headwater.cluster` makes.
struct ShareWithClusters {
  reference::ShareParameters share;
  reference::ShareClusters clusters;
};

struct PolicyParameters
    : std::variant<DenseParameters, AShapeParameters, ProbeParameters, HeadwaterParameters,
                   reference::FlashParameters, reference::Flash2Parameters, reference::FlexParameters,
                   ShareWithClusters, reference::SkeletonParameters, reference::VerticalSlashParameters,
                   reference::XAttentionParameters> {
  using variant::variant;
  using variant::operator=;

  // Of policies that do not have one of their own: shorter prompts go dense on a GPU, which is faster. By
  // ParsePolicyParameters() a crossover that was measured (bench/policy_bench.py); the methods have no such
  // rule.
  int64_t dense_below_tokens = 0;
};

// The parameters of the policy called `name`, "" being "dense", with `parameters` in place of their defaults.
// INVALID_ARGUMENT: unknown name (the message lists the known ones), unknown parameter, or a value outside
// its range (the message names value and range). Names are those of the structures' fields, with three
// exceptions: probe's forced_density is "density"; vertical_slash's budgets are "n_vertical" and "n_slash",
// xattention's thresholds "threshold", the same for all heads. All but "dense" take "dense_below_tokens".
// What is not a number (clusters, frequencies, budgets of single heads) keeps its default, and `compat` is
// off.
Status ParsePolicyParameters(const std::string& name, const std::map<std::string, double>& parameters,
                             PolicyParameters* parsed);

// Names of all policies, "dense" first.
std::vector<std::string> PolicyNames();

// Shorter prompts are computed densely, in every layer, and nothing is searched for them. 0: none is.
int64_t DenseBelowTokens(const PolicyParameters& parameters);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_PATTERN_PARAMETERS_H_
