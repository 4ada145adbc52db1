#include "worker/policy_tables.h"

#include <functional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/model/checkpoint_files.h"

namespace headwater {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

ModelConfig SmallModel() {
  ModelConfig config;
  config.num_layers = 2;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.rope.inverse = {1, 0.5};
  return config;
}

json Clusters() {
  return json::parse(R"({"format": 1, "model": "m", "layers": 2, "heads": 4, "gamma": 0.9,
    "clusters": {"0": [[0, 0], [1, 3]], "7": [[0, 1]]}, "shared_clusters": ["0"], "calibration": {"tokens": 5}})");
}

json Calibration() {
  return json::parse(R"({"format": 1, "model": "m", "layers": 2, "kv_heads": 2,
    "thresholds": [[0.1, 0], [2, 0.5]], "windows": [[4, 8], [1, 16]]})");
}

class PolicyTablesTest : public ::testing::Test {
 protected:
  absl::StatusOr<PolicyTables> Read(const json& clusters, const json& calibration) {
    const std::string first = folder_.File("clusters.json"), second = folder_.File("calibration.json");
    testing::WriteFile(first, clusters.dump());
    testing::WriteFile(second, calibration.dump());
    return ReadPolicyTables(clusters.is_null() ? "" : first, calibration.is_null() ? "" : second,
                            SmallModel());
  }

  testing::TempDir folder_;
};

TEST_F(PolicyTablesTest, ReadsBothFiles) {
  const auto tables = Read(Clusters(), Calibration());
  ASSERT_TRUE(tables.ok()) << tables.status();
  EXPECT_EQ(tables->clusters.cluster_of.size(), 3u);
  EXPECT_EQ(tables->clusters.cluster_of.at({1, 3}), 0);
  EXPECT_EQ(tables->clusters.shareable, std::set<int32_t>{0});
  EXPECT_EQ(tables->thresholds, (std::vector<float>{0.1f, 0, 2, 0.5f}));
  EXPECT_EQ(tables->windows, (std::vector<int32_t>{4, 8, 1, 16}));
  EXPECT_EQ(tables->frequencies, (std::vector<double>{1, 0.5}));
}

TEST_F(PolicyTablesTest, NoFileIsNoTable) {
  const auto tables = Read(nullptr, nullptr);
  ASSERT_TRUE(tables.ok()) << tables.status();
  EXPECT_TRUE(tables->clusters.cluster_of.empty());
  EXPECT_TRUE(tables->thresholds.empty());
  json without = Calibration();
  without.erase("windows");
  EXPECT_TRUE(Read(nullptr, without)->windows.empty());
}

TEST_F(PolicyTablesTest, RefusesClustersNamingTheFileAndWhatIsWrong) {
  const std::vector<std::pair<std::function<void(json*)>, std::string>> rows = {
      {[](json* j) { (*j)["extra"] = 1; }, "unknown key \"extra\""},
      {[](json* j) { (*j)["format"] = 2; }, "format is 2"},
      {[](json* j) { j->erase("model"); }, "model is absent"},
      {[](json* j) { (*j)["layers"] = 3; }, "layers is 3; the model has 2"},
      {[](json* j) { (*j)["heads"] = 8; }, "heads is 8; the model has 4"},
      {[](json* j) { j->erase("clusters"); }, "clusters is absent"},
      {[](json* j) {
         (*j)["clusters"]["01"] = {{0, 2}};
       },
       "cluster id \"01\""},
      {[](json* j) { (*j)["clusters"]["1"] = json::array(); }, "a list of heads is wanted"},
      {[](json* j) {
         (*j)["clusters"]["1"] = {{0, 4}};
       },
       "clusters[1] has [0,4]"},
      {[](json* j) {
         (*j)["clusters"]["1"] = {{-1, 0}};
       },
       "clusters[1] has [-1,0]"},
      {[](json* j) {
         (*j)["clusters"]["1"] = {{0, 0.5}};
       },
       "clusters[1] has"},
      {[](json* j) {
         (*j)["clusters"]["1"] = {{0, 0}};
       },
       "layer 0, head 0 is in clusters 0 and 1"},
      {[](json* j) { (*j)["shared_clusters"] = {"7"}; }, "shared_clusters has 7"},
      {[](json* j) { (*j)["shared_clusters"] = {"3"}; }, "shared_clusters has 3"},
      {[](json* j) { (*j)["shared_clusters"] = {3}; }, "shared_clusters has 3"},
  };
  for (const auto& [change, says] : rows) {
    json file = Clusters();
    change(&file);
    const absl::Status status = Read(file, nullptr).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << says;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says));
    EXPECT_THAT(std::string(status.message()), HasSubstr("clusters.json"));
  }
}

