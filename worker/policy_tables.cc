#include "worker/policy_tables.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <set>
#include <utility>
#include <variant>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"

namespace headwater {
namespace {

using nlohmann::json;

constexpr JsonLimits kLimits{size_t{16} << 20, 16, 2'000'000};
constexpr double kMostThreshold = 1e6;
constexpr int64_t kMostWindow = 1 << 20;

absl::Status Wrong(absl::string_view message) { return absl::InvalidArgumentError(message); }

absl::Status CheckKeys(const json& object, std::initializer_list<absl::string_view> known) {
  for (const auto& [key, value] : object.items()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      return Wrong(absl::StrCat("unknown key ", Quoted(key)));
    }
  }
  return absl::OkStatus();
}

// The header that both files have: format 1, and sizes that are the model's. Which model it was made for is
// logged, not compared: a fine-tuned model may take its base's.
absl::Status CheckHeader(const std::string& path, const JsonFields& fields, const char* heads_name,
                         int32_t heads, const ModelConfig& config) {
  constexpr int64_t kMost = 1 << 20;
  HW_RETURN_IF_ERROR(fields.Integer("format", 1, 1).status());
  if (const json* const model = fields.Find("model"); model == nullptr || !model->is_string()) {
    return fields.Wrong("model", "a string");
  } else {
    HW_LOG(INFO).Field("file", path) << "made for the model " << Quoted(model->get<std::string>());
  }
  HW_ASSIGN_OR_RETURN(const int64_t layers, fields.Integer("layers", 1, kMost));
  HW_ASSIGN_OR_RETURN(const int64_t has, fields.Integer(heads_name, 1, kMost));
  if (layers != config.num_layers) {
    return Wrong(absl::StrCat("layers is ", layers, "; the model has ", config.num_layers));
  }
  if (has == heads) return absl::OkStatus();
  return Wrong(absl::StrCat(heads_name, " is ", has, "; the model has ", heads));
}

absl::StatusOr<json> ReadObject(const std::string& path) {
  HW_ASSIGN_OR_RETURN(const std::string text, ReadFileUpTo(path, kLimits.max_bytes));
  return ParseJsonObject(text, kLimits, "it");
}

absl::StatusOr<int32_t> ClusterId(const std::string& text) {
  int32_t id = 0;
  if (absl::SimpleAtoi(text, &id) && id >= 0 && absl::StrCat(id) == text) return id;
  return Wrong(
      absl::StrCat("cluster id ", Quoted(text), "; a string of a number from 0 to 2147483647 is wanted"));
}

absl::Status TakeHead(int32_t cluster, const json& head, const ModelConfig& config,
                      kernels::reference::ShareClusters* clusters) {
  const bool pair =
      head.is_array() && head.size() == 2 && head[0].is_number_unsigned() && head[1].is_number_unsigned();
  if (!pair || head[0].get<uint64_t>() >= static_cast<uint64_t>(config.num_layers) ||
      head[1].get<uint64_t>() >= static_cast<uint64_t>(config.num_q_heads)) {
    return Wrong(absl::StrCat("clusters[", cluster, "] has ", Describe(head), "; [layer, head] below ",
                              config.num_layers, " and ", config.num_q_heads, " is wanted"));
  }
  const std::pair<int32_t, int32_t> key(head[0].get<int32_t>(), head[1].get<int32_t>());
  const auto [at, added] = clusters->cluster_of.emplace(key, cluster);
  if (added) return absl::OkStatus();
  return Wrong(absl::StrCat("layer ", key.first, ", head ", key.second, " is in clusters ", at->second,
                            " and ", cluster));
}

absl::Status ReadClusters(const std::string& path, const ModelConfig& config,
                          kernels::reference::ShareClusters* clusters) {
  HW_ASSIGN_OR_RETURN(const json file, ReadObject(path));
  HW_RETURN_IF_ERROR(CheckKeys(
      file, {"format", "model", "layers", "heads", "gamma", "clusters", "shared_clusters", "calibration"}));
  const JsonFields fields(file);
  HW_RETURN_IF_ERROR(CheckHeader(path, fields, "heads", config.num_q_heads, config));
  const json* const members = fields.Find("clusters");
  if (members == nullptr || !members->is_object()) return fields.Wrong("clusters", "an object");
  std::set<int32_t> alone;
  for (const auto& [name, heads] : members->items()) {
    HW_ASSIGN_OR_RETURN(const int32_t id, ClusterId(name));
    if (!heads.is_array() || heads.empty()) {
      return Wrong(absl::StrCat("clusters[", id, "] is ", Describe(heads), "; a list of heads is wanted"));
    }
    if (heads.size() == 1) alone.insert(id);
    for (const json& head : heads) HW_RETURN_IF_ERROR(TakeHead(id, head, config, clusters));
  }
  const json* const shared = fields.Find("shared_clusters");
  if (shared == nullptr || !shared->is_array()) return fields.Wrong("shared_clusters", "a list");
  for (const json& name : *shared) {
    if (!name.is_string()) return Wrong(absl::StrCat("shared_clusters has ", Describe(name)));
    HW_ASSIGN_OR_RETURN(const int32_t id, ClusterId(name.get<std::string>()));
    if (!members->contains(name.get<std::string>()) || alone.count(id) > 0) {
      return Wrong(absl::StrCat("shared_clusters has ", id, ", which is no cluster of two heads or more"));
    }
    clusters->shareable.insert(id);
  }
  return absl::OkStatus();
}

// [[KV heads] x layers] as one array. take(value) puts one away; false: it is none of `wanted`.
template <typename Take>
absl::Status ReadTable(const JsonFields& fields, const char* name, const ModelConfig& config,
                       const char* wanted, const Take& take) {
  const json* const table = fields.Find(name);
  const std::string size = absl::StrCat(config.num_layers, " lists of ", config.num_kv_heads, " ", wanted);
  if (table == nullptr) return Wrong(absl::StrCat(name, " is absent; ", size, " are wanted"));
  if (!table->is_array() || table->size() != static_cast<size_t>(config.num_layers)) {
    return Wrong(absl::StrCat(name, " is ", Describe(*table), "; ", size, " are wanted"));
  }
  for (size_t layer = 0; layer < table->size(); ++layer) {
    const json& row = (*table)[layer];
    if (!row.is_array() || row.size() != static_cast<size_t>(config.num_kv_heads)) {
      return Wrong(absl::StrCat(name, "[", layer, "] is ", Describe(row), "; ", size, " are wanted"));
    }
    for (size_t head = 0; head < row.size(); ++head) {
      if (take(row[head])) continue;
      return Wrong(absl::StrCat(name, "[", layer, "][", head, "] is ", Describe(row[head]), "; ", wanted,
                                " are wanted"));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadCalibration(const std::string& path, const ModelConfig& config, PolicyTables* tables) {
  HW_ASSIGN_OR_RETURN(const json file, ReadObject(path));
  HW_RETURN_IF_ERROR(
      CheckKeys(file, {"format", "model", "layers", "kv_heads", "thresholds", "windows", "calibration"}));
  const JsonFields fields(file);
  HW_RETURN_IF_ERROR(CheckHeader(path, fields, "kv_heads", config.num_kv_heads, config));
  HW_RETURN_IF_ERROR(ReadTable(fields, "thresholds", config, "numbers from 0 to 1000000", [&](const json& x) {
    if (!x.is_number() || !(x.get<double>() >= 0 && x.get<double>() <= kMostThreshold)) return false;
    // What is over 0 stays so.
    const auto least = static_cast<double>(std::numeric_limits<float>::min());
    const double value = x.get<double>();
    tables->thresholds.push_back(static_cast<float>(value == 0 ? 0 : std::max(value, least)));
    return true;
  }));
  if (!fields.Contains("windows")) return absl::OkStatus();
  return ReadTable(fields, "windows", config, "whole numbers from 1 to 1048576", [&](const json& x) {
    if (!x.is_number_unsigned() || x.get<uint64_t>() < 1 || x.get<uint64_t>() > kMostWindow) return false;
    tables->windows.push_back(x.get<int32_t>());
    return true;
  });
}

absl::Status InFile(const char* flag, const std::string& path, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat("--", flag, "=", path, ": ", status.message()));
}

}  // namespace

absl::StatusOr<PolicyTables> ReadPolicyTables(const std::string& share_clusters,
                                              const std::string& headwater_calibration,
                                              const ModelConfig& config) {
  PolicyTables tables;
  tables.frequencies = config.rope.inverse;
  if (!share_clusters.empty()) {
    HW_RETURN_IF_ERROR(
        InFile("share_clusters", share_clusters, ReadClusters(share_clusters, config, &tables.clusters)));
  }
  if (!headwater_calibration.empty()) {
    HW_RETURN_IF_ERROR(InFile("headwater_calibration", headwater_calibration,
                              ReadCalibration(headwater_calibration, config, &tables)));
  }
  return tables;
}

void AddPolicyTables(const PolicyTables& tables, const std::map<std::string, double>& given,
                     kernels::PolicyParameters* parameters) {
  if (auto* const share = std::get_if<kernels::ShareWithClusters>(parameters)) {
    share->clusters = tables.clusters;
  } else if (auto* const own = std::get_if<kernels::HeadwaterParameters>(parameters)) {
    if (given.count("threshold") == 0) own->thresholds = tables.thresholds;
    if (given.count("window_blocks") == 0) own->windows = tables.windows;
  } else if (auto* const skeleton = std::get_if<kernels::reference::SkeletonParameters>(parameters)) {
    if (given.count("rope_base") == 0) skeleton->frequencies = tables.frequencies;
  }
}

}  // namespace headwater
