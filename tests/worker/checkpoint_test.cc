#include "worker/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"
#include "tests/support/tiny_model.h"
#include "tests/worker/acked.h"
#include "tests/worker/gloo_group.h"
#include "tests/worker/prefill_group.h"

namespace headwater::testing {
namespace {

using ::testing::Each;

constexpr int kLayers = 6;
constexpr int64_t kHidden = 4;

std::vector<RankTokens> Partition(int64_t tokens, int world, v1::Partition partition) {
  return PartitionTokens(tokens, world, partition, 16).value();
}

TEST(CheckpointStoreTest, HoldsTheNewestTwoOfOneEpoch) {
  CheckpointStore store;
  store.Begin("r", 3, 0, Partition(80, 3, v1::PARTITION_CONTIGUOUS), kHidden);
  for (const int32_t layer : {2, 4, 6}) {
    const auto rows = store.Start(layer);
    ASSERT_TRUE(rows.ok()) << rows.status();
    EXPECT_EQ(rows->own.size(), 32u * kHidden);
    std::fill(rows->own.begin(), rows->own.end(), static_cast<float>(layer));
    EXPECT_EQ(rows->left.size(), 16u * kHidden) << "rank 2 has the last 16 tokens";
    std::fill(rows->left.begin(), rows->left.end(), static_cast<float>(-layer));
    EXPECT_EQ(store.Find("r", 3, layer, 0), nullptr) << "not filled yet";
    store.Finish();
  }
  EXPECT_EQ(store.Find("r", 3, 2, 0), nullptr);
  for (const int32_t layer : {4, 6}) {
    ASSERT_NE(store.Find("r", 3, layer, 0), nullptr);
    EXPECT_EQ(store.Find("r", 3, layer, 0)[32 * kHidden - 1], static_cast<float>(layer));
    ASSERT_NE(store.Find("r", 3, layer, 2), nullptr);
    EXPECT_EQ(store.Find("r", 3, layer, 2)[16 * kHidden - 1], static_cast<float>(-layer));
    EXPECT_EQ(store.Find("r", 3, layer, 1), nullptr) << "the right neighbour's are elsewhere";
    EXPECT_EQ(store.Find("r", 2, layer, 0), nullptr);
    EXPECT_EQ(store.Find("other", 3, layer, 0), nullptr);
  }
}

TEST(CheckpointStoreTest, OneThatWasBegunReplacesTheOlderAtOnce) {
  CheckpointStore store;
  store.Begin("r", 1, 1, Partition(64, 2, v1::PARTITION_ZIGZAG), kHidden);
  for (const int32_t layer : {1, 2}) {
    ASSERT_TRUE(store.Start(layer).ok());
    store.Finish();
  }
  ASSERT_TRUE(store.Start(3).ok());
  EXPECT_EQ(store.Find("r", 1, 1, 0), nullptr);
  EXPECT_NE(store.Find("r", 1, 2, 0), nullptr);
  EXPECT_EQ(store.Find("r", 1, 3, 0), nullptr);
}

TEST(CheckpointStoreTest, FreesWhatIsNotKept) {
  CheckpointStore store;
  store.Begin("r", 1, 0, Partition(64, 2, v1::PARTITION_CONTIGUOUS), kHidden);
  for (const int32_t layer : {1, 2}) {
    ASSERT_TRUE(store.Start(layer).ok());
    store.Finish();
  }
  const uint64_t two = store.bytes();
  store.KeepOnly("r", 1, 1);
  EXPECT_EQ(store.bytes(), two / 2);
  EXPECT_NE(store.Find("r", 1, 1, 1), nullptr);
  EXPECT_EQ(store.Find("r", 1, 2, 1), nullptr);
  store.KeepOnly("r", 2, 1);
  EXPECT_EQ(store.bytes(), 0u);
  EXPECT_EQ(store.Find("r", 1, 1, 1), nullptr);
}

TEST(CheckpointStoreTest, TheNextPromptsCheckpointsTakeTheSameMemory) {
  CheckpointStore store;
  const auto fill = [&store](const std::string& request_id, int64_t tokens) {
    store.Begin(request_id, 1, 0, Partition(tokens, 2, v1::PARTITION_CONTIGUOUS), kHidden);
    const float* first = nullptr;
    for (const int32_t layer : {1, 2}) {
      const auto rows = store.Start(layer);
      EXPECT_TRUE(rows.ok());
      if (first == nullptr) first = rows->own.data();
      store.Finish();
    }
    return first;
  };
  const float* const place = fill("a", 6400);
  const uint64_t bytes = store.bytes();
  store.Forget();
  EXPECT_EQ(store.Find("a", 1, 2, 0), nullptr);
  EXPECT_EQ(store.bytes(), bytes);
  EXPECT_EQ(fill("b", 6400), place);
  EXPECT_EQ(store.bytes(), bytes);
  EXPECT_EQ(fill("c", 3200), place) << "half of it will do";
  EXPECT_EQ(store.Find("b", 1, 2, 0), nullptr);
  fill("d", 640);
  EXPECT_LT(store.bytes(), bytes / 4) << "far too much is given back";
  fill("e", 64000);
  EXPECT_GT(store.bytes(), bytes);
}

// Every row comes once, from its owner's place to its own.
TEST(CheckpointMovesTest, BringEveryTokenToItsPlaceOnce) {
  for (const int64_t tokens : {1, 17, 64, 333, 2500}) {
    for (const int before : {2, 3, 5}) {
      for (const int after : {1, 2, 4}) {
        for (const auto& [partition, next] : {std::pair(v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG),
                                              {v1::PARTITION_ZIGZAG, v1::PARTITION_ZIGZAG},
                                              {v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED},
                                              {v1::PARTITION_STRIPED, v1::PARTITION_STRIPED},
                                              {v1::PARTITION_STRIPED, v1::PARTITION_CONTIGUOUS}}) {
          ResumePoint resume;
          resume.partition = Partition(tokens, before, partition);
          for (int rank = 0; rank < before; ++rank) resume.providers.push_back(rank % after);
          const auto wanted = Partition(tokens, after, next);
          const auto positions = [](const RankTokens& ranges) {
            std::vector<int64_t> all;
            for (const TokenRange& range : ranges) {
              for (int64_t token = range.begin; token < range.end; ++token) all.push_back(token);
            }
            return all;
          };
          std::vector<int> times(static_cast<size_t>(tokens));
          for (const CheckpointMove& move : PlanMoves(resume, wanted)) {
            EXPECT_EQ(move.from, move.owner % after);
            const auto from = positions(resume.partition[static_cast<size_t>(move.owner)]);
            const auto to = positions(wanted[static_cast<size_t>(move.to)]);
            for (int64_t i = 0; i < move.count; ++i) {
              const int64_t token = from.at(static_cast<size_t>(move.from_row + i));
              ASSERT_EQ(token, to.at(static_cast<size_t>(move.to_row + i)));
              ++times[static_cast<size_t>(token)];
            }
          }
          EXPECT_THAT(times, Each(1));
        }
      }
    }
  }
}

class ResumeTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const TempDir directory;
    WriteTinyModel(TinyModel{.layers = kLayers}, directory.path());
    auto model = Model::Load({directory.path(), kernels::DType::kF32, 0});
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = model->release();
    const auto expected = ForwardDense(*model_, Tokens());
    ASSERT_TRUE(expected.ok());
    expected_ = new DenseResult(*expected);
  }

