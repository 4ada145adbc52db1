#include "worker/exchange.h"

#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/metrics.h"
#include "base/rpc/grpc_status.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"
#include "tests/support/tiny_model.h"
#include "tests/worker/gloo_group.h"
#include "tests/worker/prefill_group.h"
#include "worker/inprocess_collectives.h"

namespace headwater::testing {
namespace {

using ::testing::Each;

constexpr v1::Partition kPartitions[] = {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG,
                                         v1::PARTITION_STRIPED};
constexpr v1::Strategy kStrategies[] = {v1::STRATEGY_RING, v1::STRATEGY_ALLGATHER, v1::STRATEGY_SPARSE};

// Lists that differ from head to head and from layer to layer, and tiles that are dense.
class ScatteredLists final : public kernels::PatternPolicy {
 public:
  explicit ScatteredLists(int32_t num_lists) : num_lists_(num_lists) {}
  const std::string& name() const override { return name_; }
  const kernels::PolicyParameters& parameters() const override { return parameters_; }
  kernels::Status Select(const kernels::PatternInputs& inputs, kernels::BlockIndex* index) const override {
    index->num_lists = num_lists_;
    index->first_q_tile = inputs.first_q_tile;
    index->num_q_tiles = inputs.num_q_tiles;
    index->offsets = {0};
    for (int32_t list = 0; list < num_lists_; ++list) {
      for (int64_t tile = inputs.first_q_tile; tile < inputs.first_q_tile + inputs.num_q_tiles; ++tile) {
        const int64_t seed = inputs.layer * 31 + list * 17 + tile * 7;
        index->dense.push_back(seed % 11 == 0 ? 1 : 0);
        for (int64_t block = 0; block <= tile && seed % 11 != 0; ++block) {
          if (block == tile || (seed + block * block) % 4 == 0) {
            index->blocks.push_back(static_cast<int32_t>(block));
          }
        }
        index->offsets.push_back(static_cast<int64_t>(index->blocks.size()));
      }
    }
    return kernels::ValidateBlockIndex(*index);
  }

 private:
  const int32_t num_lists_;
  const std::string name_ = "scattered";
  const kernels::PolicyParameters parameters_;
};

// Whatever is used without having been written, or received, spoils the result: all bits set are NaNs.
void Poison(Arena* arena) {
  const uint64_t bytes = arena->capacity();
  std::memset(arena->Take(bytes), 0xff, bytes);
  ASSERT_TRUE(arena->Reset(bytes).ok());
}

class ExchangeTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const TempDir directory;
    WriteTinyModel(TinyModel{.layers = 3}, directory.path());
    for (const auto compute : {kernels::DType::kF32, kernels::DType::kBF16}) {
      auto model = Model::Load({directory.path(), compute, 0});
      ASSERT_TRUE(model.ok()) << model.status();
      (compute == kernels::DType::kF32 ? model_ : bf16_) = model->release();
    }
  }

