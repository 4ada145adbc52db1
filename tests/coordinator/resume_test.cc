#include "coordinator/resume.h"

#include "gtest/gtest.h"

namespace headwater {
namespace {

v1::RankCheckpoint Report(uint32_t layer) {
  v1::RankCheckpoint report;
  report.set_layer(layer);
  report.set_kv_digest_share(std::string(kDigestBytes, 'd'));
  report.set_kv_bytes(10 * layer);
  report.set_kv_blocks(layer);
  return report;
}

TEST(ResumeTest, KeepsTheNewestTwoCheckpoints) {
  std::vector<Checkpoint> kept;
  for (const uint32_t layer : {2u, 2u, 5u, 8u, 8u}) EXPECT_TRUE(KeepCheckpoint(Report(layer), 0, 8, &kept));

  ASSERT_EQ(kept.size(), 2u);
  EXPECT_EQ(kept[0].layer, 5u);
  EXPECT_EQ(kept[1].layer, 8u);
  EXPECT_EQ(kept[1].below.bytes, 80u);
  EXPECT_EQ(kept[1].below.blocks, 8u);
  EXPECT_EQ(kept[1].below.digest, std::string(16, 'd'));
}

TEST(ResumeTest, KeepsNoCheckpointThatCannotBeTrue) {
  std::vector<Checkpoint> kept;
  EXPECT_FALSE(KeepCheckpoint(Report(0), 0, 8, &kept));
  EXPECT_FALSE(KeepCheckpoint(Report(9), 0, 8, &kept));
  EXPECT_FALSE(KeepCheckpoint(Report(3), 4, 8, &kept)) << "below the layer that the epoch went on from";
  v1::RankCheckpoint digest = Report(3);
  digest.set_kv_digest_share(std::string(17, 'd'));
  EXPECT_FALSE(KeepCheckpoint(digest, 0, 8, &kept));
  EXPECT_TRUE(kept.empty());

  EXPECT_TRUE(KeepCheckpoint(Report(4), 4, 8, &kept));
  EXPECT_FALSE(KeepCheckpoint(Report(3), 0, 8, &kept)) << "it falls";
  EXPECT_EQ(kept.size(), 1u);
}

TEST(ResumeTest, EveryRankIsProvidedForByItsWorkerOrTheRightNeighbour) {
  Resume resume;
  for (const char* id : {"a", "b", "c", "d"}) resume.holders.push_back({id, 1});
  const auto find = [&](const absl::flat_hash_set<std::string>& living,
                        const std::vector<std::string>& planned) {
    v1::PrefillPlan plan;
    for (const std::string& id : planned) plan.add_worker_ids(id);
    return FindProviders(resume, living, plan);
  };
  using Ranks = std::vector<uint32_t>;

  EXPECT_EQ(find({"a", "b", "c", "d"}, {"a", "b", "c", "d"}).value(), (Ranks{0, 1, 2, 3}));
  EXPECT_EQ(find({"b", "d"}, {"aa", "b", "d"}).value(), (Ranks{1, 1, 2, 2}));
  EXPECT_EQ(find({"a", "c"}, {"a", "c"}).value(), (Ranks{0, 1, 1, 0}));
  EXPECT_EQ(find({"a", "b", "c", "d"}, {"a", "c"}).value(), (Ranks{0, 1, 1, 0})) << "not all are planned";
  EXPECT_EQ(find({"b", "d"}, {"a", "b", "d"}).value(), (Ranks{1, 1, 2, 2})) << "a has forgotten";
  EXPECT_EQ(find({"a", "d"}, {"a", "d"}).status().message(),
            "neither worker b nor c is there with the state of rank 1");
  EXPECT_FALSE(find({"a", "b"}, {"a", "b"}).ok());
  EXPECT_FALSE(find({}, {"a", "b", "c", "d"}).ok());
}

}  // namespace
}  // namespace headwater