TEST_F(PolicyTablesTest, RefusesACalibrationNamingTheFileAndWhatIsWrong) {
  const std::vector<std::pair<std::function<void(json*)>, std::string>> rows = {
      {[](json* j) { (*j)["extra"] = 1; }, "unknown key \"extra\""},
      {[](json* j) { (*j)["kv_heads"] = 4; }, "kv_heads is 4; the model has 2"},
      {[](json* j) { j->erase("thresholds"); }, "thresholds is absent; 2 lists of 2"},
      {[](json* j) { (*j)["thresholds"].erase(0); }, "thresholds is [[2"},
      {[](json* j) { (*j)["thresholds"] = 7; }, "thresholds is 7; 2 lists of 2"},
      {[](json* j) { (*j)["thresholds"][1] = {1}; }, "thresholds[1] is [1]"},
      {[](json* j) { (*j)["thresholds"][1][0] = -0.1; }, "thresholds[1][0] is -0.1"},
      {[](json* j) { (*j)["thresholds"][1][0] = "x"; }, "thresholds[1][0] is"},
      {[](json* j) { (*j)["windows"][0][1] = 0; }, "windows[0][1] is 0"},
      {[](json* j) { (*j)["windows"][0][1] = 1.5; }, "windows[0][1] is 1.5"},
      {[](json* j) { (*j)["windows"][0][1] = 1 << 21; }, "windows[0][1] is 2097152"},
  };
  for (const auto& [change, says] : rows) {
    json file = Calibration();
    change(&file);
    const absl::Status status = Read(nullptr, file).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << says;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says));
    EXPECT_THAT(std::string(status.message()), HasSubstr("calibration.json"));
  }
  EXPECT_EQ(ReadPolicyTables("/nowhere", "", SmallModel()).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(PolicyTablesTest, WhatARequestGivesStands) {
  const auto tables = Read(Clusters(), Calibration());
  ASSERT_TRUE(tables.ok()) << tables.status();
  const auto with = [&](const std::string& name, const std::map<std::string, double>& given) {
    kernels::PolicyParameters parameters;
    EXPECT_TRUE(kernels::ParsePolicyParameters(name, given, &parameters).ok());
    AddPolicyTables(*tables, given, &parameters);
    return parameters;
  };
  const auto own = std::get<kernels::HeadwaterParameters>(with("headwater", {}));
  EXPECT_EQ(own.thresholds.size(), 4u);
  EXPECT_EQ(own.windows.size(), 4u);
  const auto tuned = std::get<kernels::HeadwaterParameters>(with("headwater", {{"threshold", 0.2}}));
  EXPECT_TRUE(tuned.thresholds.empty());
  EXPECT_EQ(tuned.windows.size(), 4u);
  EXPECT_TRUE(
      std::get<kernels::HeadwaterParameters>(with("headwater", {{"window_blocks", 2}})).windows.empty());
  EXPECT_EQ(std::get<kernels::ShareWithClusters>(with("share", {})).clusters.shareable.size(), 1u);
  EXPECT_EQ(std::get<kernels::reference::SkeletonParameters>(with("skeleton", {})).frequencies.size(), 2u);
  EXPECT_TRUE(std::get<kernels::reference::SkeletonParameters>(with("skeleton", {{"rope_base", 5}}))
                  .frequencies.empty());
}

}  // namespace
}  // namespace headwater