  static std::vector<int32_t> Tokens(int64_t count) {
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>((i * 7919 + i / 3) % 256));
    return tokens;
  }

  // lists: 0: the policy's own; else ScatteredLists.
  static GroupRun Group(int world, v1::Partition partition, v1::Strategy strategy, int32_t lists = 0) {
    GroupRun run;
    run.world_size = world;
    run.partition = partition;
    run.strategy = strategy;
    run.change_context = [](int /*rank*/, PrefillContext* context) { Poison(context->arena); };
    if (lists > 0) {
      run.change_job = [lists](int /*rank*/, PrefillJob* job) {
        job->policy = std::make_shared<const ScatteredLists>(lists);
      };
    }
    return run;
  }
  static GroupRun AShape(GroupRun run) {
    run.policy = "a_shape";
    run.parameters = {{"sink_tokens", 128}, {"window_tokens", 256}};
    return run;
  }

  static void ExpectAllOk(const GroupResult& group) {
    for (const absl::Status& status : group.statuses) ASSERT_TRUE(status.ok()) << status;
    EXPECT_THAT(group.kv.times(), Each(1));
  }

  static uint64_t Bytes(const GroupResult& group) {
    return std::accumulate(group.results.begin(), group.results.end(), uint64_t{0},
                           [](uint64_t sum, const PrefillResult& rank) { return sum + rank.exchange_bytes; });
  }
  static uint64_t AllGatherBytes(const GroupResult& group) {
    return std::accumulate(
        group.results.begin(), group.results.end(), uint64_t{0},
        [](uint64_t sum, const PrefillResult& rank) { return sum + rank.exchange_bytes_allgather; });
  }

  // All strategies bitwise alike, and like one rank but for the order of sums.
  static void ExpectParity(const Model& model, int64_t length, int world, v1::Partition partition,
                           const std::function<GroupRun(GroupRun)>& change, int32_t lists, double most) {
    SCOPED_TRACE(
        absl::StrCat(length, " tokens, ", world, " ranks, partition ", partition, ", lists ", lists));
    const std::vector<int32_t> tokens = Tokens(length);
    const auto one = RunGroup(model, tokens, change(Group(1, partition, v1::STRATEGY_RING, lists)));
    ExpectAllOk(*one);
    std::unique_ptr<GroupResult> ring;
    for (const auto strategy : kStrategies) {
      SCOPED_TRACE(StrategyName(strategy));
      auto group = RunGroup(model, tokens, change(Group(world, partition, strategy, lists)));
      ExpectAllOk(*group);
      if (strategy == v1::STRATEGY_RING) {
        for (uint32_t layer = 0; layer < 3; ++layer) {
          for (const auto kind : {KvKind::kK, KvKind::kV}) {
            EXPECT_LE(RelativeError(group->kv.Tensor(layer, kind), one->kv.Tensor(layer, kind)), most);
          }
        }
        EXPECT_LE(RelativeError(group->logits, one->logits), most);
        EXPECT_GE(Bytes(*group), AllGatherBytes(*group));
        ring = std::move(group);
        continue;
      }
      EXPECT_TRUE(group->kv.bytes() == ring->kv.bytes());
      EXPECT_EQ(group->logits, ring->logits);
      EXPECT_EQ(AllGatherBytes(*group), AllGatherBytes(*ring));
      if (strategy == v1::STRATEGY_ALLGATHER) {
        EXPECT_EQ(Bytes(*group), AllGatherBytes(*group));
      } else {
        EXPECT_LE(Bytes(*group), AllGatherBytes(*group));
      }
    }
  }

  static Model* model_;
  static Model* bf16_;
};
Model* ExchangeTest::model_ = nullptr;
Model* ExchangeTest::bf16_ = nullptr;

// Lengths around the edges of blocks, ranks and tiles: ranks without tokens, one token, short last blocks.
TEST_F(ExchangeTest, EveryPartitionAndStrategyAgreesWithOneRank) {
  const auto same = [](GroupRun run) { return run; };
  for (const int world : {2, 3, 4}) {
    for (const auto partition : kPartitions) {
      for (const int64_t length : {1, 17, 40, 129, 1001}) {
        ExpectParity(*model_, length, world, partition, same, 0, 1e-5);
        ExpectParity(*model_, length, world, partition, AShape, 0, 1e-5);
      }
    }
  }
}

TEST_F(ExchangeTest, ListsOfEachHeadAreSentWithoutLoss) {
  const auto same = [](GroupRun run) { return run; };
  for (const int world : {2, 3, 4}) {
    for (const auto partition : kPartitions) {
      // One list, one a KV head, one a query head.
      for (const int32_t lists : {1, 2, 4}) ExpectParity(*model_, 2003, world, partition, same, lists, 1e-5);
    }
  }
}

TEST_F(ExchangeTest, Bf16IsBitwiseAlikeToo) {
  const auto wire = [](GroupRun run) {
    run.wire = v1::KV_DTYPE_BF16;
    return run;
  };
  for (const auto partition : kPartitions) {
    ExpectParity(*bf16_, 1501, 3, partition, wire, 0, 3e-2);
    ExpectParity(*bf16_, 1501, 3, partition, wire, 4, 3e-2);
  }
}

TEST_F(ExchangeTest, StripesOfManyBlocksAgreeToo) {
  // 130 blocks over two ranks: two a stripe.
  ExpectParity(*model_, 2077, 2, v1::PARTITION_STRIPED, AShape, 0, 1e-5);
}