  static std::vector<int32_t> Tokens() {
    std::vector<int32_t> tokens;
    for (int i = 0; i < 300; ++i) tokens.push_back((i * 7919 + i / 3) % 256);
    return tokens;
  }

  // A group of `world` whose rank `victim` is gone after layer 4 (counted from 0), and what it reported.
  struct Disturbed {
    std::vector<std::unique_ptr<CheckpointStore>> stores;
    std::vector<std::optional<PrefillProgress::Checkpoint>> reported;
    std::unique_ptr<GroupResult> group;
    GroupRun run;
  };
  // It goes when all blocks of the layers below 4 are acknowledged, and checkpoint 4 has been reported.
  Disturbed Disturb(int world, v1::Partition partition, int victim) {
    Disturbed out;
    out.reported.resize(static_cast<size_t>(world));
    std::vector<KvSender*> senders(static_cast<size_t>(world));
    out.run.world_size = world;
    out.run.partition = partition;
    out.run.checkpoint_layers = 2;
    for (int rank = 0; rank < world; ++rank) {
      out.stores.push_back(std::make_unique<CheckpointStore>());
      out.run.checkpoints.push_back(out.stores.back().get());
    }
    out.run.change_context = [&senders](int rank, PrefillContext* context) {
      senders[static_cast<size_t>(rank)] = context->sender;
    };
    out.run.on_layer = [&out, &senders, victim](int rank, JobControl* control,
                                                const PrefillProgress& progress) {
      out.reported[static_cast<size_t>(rank)] = progress.checkpoint;
      if (progress.layers_done == 4) WaitAckedBelow(senders[static_cast<size_t>(rank)], 4);
      if (rank == victim && progress.layers_done == 5) control->Cancel(absl::CancelledError("killed"));
    };
    out.group = RunGroup(*model_, Tokens(), out.run);
    out.run.change_context = nullptr;
    out.run.on_layer = nullptr;
    return out;
  }

