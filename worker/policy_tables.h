// What policies take besides the numbers of a request: read once, when a worker starts.
#ifndef HW_WORKER_POLICY_TABLES_H_
#define HW_WORKER_POLICY_TABLES_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "kernels/pattern/parameters.h"
#include "model/config.h"

namespace headwater {

struct PolicyTables {
  kernels::reference::ShareClusters clusters;  // of share; empty: it shares with pivots_per_layer only
  std::vector<float> thresholds;               // of headwater, [layers * KV heads]; empty: none
  std::vector<int32_t> windows;                // likewise
  std::vector<double> frequencies;             // of skeleton: how the model rotates
};

// Files for this model; an empty path is none. share_clusters: JSON that `python -m headwater.cluster`
// writes. headwater_calibration: {"format": 1, "model": TEXT, "layers": L, "kv_heads": H, "thresholds": [[H
// numbers] x L], "windows": [[H whole numbers] x L]}, thresholds as HeadwaterParameters has them, windows and
// a "calibration" object optional. INVALID_ARGUMENT names the file and what is wrong in it: unknown keys,
// sizes that are not the model's, values out of range. NOT_FOUND.
absl::StatusOr<PolicyTables> ReadPolicyTables(const std::string& share_clusters,
                                              const std::string& headwater_calibration,
                                              const ModelConfig& config);

// Completes a policy's parameters. What a request gave by name (`given`) stands: its threshold, window_blocks
// or rope_base in place of headwater's thresholds or windows or skeleton's frequencies.
void AddPolicyTables(const PolicyTables& tables, const std::map<std::string, double>& given,
                     kernels::PolicyParameters* parameters);

}  // namespace headwater

#endif  // HW_WORKER_POLICY_TABLES_H_