// With checkpoints, which are under way at the same time.
TEST_F(ExchangeTest, GlooMovesWhatThreadsDo) {
  GlooGroups groups;
  const std::vector<int32_t> tokens = Tokens(1001);
  for (const int world : {2, 3}) {
    for (const auto partition : kPartitions) {
      const auto expected = RunGroup(*model_, tokens, Group(world, partition, v1::STRATEGY_RING, 4));
      ExpectAllOk(*expected);
      for (const auto strategy : kStrategies) {
        SCOPED_TRACE(absl::StrCat(world, " ranks, partition ", partition, ", ", StrategyName(strategy)));
        GroupRun run = Group(world, partition, strategy, 4);
        std::vector<CheckpointStore> stores(static_cast<size_t>(world));
        for (CheckpointStore& store : stores) run.checkpoints.push_back(&store);
        run.checkpoint_layers = 1;
        const std::string name = absl::StrCat(world, partition, strategy);
        run.join = [&](int rank) { return groups.Join(name, rank, world, absl::Seconds(20)).value(); };
        const auto group = RunGroup(*model_, tokens, run);
        ExpectAllOk(*group);
        EXPECT_TRUE(group->kv.bytes() == expected->kv.bytes());
        EXPECT_EQ(group->logits, expected->logits);
        EXPECT_NE(stores[1].Find("test", 0, 2, 0), nullptr);
      }
    }
  }
}

// Also prompts of fewer blocks than ranks: some have no tokens.
TEST_F(ExchangeTest, FourAndEightRanksOverGlooAgreeWithOne) {
  GlooGroups groups;
  int formed = 0;
  const auto over_gloo = [&](GroupRun run) {
    const std::string name = absl::StrCat("group", ++formed);
    run.join = [&groups, name, world = run.world_size](int rank) {
      return groups.Join(name, rank, world, absl::Seconds(20)).value();
    };
    return run;
  };
  for (const int world : {4, 8}) {
    for (const auto partition : kPartitions) {
      ExpectParity(*model_, 40, world, partition, over_gloo, 0, 1e-5);
      ExpectParity(
          *model_, 1501, world, partition, [&](GroupRun run) { return AShape(over_gloo(std::move(run))); }, 0,
          1e-5);
    }
  }
}

TEST_F(ExchangeTest, SparseMovesTheBlocksThatAreSelectedAndSaysSo) {
  constexpr uint64_t kToken = 2 * 2 * 32 * 4;  // K and V of both KV heads
  constexpr uint64_t kBlock = 128 * kToken;
  const std::vector<int32_t> tokens = Tokens(2048);
  // Rank 1 sees all of rank 0's 1,024 tokens in each of 3 layers. Its tiles 8 and 9 select the first block
  // and blocks 6 and 7 of them; the last layer's only query selects the first block.
  const uint64_t allgather = 3 * 1024 * kToken;
  const uint64_t sparse = (3 + 3 + 1) * kBlock;
  for (const auto& [strategy, bytes] : {std::pair(v1::STRATEGY_RING, allgather),
                                        {v1::STRATEGY_ALLGATHER, allgather},
                                        {v1::STRATEGY_SPARSE, sparse}}) {
    SCOPED_TRACE(StrategyName(strategy));
    Metrics metrics("test");
    WorkerMetrics worker_metrics(&metrics);
    GroupRun run = AShape(Group(2, v1::PARTITION_CONTIGUOUS, strategy));
    run.change_context = [&](int rank, PrefillContext* context) {
      Poison(context->arena);
      if (rank == 1) context->metrics = &worker_metrics;
    };
    const auto group = RunGroup(*model_, tokens, run);

    ExpectAllOk(*group);
    EXPECT_EQ(group->results[0].exchange_bytes, 0u);
    EXPECT_EQ(group->results[0].exchange_bytes_allgather, 0u);
    EXPECT_EQ(group->results[1].exchange_bytes, bytes);
    EXPECT_EQ(group->results[1].exchange_bytes_allgather, allgather);
    EXPECT_EQ(
        metrics
            .Counter("headwater_exchange_bytes_total", "K/V bytes received from other ranks, by strategy.",
                     {{"strategy", StrategyName(strategy)}})
            .Value(),
        static_cast<double>(bytes));
    EXPECT_EQ(worker_metrics.exchange_saved.Value(), static_cast<double>(allgather - bytes));
  }
}