  // The survivors go on: rank r of the new group is survivor r.
  std::unique_ptr<GroupResult> GoOn(Disturbed* before, int victim, v1::Partition partition) {
    const int world = before->run.world_size;
    GroupRun run;
    run.world_size = world - 1;
    run.partition = partition;
    run.checkpoint_layers = 2;
    ResumePoint resume;
    resume.layer = 4;
    resume.partition = MakeJob(*model_, Tokens(), before->run, 0).partition;
    const auto survivor = [victim](int rank) { return rank < victim ? rank : rank - 1; };
    for (int rank = 0; rank < world; ++rank) {
      if (rank != victim) run.checkpoints.push_back(before->stores[static_cast<size_t>(rank)].get());
      resume.providers.push_back(survivor(rank == victim ? (rank + 1) % world : rank));
    }
    run.change_job = [resume](int /*rank*/, PrefillJob* job) {
      job->resume = resume;
      job->epoch = 1;
    };
    return RunGroup(*model_, Tokens(), run);
  }

  static Model* model_;
  static DenseResult* expected_;
};
Model* ResumeTest::model_ = nullptr;
DenseResult* ResumeTest::expected_ = nullptr;

TEST_F(ResumeTest, ReportsTheNewestCheckpointBelowWhichAllIsAcknowledged) {
  const Disturbed before = Disturb(2, v1::PARTITION_ZIGZAG, 1);
  KvDigest sum;
  uint64_t blocks = 0;
  for (const auto& reported : before.reported) {
    ASSERT_TRUE(reported.has_value());
    EXPECT_EQ(reported->layer, 4u);
    sum.Merge(reported->share.digest);
    blocks += reported->share.blocks;
  }
  const KvGeometry& geometry = before.group->kv.geometry();
  KvDigest wanted;
  EXPECT_EQ(blocks, 4 * 2 * geometry.blocks_per_tensor());
  for (uint64_t i = 0; i < blocks; ++i) {
    const KvBlockId id = geometry.BlockAt(i);
    wanted.Add(i, geometry.BytesOf(id),
               Crc32c(before.group->kv.bytes().data() + geometry.OffsetOf(id), geometry.BytesOf(id)));
  }
  EXPECT_EQ(sum, wanted);
}

TEST_F(ResumeTest, SurvivorsGoOnWithTheSameResult) {
  for (const int world : {2, 3, 4}) {
    for (const auto partition : {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED}) {
      for (const int victim : {0, world - 1}) {
        SCOPED_TRACE(absl::StrCat("world ", world, ", partition ", partition, ", victim ", victim));
        std::string bytes[2];
        for (std::string& one : bytes) {
          Disturbed before = Disturb(world, partition, victim);
          const auto after =
              GoOn(&before, victim, partition == v1::PARTITION_STRIPED ? partition : v1::PARTITION_ZIGZAG);
          for (const absl::Status& status : after->statuses) ASSERT_TRUE(status.ok()) << status;
          const uint64_t first = 4 * 2 * after->kv.geometry().blocks_per_tensor();
          for (uint64_t i = 0; i < after->kv.times().size(); ++i) {
            ASSERT_EQ(after->kv.times()[i], i < first ? 0 : 1) << "block " << i;
          }
          for (uint32_t layer = 0; layer < kLayers; ++layer) {
            const KvCapture& kv = layer < 4 ? before.group->kv : after->kv;
            EXPECT_LE(RelativeError(kv.Tensor(layer, KvKind::kK), expected_->k[layer]), 1e-5) << layer;
            EXPECT_LE(RelativeError(kv.Tensor(layer, KvKind::kV), expected_->v[layer]), 1e-5) << layer;
          }
          EXPECT_LE(RelativeError(after->logits, expected_->logits), 1e-5);
          one = after->kv.bytes();
        }
        EXPECT_EQ(bytes[0], bytes[1]) << "bitwise equal for the same plan from that layer on";
      }
    }
  }
}

TEST_F(ResumeTest, OneRankHasNothingLeftToHoldWhenItGoesOnAlone) {
  Disturbed before = Disturb(2, v1::PARTITION_CONTIGUOUS, 0);
  EXPECT_GT(before.stores[1]->bytes(), 0u);
  const auto after = GoOn(&before, 0, v1::PARTITION_CONTIGUOUS);
  ASSERT_TRUE(after->statuses[0].ok()) << after->statuses[0];
  EXPECT_EQ(before.stores[1]->bytes(), 0u);
}

