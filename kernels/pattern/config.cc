#include "kernels/pattern/config.h"

#include <map>
#include <string>
#include <variant>

#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

// A table of the caller's: no array where there is a count is a mistake, not a default.
Status CheckTable(const char* name, const void* array, int32_t count) {
  if (count >= 0 && (count == 0 || array != nullptr)) return {};
  return InvalidArgument(std::string(name) + ": a count of " + std::to_string(count) +
                         (array == nullptr ? " and no array" : ""));
}

// What requests do not carry as numbers.
Status AddTables(const hw_policy_config& c, PolicyParameters* parameters) {
  HW_KERNELS_RETURN_IF_ERROR(CheckTable("clusters", c.clusters, c.num_clusters));
  HW_KERNELS_RETURN_IF_ERROR(CheckTable("shared_clusters", c.shared_clusters, c.num_shared_clusters));
  HW_KERNELS_RETURN_IF_ERROR(CheckTable("thresholds", c.thresholds, c.num_thresholds));
  HW_KERNELS_RETURN_IF_ERROR(CheckTable("windows", c.windows, c.num_windows));
  if (auto* const skeleton = std::get_if<reference::SkeletonParameters>(parameters)) {
    if (c.rope_frequencies != nullptr) {
      if (c.head_dim < 2 || c.head_dim > 1 << 16) {
        return InvalidArgument("head_dim is " + std::to_string(c.head_dim) + "; 2 to 65536 is wanted");
      }
      skeleton->frequencies.assign(c.rope_frequencies, c.rope_frequencies + c.head_dim / 2);
    }
  } else if (c.rope_frequencies != nullptr) {
    return InvalidArgument("rope_frequencies are for policy skeleton");
  }
  auto* const headwater = std::get_if<HeadwaterParameters>(parameters);
  if ((c.thresholds != nullptr || c.windows != nullptr) && headwater == nullptr) {
    return InvalidArgument("thresholds and windows are for policy headwater");
  }
  for (int32_t i = 0; c.thresholds != nullptr && i < c.num_thresholds; ++i) {
    if (!(c.thresholds[i] >= 0)) {
      return InvalidArgument("threshold " + std::to_string(i) + " is " + NumberText(c.thresholds[i]) +
                             "; 0 or more is wanted");
    }
    headwater->thresholds.push_back(c.thresholds[i]);
  }
  for (int32_t i = 0; c.windows != nullptr && i < c.num_windows; ++i)
    headwater->windows.push_back(c.windows[i]);
  auto* const share = std::get_if<ShareWithClusters>(parameters);
  if (share == nullptr) {
    return c.clusters == nullptr && c.shared_clusters == nullptr
               ? Status()
               : InvalidArgument("clusters are for policy share");
  }
  for (int32_t i = 0; c.clusters != nullptr && i < c.num_clusters; ++i) {
    const hw_head_cluster& head = c.clusters[i];
    if (head.layer < 0 || head.layer >= c.num_layers || head.head < 0 || head.head >= c.num_q_heads ||
        head.cluster < 0) {
      return InvalidArgument("cluster " + std::to_string(head.cluster) + " of head " +
                             std::to_string(head.head) + " in layer " + std::to_string(head.layer) +
                             " is outside " + std::to_string(c.num_layers) + " layers of " +
                             std::to_string(c.num_q_heads) + " heads");
    }
    if (share->clusters.cluster_of.try_emplace({head.layer, head.head}, head.cluster).second) continue;
    return InvalidArgument("layer " + std::to_string(head.layer) + ", head " + std::to_string(head.head) +
                           " is in a cluster twice, the second time in " + std::to_string(head.cluster));
  }
  for (int32_t i = 0; c.shared_clusters != nullptr && i < c.num_shared_clusters; ++i) {
    share->clusters.shareable.insert(c.shared_clusters[i]);
  }
  return {};
}

}  // namespace

Status ReadPolicyConfig(const hw_policy_config& c, PolicyParameters* parameters) {
  if (c.name == nullptr || c.num_parameters < 0 ||
      (c.num_parameters > 0 && (c.keys == nullptr || c.values == nullptr))) {
    return InvalidArgument("a policy's name or parameters are null");
  }
  std::map<std::string, double> given;
  for (int32_t i = 0; i < c.num_parameters; ++i) {
    if (c.keys[i] == nullptr) return InvalidArgument("a parameter's name is null");
    if (given.try_emplace(c.keys[i], c.values[i]).second) continue;
    return InvalidArgument(std::string("parameter \"") + c.keys[i] + "\" is given twice");
  }
  HW_KERNELS_RETURN_IF_ERROR(ParsePolicyParameters(c.name, given, parameters));
  return AddTables(c, parameters);
}

}  // namespace headwater::kernels