TEST_F(ExchangeTest, TheRingCarriesChunksThatOnlyLaterRanksNeed) {
  const std::vector<int32_t> tokens = Tokens(1024);
  const auto ring = RunGroup(*model_, tokens, Group(4, v1::PARTITION_STRIPED, v1::STRATEGY_RING));
  const auto direct = RunGroup(*model_, tokens, Group(4, v1::PARTITION_STRIPED, v1::STRATEGY_ALLGATHER));
  // In the last layer, where one rank has a query: three chunks on their way, and three that arrive.
  EXPECT_EQ(Bytes(*ring), Bytes(*direct) + 3 * 256 * uint64_t{512});
}

// Ends the group, or sleeps, when its rank starts operation `at`.
class FailingCollectives final : public Collectives {
 public:
  FailingCollectives(std::unique_ptr<Collectives> inner, int at, absl::Duration late)
      : inner_(std::move(inner)), at_(at), late_(late) {}
  int rank() const override { return inner_->rank(); }
  int world_size() const override { return inner_->world_size(); }
  std::unique_ptr<PendingExchange> StartExchange(int to, absl::Span<const char> send, int from,
                                                 absl::Span<char> receive) override {
    Disturb();
    return inner_->StartExchange(to, send, from, receive);
  }
  absl::Status AllGather(const void* in, uint64_t bytes, void* out) override {
    Disturb();
    return inner_->AllGather(in, bytes, out);
  }
  void Abort() override { inner_->Abort(); }

 private:
  void Disturb() {
    if (operations_++ != at_) return;
    if (late_ > absl::ZeroDuration()) {
      absl::SleepFor(late_);
    } else {
      inner_->Abort();
    }
  }

  const std::unique_ptr<Collectives> inner_;
  const int at_;
  const absl::Duration late_;
  int operations_ = 0;
};

// Operation 0 is the agreement; a layer of three ranks has a gathering and two steps.
TEST_F(ExchangeTest, ALostOrLatePeerIsWorkerLostInEveryOperation) {
  const std::vector<int32_t> tokens = Tokens(600);
  GlooGroups groups;
  for (const bool gloo : {false, true}) {
    for (const auto strategy : {v1::STRATEGY_ALLGATHER, v1::STRATEGY_SPARSE}) {
      for (const int at : {1, 2, 3, 4, 5}) {
        for (const absl::Duration late : {absl::ZeroDuration(), absl::Milliseconds(700)}) {
          if (late > absl::ZeroDuration() && at > 2) continue;
          SCOPED_TRACE(absl::StrCat(gloo, StrategyName(strategy), " operation ", at, " late ",
                                    absl::FormatDuration(late)));
          const absl::Duration timeout =
              late > absl::ZeroDuration() ? absl::Milliseconds(200) : absl::Seconds(20);
          const std::string name = absl::StrCat(strategy, "/", at, "/", absl::FormatDuration(late));
          auto threads = MakeInProcessGroup(3, timeout);
          GroupRun run = Group(3, v1::PARTITION_ZIGZAG, strategy, 2);
          run.join = [&](int rank) -> std::unique_ptr<Collectives> {
            auto inner = gloo ? groups.Join(name, rank, 3, timeout).value()
                              : std::move(threads[static_cast<size_t>(rank)]);
            if (rank != 1) return inner;
            return std::make_unique<FailingCollectives>(std::move(inner), at, late);
          };
          const absl::Time start = absl::Now();

          const auto group = RunGroup(*model_, tokens, run);

          for (const size_t rank : {0, 2}) {
            EXPECT_EQ(group->statuses[rank].code(), absl::StatusCode::kUnavailable);
            EXPECT_EQ(ReasonOf(group->statuses[rank]), v1::ERROR_REASON_WORKER_LOST) << group->statuses[rank];
          }
          EXPECT_FALSE(group->statuses[1].ok());
          EXPECT_LT(absl::Now() - start, absl::Seconds(10));
        }
      }
    }
  }
}

}  // namespace
}  // namespace headwater::testing