TEST_F(ResumeTest, AResumedGroupHasACheckpointFromItsStart) {
  Disturbed before = Disturb(3, v1::PARTITION_ZIGZAG, 1);
  const auto after = GoOn(&before, 1, v1::PARTITION_ZIGZAG);
  for (const absl::Status& status : after->statuses) ASSERT_TRUE(status.ok()) << status;
  for (const int rank : {0, 2}) {
    const CheckpointStore& store = *before.stores[static_cast<size_t>(rank)];
    for (const int owner : {0, 1}) {
      EXPECT_NE(store.Find("test", 1, 4, owner), nullptr);
      EXPECT_EQ(store.Find("test", 0, 4, owner), nullptr);
    }
  }
}

TEST_F(ResumeTest, GoesThroughGlooToo) {
  GlooGroups groups;
  auto endpoints = groups.Make(3, absl::Seconds(20));
  const auto tokens = Tokens();
  GroupRun run;
  run.world_size = 3;
  run.checkpoint_layers = 1;
  run.join = [&](int rank) { return std::move(endpoints[static_cast<size_t>(rank)]); };
  std::vector<CheckpointStore> stores(3);
  for (CheckpointStore& store : stores) run.checkpoints.push_back(&store);
  const auto group = RunGroup(*model_, tokens, run);
  for (const absl::Status& status : group->statuses) ASSERT_TRUE(status.ok()) << status;
  EXPECT_LE(RelativeError(group->logits, expected_->logits), 1e-5);
  endpoints = groups.Make(3, absl::Seconds(20));
  ResumePoint resume;
  resume.layer = 5;
  resume.partition = MakeJob(*model_, tokens, run, 0).partition;
  resume.providers = {1, 1, 2};  // rank 0's from its neighbour
  run.change_job = [resume](int /*rank*/, PrefillJob* job) {
    job->resume = resume;
    job->epoch = 1;
  };
  const auto again = RunGroup(*model_, tokens, run);
  for (const absl::Status& status : again->statuses) ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(again->logits, group->logits);
}

// As while flags are changed from worker to worker.
TEST_F(ResumeTest, RanksTakeCheckpointsAsOftenAsTheOneThatWantsFewest) {
  for (const auto& [second, newest] : {std::pair(4, 4), std::pair(0, -1)}) {
    std::vector<CheckpointStore> stores(2);
    GroupRun run;
    run.world_size = 2;
    run.checkpoints = {&stores[0], &stores[1]};
    run.change_context = [second](int rank, PrefillContext* context) {
      context->checkpoint_layers = rank == 0 ? 1 : second;
    };
    const auto group = RunGroup(*model_, Tokens(), run);
    for (const absl::Status& status : group->statuses) ASSERT_TRUE(status.ok()) << status;
    for (const CheckpointStore& store : stores) {
      for (int32_t layer = 0; layer < kLayers; ++layer) {
        EXPECT_EQ(store.Find("test", 0, layer, 0) != nullptr, layer == newest) << layer;
      }
    }
  }
}

TEST_F(ResumeTest, RefusesToProvideWhatIsNotThere) {
  GroupRun run;
  PrefillJob job = MakeJob(*model_, Tokens(), run, 0);
  job.resume.emplace();
  job.resume->layer = 4;
  job.resume->epoch = 0;
  job.resume->partition = Partition(300, 2, v1::PARTITION_ZIGZAG);
  job.resume->providers = {0, 0};
  CheckpointStore store;
  store.Begin("test", 0, 0, job.resume->partition, kHidden);
  ASSERT_TRUE(store.Start(2).ok());
  store.Finish();
  const absl::Status status = CheckProvides(job, store);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_CHECKPOINT_LOST) << status;
  job.resume->layer = 2;
  EXPECT_TRUE(CheckProvides(job, store).ok());
}

TEST_F(ResumeTest, RanksThatBeginAtDifferentLayersAreRefused) {
  Disturbed before = Disturb(2, v1::PARTITION_CONTIGUOUS, 0);
  GroupRun run = before.run;
  run.change_job = [](int rank, PrefillJob* job) {
    if (rank == 0) return;
    job->resume.emplace();
    job->resume->layer = 4;
    job->resume->partition = job->partition;
    job->resume->providers = {1, 1};
  };
  const auto group = RunGroup(*model_, Tokens(), run);
  for (const absl::Status& status : group->statuses) {
    EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_MODEL_MISMATCH) << status;
  }
}

}  // namespace
}  // namespace headwater::testing
