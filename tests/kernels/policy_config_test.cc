// Policies as the C interfaces are told of them.
#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/pattern/config.h"

namespace headwater::kernels {
namespace {

struct Config {
  std::vector<const char*> keys;
  std::vector<double> values;
  std::vector<hw_head_cluster> clusters;
  std::vector<int32_t> shared;
  std::vector<float> thresholds;

  Status Read(const char* name, PolicyParameters* parameters) const {
    hw_policy_config c{};
    c.struct_size = sizeof c;
    c.name = name;
    c.keys = keys.data();
    c.values = values.data();
    c.num_parameters = static_cast<int32_t>(keys.size());
    c.num_layers = 2;
    c.num_q_heads = 8;
    c.num_kv_heads = 2;
    c.head_dim = 128;
    if (!clusters.empty()) c.clusters = clusters.data();
    c.num_clusters = static_cast<int32_t>(clusters.size());
    if (!shared.empty()) c.shared_clusters = shared.data();
    c.num_shared_clusters = static_cast<int32_t>(shared.size());
    if (!thresholds.empty()) c.thresholds = thresholds.data();
    c.num_thresholds = static_cast<int32_t>(thresholds.size());
    return ReadPolicyConfig(c, parameters);
  }
};

TEST(PolicyConfig, TakesParametersAndTables) {
  PolicyParameters parameters;
  const Status share = Config{{"gamma"}, {0.5}, {{0, 1, 7}, {1, 2, 7}}, {7}, {}}.Read("share", &parameters);
  ASSERT_TRUE(share.ok()) << share.message();
  const auto& with = std::get<ShareWithClusters>(parameters);
  EXPECT_EQ(with.share.gamma, 0.5);
  EXPECT_EQ(with.clusters.cluster_of.size(), 2u);
  EXPECT_EQ(with.clusters.shareable.count(7), 1u);
  ASSERT_TRUE((Config{{}, {}, {}, {}, {0, 0.1f, 2, 1}}.Read("headwater", &parameters).ok()));
  EXPECT_EQ(std::get<HeadwaterParameters>(parameters).thresholds, (std::vector<float>{0, 0.1f, 2, 1}));
}

TEST(PolicyConfig, RefusesWhatContradictsItself) {
  const struct {
    const char* name;
    Config config;
    std::string says;
  } rows[] = {
      {"flex",
       {{"gamma", "tau", "gamma"}, {0.5, 0.1, 0.6}, {}, {}, {}},
       "parameter \"gamma\" is given twice"},
      {"flex", {{nullptr}, {1}, {}, {}, {}}, "a parameter's name is null"},
      {"share",
       {{}, {}, {{1, 3, 0}, {1, 3, 4}}, {}, {}},
       "layer 1, head 3 is in a cluster twice, the second time in 4"},
      {"share", {{}, {}, {{2, 0, 5}}, {}, {}}, "cluster 5 of head 0 in layer 2 is outside 2 layers of 8"},
      {"flex", {{}, {}, {{0, 0, 0}}, {}, {}}, "clusters are for policy share"},
      {"headwater", {{}, {}, {}, {}, {0.1f, -0.1f}}, "threshold 1 is -0.1; 0 or more is wanted"},
      {"flex", {{}, {}, {}, {}, {0.1f}}, "thresholds and windows are for policy headwater"},
  };
  for (const auto& row : rows) {
    PolicyParameters parameters;
    const Status status = row.config.Read(row.name, &parameters);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << row.says;
    EXPECT_NE(status.message().find(row.says), std::string::npos) << status.message();
  }
}

}  // namespace
}  // namespace headwater::kernels
